"""mmrlhf aligns multimodal LLMs with human preferences.

The names below are loaded when they are first used, so that `import mmrlhf` costs milliseconds and does nothing else:
no environment variable, no global setting, no CUDA context. Everything else is reached through its own module:
`mmrlhf.ops`, `mmrlhf.losses`, `mmrlhf.integrations`, `mmrlhf.data`, `mmrlhf.models`; `mmrlhf.train.loop.train` runs a
training (`mmrlhf.train` is the package, so the function cannot bear that name up here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrlhf.batch import GroupBatch
    from mmrlhf.data.schema import PreferenceGroup
    from mmrlhf.data.segments import segment_weights
    from mmrlhf.ops import (
        dynamic_beta,
        fused_preference_loss,
        linear_logp,
        preference_loss,
        sequence_score,
        token_statistics,
    )

__version__ = "0.1.0"

__all__ = [
    "GroupBatch",
    "PreferenceGroup",
    "__version__",
    "dynamic_beta",
    "fused_preference_loss",
    "linear_logp",
    "preference_loss",
    "segment_weights",
    "sequence_score",
    "token_statistics",
]

_HOME = {
    "GroupBatch": "mmrlhf.batch",
    "PreferenceGroup": "mmrlhf.data.schema",
    "dynamic_beta": "mmrlhf.ops",
    "fused_preference_loss": "mmrlhf.ops",
    "linear_logp": "mmrlhf.ops",
    "preference_loss": "mmrlhf.ops",
    "segment_weights": "mmrlhf.data.segments",
    "sequence_score": "mmrlhf.ops",
    "token_statistics": "mmrlhf.ops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mmrlhf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
