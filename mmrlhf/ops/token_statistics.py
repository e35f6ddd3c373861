"""What a trainer logs of each token: entropy, squared probabilities, whether the target is on top, the mean logit.

public function (checks, shapes) -> `stream` here (torch, cpu), or the `statistics` of the triton or cuda engine: one
pass over the vocabulary, 1U (U = 2 N H V flops), no [N, V], no gradient.

`stream` keeps, for each row, its largest logit m so far and four sums over the tokens but that one, of E = exp(z - m):
E, E (m - z), E^2, and z. A block of columns is folded in by shifting the side with the smaller m, in float64. With
S = 1 + sum E the entropy log1p(sum E) + sum E (m - z) / S is a sum of terms of one sign: nothing cancels, and a sure
row's entropy of 1e-9 nats is as exact as its logits. logp = z_y - m - log1p(sum E), z_y being of the same GEMM as m.
No offset is known without targets, and none is needed: there is no row to run again. The cuda kernels do the same.
Triton counts from the target's offset instead, which the same kernels take for the gradients, each tile's E t from the
tile's own largest t. Not covered: a LoRA on the head, a vocabulary on several ranks, float64 (`ops.reference`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops import backend as backends
from mmrlhf.ops import checks, reference, streaming
from mmrlhf.ops.linear_logp import cast_for_autocast
from mmrlhf.ops.reference import TokenStatistics
from mmrlhf.ops.streaming import Head

_LOWEST = torch.finfo(torch.float32).min


@torch.no_grad()
def token_statistics(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor | None = None,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TokenStatistics:
    """Entropy, sum of squared probabilities and mean logit of each row; with targets, also logp and is_top1. [...]

    The logits z are those of `linear_logp`, whose arguments these are. All float32, is_top1 bool: True where no token
    has a larger logit than the target, so that a tie counts (two logits that differ by a rounding are not a tie, on
    triton not even two equal rows of the weight). Rows whose target is `ignore_index` get 0 and False. TRL logs the
    means of entropy, is_top1 (mean_token_accuracy) and mean_logit; sum_p2 is what WPO weighs pairs with
    (arXiv:2406.11827). No result has a gradient. One pass over the vocabulary, log-probabilities included; beside a
    `linear_logp` whose gradient is wanted it is one more.

    Raises what `linear_logp` raises.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    double = backends.requested(backend) == "reference"
    checks.head(hidden, weight, bias, logit_scale, softcap, double=double)
    if targets is not None:
        checks.targets(targets, hidden, weight.shape[0], ignore_index)
    if checks.traced(hidden):
        return _traced(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, backend)
    name = backends.choose("token_statistics", hidden, weight, requested=backend).name
    head = Head(weight, bias, logit_scale, softcap)
    if name == "reference":
        options: dict[str, Any] = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
        options["ignore_index"] = ignore_index
        return reference.token_statistics(hidden, weight, targets, **options)
    found = _of_rows(name, head, hidden.reshape(-1, hidden.shape[-1]), targets, ignore_index)
    shape = hidden.shape[:-1]
    entropy, sum_p2, mean_logit = (each.reshape(shape) for each in found[:3])
    logp, is_top1 = (None if each is None else each.reshape(shape) for each in found[3:])
    return TokenStatistics(entropy, sum_p2, mean_logit, logp, is_top1)


Columns = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # the fields of TokenStatistics, each [N]


def _of_rows(name: str, head: Head, hidden: Tensor, targets: Tensor | None, ignore_index: int) -> Columns:
    if targets is None:
        return _run(name, head, hidden, None)
    targets = targets.reshape(-1).long()
    counts = targets != ignore_index
    if targets.device.type == "cpu" and not bool(counts.all()):  # elsewhere counting would wait for the device
        index = counts.nonzero()[:, 0]
        some = _run(name, head, hidden[index], targets[index])
        return tuple(each.new_zeros(targets.shape).index_put((index,), each) for each in some if each is not None)  # type: ignore[return-value]
    found = _run(name, head, torch.where(counts[:, None], hidden, 0), torch.where(counts, targets, 0))
    return tuple(torch.where(counts, each, torch.zeros_like(each)) for each in found if each is not None)  # type: ignore[return-value]


def _run(name: str, head: Head, hidden: Tensor, targets: Tensor | None) -> Columns:
    with torch.autocast(hidden.device.type, enabled=False):
        if name not in ("triton", "cuda"):
            return stream(head, hidden, targets)
        known = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device) if targets is None else targets
        rows, found = backends.engine(name).statistics(head, hidden, known)
        whole = (found.entropy, found.sum_p2, found.mean_logit)
        return (*whole, None, None) if targets is None else (*whole, rows.logp(), found.is_top1.bool())


