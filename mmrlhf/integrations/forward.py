"""A second forward for a model inside somebody else's wrapper: `model(mmrlhf_batch=packed)` scores response tokens.

Other trainers wrap models in DDP, FSDP or an engine, whose hooks run only in the wrapper's own forward. So the shared
prefix, the pictures once and the lm_head all run inside `model.forward`, behind one keyword; without it the forward is
the model's own, and generation is unchanged. Not covered: an lm_head that is an FSDP unit by itself (ValueError; leave
it to the root's `fully_shard`), ZeRO-3.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.integrations.rows import BATCH, PackedRows
from mmrlhf.models import shared_prefix, vision
from mmrlhf.models.parts import Head, base_model, inner_model, lm_head, parameter_device
from mmrlhf.ops import linear_logp

_CHUNK_BYTES = 64 << 20  # of float32 logits held at once by `statistics`
_MARK = "_mmrlhf_forward"


def add_forward(model: nn.Module, *, share_prefix: bool = True, self_check: bool = True, backend: str | None = None):
    """Teach a model (bare, or inside PEFT) the keyword `mmrlhf_batch`; a second call changes the settings.

    The forward then returns {"logp": [N] float32, "mmrlhf_batch": packed}; logp carries a gradient. With
    `mmrlhf_statistics=True` also "entropy", "top1" and "mean_logit" [N], without. The first batch is compared with
    ordinary separate rows (`self_check`). Raises ValueError for a head whose weight alone does not say what it computes
    (an adapter on it, a quantised one).
    """
    whole = base_model(model)
    lm_head(whole)
    settings = {"share_prefix": share_prefix, "check": self_check, "backend": backend}
    if hasattr(whole, _MARK):
        getattr(whole, _MARK).update(settings)
        return
    setattr(whole, _MARK, {**settings, "original": whole.forward})

    @functools.wraps(type(whole).forward)  # the signature stays: trainers and `generate` read it
    def forward(self, *args, **kwargs):
        packed = kwargs.pop(BATCH, None)
        statistics_too = kwargs.pop("mmrlhf_statistics", False)
        if packed is None:
            return getattr(self, _MARK)["original"](*args, **kwargs)
        return score_tokens(self, packed, statistics_too=statistics_too)

    whole.forward = types.MethodType(forward, whole)


def score_tokens(model: nn.Module, packed: PackedRows, *, statistics_too: bool = False) -> dict[str, Any]:
    """What `model(mmrlhf_batch=packed)` runs; fills in `packed.batch` and the features it may share."""
    settings = getattr(model, _MARK)
    device = parameter_device(model)
    if not packed.ready:
        packed.batch = shared_prefix.prepare(model, packed.batch).to(device)
        packed.ready = True
    batch = packed.batch
    features = _features(model, packed)
    if settings["check"]:
        settings["check"] = False
        if settings["share_prefix"] and not _sharded(model):
            with _own_forward(model):
                shared_prefix.self_check(model, batch, vision=features, tolerance=_tolerance(device))
    hidden = shared_prefix.response_hidden(
        model, batch, vision=features, share_prefix=settings["share_prefix"], layout=packed.layout
    )
    head = lm_head(model)
    out: dict[str, Any] = {
        BATCH: packed,
        "logp": linear_logp(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            backend=settings["backend"],
        ),
    }
    return out | statistics(hidden, head, batch.targets) if statistics_too else out


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Inside, `model(...)` is what it was before `add_forward`.

    Accelerate wraps a forward in one autocast object; entered again inside itself, that object forgets that autocast
    was off before, and leaves it on for the whole process.
    """
    wrapped = model.forward
    model.forward = getattr(model, _MARK)["original"]
    try:
        yield
    finally:
        model.forward = wrapped


def _tolerance(device: torch.device) -> float | None:
    """Relative error allowed between two exact paths under autocast, whose results are float32 but rounded like its
    dtype; None, outside autocast: the parameters' dtype decides."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return {torch.bfloat16: 6e-2, torch.float16: 3e-2}.get(torch.get_autocast_dtype(device.type))


def _features(model: nn.Module, packed: PackedRows) -> vision.VisionFeatures:
    """The batch's pictures, encoded once for every forward of a model whose tower is frozen."""
    trained = vision.is_trained(model)
    tower = id(inner_model(model))
    if not trained and packed.tower == tower:
        return packed.features
    features = vision.encode(model, packed.batch, grad=trained)
    if not trained:
        packed.tower, packed.features = tower, features
    return features


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters: a forward of the whole model inside its own forward is not for it."""
    return any(hasattr(module, "unshard") for module in model.modules())


@torch.no_grad()
def statistics(
    hidden: Tensor,  # [N, H]
    head: Head,
    targets: Tensor,  # [N]
) -> dict[str, Tensor]:
    """Entropy (nats) of each row's distribution, whether its largest logit is the target, and its mean logit; [N].

    One more pass over the vocabulary, a block of rows at a time.
    """
    weight = head.weight.to(hidden.dtype)
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    for rows, wanted in zip(hidden.split(step), targets.split(step), strict=True):
        logits = torch.nn.functional.linear(rows, weight).float() * head.logit_scale
        if head.bias is not None:
            logits = logits + head.bias.float()
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        parts.append((entropy, (logits.argmax(-1) == wanted).float(), logits.mean(-1)))
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return dict(zip(("entropy", "top1", "mean_logit"), columns, strict=True))
