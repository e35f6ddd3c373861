"""A second forward for a model inside somebody else's wrapper: `model(mmrlhf_batch=packed)` scores response tokens.

Other trainers wrap models in DDP, FSDP or an engine, whose hooks run only in the wrapper's own forward. So the shared
prefix, the pictures once and the lm_head all run inside `model.forward`, behind one keyword; without it the forward is
the model's own, and generation is unchanged. Not covered: ZeRO-3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.integrations.rows import BATCH, PackedRows
from mmrlhf.models import shared_prefix, vision
from mmrlhf.models.parts import Head, base_model, inner_model, lm_head, parameter_device, vision_parameters
from mmrlhf.ops import LoraAdapter, linear_logp, token_statistics

STATISTICS = ("entropy", "top1", "mean_logit")
_CHUNK_BYTES = 64 << 20  # of float32 logits held at once by `statistics`
_MARK = "_mmrlhf_forward"


def add_forward(
    model: nn.Module,
    *,
    share_prefix: bool = True,
    self_check: bool = True,
    backend: str | None = None,
    statistics: Collection[str] = (),
) -> None:
    """Teach a model (bare, or inside PEFT) the keyword `mmrlhf_batch`; a second call changes the settings.

    The forward then returns {"logp": [N] float32, "mmrlhf_batch": packed}; logp carries a gradient. With the keyword
    `mmrlhf_statistics` (names; True: STATISTICS; not given: those of `statistics`) also these [N], without: see the
    function `statistics`. The first batch is compared with ordinary separate rows (`self_check`). Raises ValueError for
    a head whose tensors do not say what it computes (a quantised one, an adapter that is not a plain LoRA).
    """
    whole = base_model(model)
    lm_head(whole)
    settings = {"share_prefix": share_prefix, "check": self_check, "backend": backend, "statistics": tuple(statistics)}
    if hasattr(whole, _MARK):
        getattr(whole, _MARK).update(settings)
        return
    setattr(whole, _MARK, {**settings, "original": whole.forward})

    @functools.wraps(type(whole).forward)  # the signature stays: trainers and `generate` read it
    def forward(self, *args, **kwargs):
        packed = kwargs.pop(BATCH, None)
        wanted = kwargs.pop("mmrlhf_statistics", getattr(self, _MARK)["statistics"])
        if packed is None:
            return getattr(self, _MARK)["original"](*args, **kwargs)
        return score_tokens(self, packed, wanted=STATISTICS if wanted is True else tuple(wanted or ()))

    whole.forward = types.MethodType(forward, whole)


def score_tokens(model: nn.Module, packed: PackedRows, *, wanted: tuple[str, ...] = ()) -> dict[str, Any]:
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
            adapter=[LoraAdapter(*factors) for factors in head.adapters],
            backend=settings["backend"],
        ),
    }
    return out | statistics(hidden, head, batch.targets, wanted, settings["backend"]) if wanted else out


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


def tower_is_shared(model: nn.Module, reference: nn.Module) -> bool:
    """Whether a separate reference model's tower is a frozen copy of the policy's: then one pass serves both."""
    if vision.is_trained(model):
        return False
    ours, theirs = (vision_parameters(each) for each in (model, reference))
    if any(hasattr(each, "full_tensor") for each in (*ours, *theirs)):  # FSDP2 shards the reference before the policy
        return False
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters: a forward of the whole model inside its own forward is not for it."""
    return any(hasattr(module, "unshard") for module in model.modules())


@torch.no_grad()
def statistics(
    hidden: Tensor,  # [N, H]
    head: Head,
    targets: Tensor,  # [N]
    wanted: tuple[str, ...] = STATISTICS,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """What one more pass over the vocabulary says of each row's distribution, [N] float32 each.

    entropy: nats. top1: 1 where no logit is above the target's. mean_logit. log_sum_sq: log of the sum of squared
    probabilities, WPO's measure of the policy's own samples. A LoRA on the head: a block of rows at a time, in PyTorch.
    """
    whole = {name: _gathered(getattr(head, name)) for name in ("weight", "bias")}
    head = dataclasses.replace(head, **whole)
    if head.adapters:
        return _statistics_of_blocks(hidden, head, targets, wanted)
    found = token_statistics(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        backend=backend,
    )
    assert found.is_top1 is not None
    columns = {
        "entropy": found.entropy,
        "top1": found.is_top1.float(),
        "mean_logit": found.mean_logit,
        "log_sum_sq": found.sum_p2.log(),
    }
    return {name: columns[name] for name in wanted}


def _gathered(tensor: Any) -> Any:
    """A DTensor of a head that is an FSDP unit by itself, whole on every rank."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _statistics_of_blocks(hidden: Tensor, head: Head, targets: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    parts: list[tuple[Tensor, ...]] = []
    step = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
    for rows, target in zip(hidden.split(step), targets.split(step), strict=True):
        logits = head.logits(rows)
        logp = logits.log_softmax(-1)
        top1 = (logits.argmax(-1) == target).float()
        parts.append((-(logp.exp() * logp).sum(-1), top1, logits.mean(-1), (2 * logp).logsumexp(-1)))
    columns = dict(zip((*STATISTICS, "log_sum_sq"), map(torch.cat, zip(*parts, strict=True)), strict=True))
    return {name: columns[name] for name in wanted}