def stream(head: Head, hidden: Tensor, targets: Tensor | None) -> Columns:
    """The statistics of rows [N, H], tile by tile in PyTorch on any device."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    size = streaming.pick(count, vocab, hidden.device.type)
    scaled = head.rows(hidden)
    parts = [
        _block_of_rows(head, scaled[first : first + size.rows], None if targets is None else targets[first:], size)
        for first in range(0, max(count, 1), size.rows)
    ]
    return tuple(None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]


def _block_of_rows(head: Head, hidden: Tensor, targets: Tensor | None, size: streaming.Tiles) -> Columns:
    """`hidden` in the dtype of the GEMM; `targets` may be longer."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    peak = torch.full((count,), _LOWEST, dtype=torch.float32, device=hidden.device)
    rest, moment, squares, logits = torch.zeros(4, count, dtype=torch.float64, device=hidden.device)
    z_y = torch.full((count,), -math.inf, dtype=torch.float32, device=hidden.device)
    spare = torch.empty(count * size.columns, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, size.columns):
        stop = min(start + size.columns, vocab)
        z = spare[: count * (stop - start)].view(count, stop - start)
        head.project_(hidden, head.block(start, stop), start, z)
        if targets is not None:
            local = targets[:count] - start
            inside = (local >= 0) & (local < stop - start)
            own = z.gather(1, local.clamp(0, stop - start - 1)[:, None])[:, 0]
            z_y = torch.where(inside, own, z_y)
        logits += z.sum(1)
        top, at = z.max(1)
        top = top.clamp(min=_LOWEST)  # a block of masked tokens has none
        z.sub_(top[:, None]).clamp_(min=-200.0).scatter_(1, at[:, None], -200.0)  # e^-200 is 0
        e = z.exp()
        block = (e.sum(1).double(), (e * z).sum(1).double(), e.square_().sum(1).double())
        peak, rest, moment, squares = _folded((peak, rest, moment, squares), (top, *block))
    lost = (peak == _LOWEST) | ~peak.isfinite()  # no token has a probability, or one has all of infinity
    whole = 1 + rest
    entropy = torch.where(lost, math.nan, torch.log1p(rest) - moment / whole)
    spread = torch.where(lost, math.nan, (1 + squares) / whole**2)
    mean = logits / vocab
    if targets is None:
        return entropy.float(), spread.float(), mean.float(), None, None
    logp = torch.where(lost, math.nan, z_y.double() - peak.double() - torch.log1p(rest))
    return entropy.float(), spread.float(), mean.float(), logp.float(), z_y >= peak


_Sums = tuple[Tensor, Tensor, Tensor, Tensor]  # largest logit; of the others sum E, sum E (z - it), sum E^2


def _folded(one: _Sums, two: _Sums) -> _Sums:
    """The sums of two disjoint sets of tokens as those of their union."""
    first = one[0] >= two[0]
    high, rest, moment, squares = (torch.where(first, a, b) for a, b in zip(one, two, strict=True))
    low, low_rest, low_moment, low_squares = (torch.where(first, b, a) for a, b in zip(one, two, strict=True))
    distance = (low.double() - high.double()).clamp(min=-1e4)
    scale = distance.exp()
    return (
        high,
        rest + scale * (1 + low_rest),
        moment + scale * (low_moment + distance * (1 + low_rest)),
        squares + scale.square() * (1 + low_squares),
    )


def _traced(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, backend) -> TokenStatistics:
    """One registered op, which a graph holds whole."""
    name = _choose(backend, hidden.dtype, hidden.device)
    found = _op(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, name)
    return TokenStatistics(*found[:3], *(found[3:] if targets is not None else ()))


@backends.constant
def _choose(requested: str | None, dtype: torch.dtype, device: torch.device) -> str:
    if device.type == "meta":
        return backends.requested(requested) or "torch"
    return backends.choose("token_statistics", torch.empty(0, dtype=dtype, device=device), requested=requested).name


@torch.library.custom_op(
    "mmrlhf::token_statistics",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? targets, Tensor? bias, float logit_scale, float? softcap, "
    "int ignore_index, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _op(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, backend):
    options = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap}
    found = token_statistics(hidden, weight, targets, ignore_index=ignore_index, backend=backend, **options)
    none = found.entropy.new_empty(0)
    if targets is None:
        return found.entropy, found.sum_p2, found.mean_logit, none, none.clone()
    return found.entropy, found.sum_p2, found.mean_logit, found.logp, found.is_top1


@_op.register_fake
def _(hidden, weight, targets, bias, logit_scale, softcap, ignore_index, backend):
    whole = [hidden.new_empty(hidden.shape[:-1], dtype=torch.promote_types(hidden.dtype, torch.float32)) for _ in "123"]
    if targets is None:
        return (*whole, whole[0].new_empty(0), whole[0].new_empty(0))
    return (*whole, torch.empty_like(whole[0]), torch.empty_like(whole[0], dtype=torch.bool))
