"""The installed cut-cross-entropy, where there is one: per-row losses of the pass without logits (CUDA)."""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor


def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N]."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none")


def missing() -> str | None:
    return None if find_spec("cut_cross_entropy") else "cut-cross-entropy is not installed"


def version() -> str:
    from importlib.metadata import version

    return version("cut-cross-entropy")
