"""From hidden rows to a preference loss in one pass over the vocabulary, with the gradients of hidden, weight and bias.

Same value and gradients as composing `linear_logp`, `sequence_score`, `preference_loss` and the SFT term; under
torch.compile it is that composition. Frozen head: 2U (U = 2 N H V flops), dlogp/dh being made in the forward and scaled
there. Trained head: two phases inside the forward, a chunk of whole groups at a time. (1) Keep the chunk's exponentials
E, reduce to scores, run the loss on that short vector by autograd, which gives one coefficient c a token; (2) dX = c *
dlogp/dh and dW += E^T (c h). 3U, and exact for every loss. A chunk whose E does not fit `memory_budget` makes E again:
4U. A loss that couples the pairs (bco_pair, a callable beta) is one chunk. Not covered: gradients of anything but
hidden, weight, bias and adapter; double backward.
"""

from __future__ import annotations

import dataclasses
import logging
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops import backend as backends
from mmrlhf.ops import checks, preference, reference, streaming
from mmrlhf.ops.adapter import Adapters
from mmrlhf.ops.linear_logp import (
    Given,
    check_budget,
    choose_backend,
    linear_logp,
    prepare,
    refuse_double_backward,
    wants_grad,
)
from mmrlhf.ops.loss_kinds import LOSSES
from mmrlhf.ops.reference import Beta, FusedPreferenceOutput, Objective
from mmrlhf.ops.sequence_score import REDUCTIONS
from mmrlhf.ops.sharded import VocabShard

_logger = logging.getLogger("mmrlhf.ops")
_warned: set[str] = set()


def fused_preference_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [R + 1]
    pairs: Tensor,  # [P, 2]
    *,
    token_weight: Tensor | None = None,  # [N]
    reduction: str = "sum",
    reference_scores: Tensor | None = None,  # [R]
    beta: Beta = 0.1,  # or [P], or a function of (scores, reference_scores)
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.5,
    discopop_tau: float = 0.05,
    pair_weight: Tensor | None = None,  # [P]
    sft_weight: float = 0.0,
    num_pairs: float | Tensor | None = None,
    num_sft_tokens: float | Tensor | None = None,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: Adapters = None,
    shard: VocabShard | None = None,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> FusedPreferenceOutput:
    """sum(losses * pair_weight) / num_pairs + sft_weight * (NLL of the pairs' better responses) / num_sft_tokens.

    The head's arguments are those of `linear_logp`, the responses' those of `sequence_score`, the pairs' those of
    `preference_loss`. `beta` may also be a function, called without gradients with (scores [R], reference_scores), that
    gives a number or [P]. The SFT term sums -logp, every token weighing 1, over the better response of each pair.
    `num_pairs` (default P) and `num_sft_tokens` (default: those tokens, once a pair) let one micro-batch be divided by
    a whole step's totals. `memory_budget`: bytes of exponentials kept at once for a trained head, default 2 GiB.

    Only `loss` of the result carries a gradient, to hidden, weight, bias and adapter. Raises what the four ops raise,
    and ValueError where another argument requires a gradient. To cut chunks, cu_seqlens and pairs are read on the host.
    """
    if isinstance(hidden, Tensor) and hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [N, H], got {list(hidden.shape)}")
    head = prepare(hidden, weight, targets, bias, logit_scale, softcap, adapter, shard, None, backend)
    hidden = head.hidden
    objective = Objective(
        cu_seqlens,
        pairs,
        token_weight=token_weight,
        reduction=reduction,
        reference_scores=reference_scores,
        beta=beta,
        kind=kind,
        label_smoothing=label_smoothing,
        gamma_beta_ratio=gamma_beta_ratio,
        discopop_tau=discopop_tau,
        pair_weight=pair_weight,
        sft_weight=sft_weight,
        num_pairs=num_pairs,
        num_sft_tokens=num_sft_tokens,
    )
    _check(objective, hidden)
    objective = _in_dtype(objective, torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    budget = check_budget(memory_budget)
    name = choose_backend("fused_preference_loss", head, backend)
    if name == "reference":
        return objective(reference.linear_logp(hidden, head.weight, targets, **head.options()))
    if checks.traced(hidden):  # the composition, whose parts a graph can hold
        return objective(
            linear_logp(hidden, head.weight, targets, **head.options(), memory_budget=budget, backend=name)
        )
    return FusedPreferenceOutput(*_apply(backends.engine(name), head, targets, objective, budget))


def _check(objective: Objective, hidden: Tensor) -> None:
    """Everything after the head, with the messages of the ops it is made of."""
    o, tokens = objective, hidden.shape[0]
    checks.cu_seqlens(o.cu_seqlens, tokens)
    responses = o.cu_seqlens.numel() - 1
    checks.pairs(o.pairs, responses)
    checks.same_device("hidden", hidden, cu_seqlens=o.cu_seqlens, pairs=o.pairs)
    checks.finite_weights("token_weight", o.token_weight, tokens, "one weight a token", hidden)
    checks.one_of("reduction", o.reduction, REDUCTIONS)
    preference.check_kind(o.kind, o.label_smoothing, o.gamma_beta_ratio, o.discopop_tau)
    preference.check_pair_terms(
        hidden, o.reference_scores, o.pairs, o.beta, o.kind, o.pair_weight, o.num_pairs, responses
    )
    checks.not_negative("sft_weight", o.sft_weight)
    preference.check_count("num_sft_tokens", o.num_sft_tokens)
    names = ("token_weight", "reference_scores", "beta", "pair_weight", "num_pairs", "num_sft_tokens")
    preference.refuse_grad("fused_preference_loss", {name: getattr(o, name) for name in names})
    if LOSSES[o.kind].per_token and o.reduction == "sum":
        _warn_of_sum(o.kind)


@backends.constant
def _warn_of_sum(kind: str) -> None:
    if kind not in _warned:
        _warned.add(kind)
        _logger.warning("loss kind %s is defined on mean log-probabilities, but reduction is 'sum'", kind)


def _in_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    names = ("token_weight", "reference_scores", "pair_weight")
    found = {name: getattr(objective, name) for name in names}
    return dataclasses.replace(objective, **{k: v.to(dtype) for k, v in found.items() if v is not None})


def _apply(engine: ModuleType, given: Given, targets: Tensor, objective: Objective, budget: int) -> tuple[Tensor, ...]:
    head, low = given.engine_head(), given.low_rows(given.hidden)
    tensors = (given.hidden, low, head.weight, head.bias, head.up)
    wants = tuple(wants_grad(tensor) for tensor in tensors)
    return _Fused.apply(engine, head.settings, wants, budget, objective, targets, *tensors)


class _Fused(torch.autograd.Function):
    """The gradients are made in the forward, and scaled in the backward by the loss's own upstream gradient."""

    @staticmethod
    def forward(ctx, engine, settings, wants, budget, objective, targets, hidden, low, weight, bias, up):
        head, hidden = streaming.Head(weight, bias, up=up, **settings), hidden.contiguous()
        trained = any(wants[2:])
        chunks = plan(objective, hidden.shape[0], engine.row_bytes(head) if trained else 0, budget)
        # The only chunk of a half-precision head writes each block of dW once, rounded: half the bytes of dW.
        dtypes = [torch.float32] * 2 + [weight.dtype if len(chunks) == 1 else torch.float32] + [torch.float32] * 2
        tensors = (hidden, low, weight, bias, up)
        grads = [
            torch.empty(tensor.shape, dtype=dtype, device=tensor.device) if wanted else None
            for tensor, dtype, wanted in zip(tensors, dtypes, wants, strict=True)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            result = _forward(engine, head, hidden, low, targets, objective, chunks, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        outputs = tuple(getattr(result, f.name) for f in dataclasses.fields(result))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_double_backward("fused_preference_loss")
        scaled = [
            None if g is None else _scale(g, grad).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (None, None, None, None, None, None, *scaled)


def _scale(saved: Tensor, upstream: Tensor) -> Tensor:
    """A plain `loss.backward()` has upstream 1: on the CPU, where looking is free, that saves a [V, H] pass."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return saved
    return saved * upstream


def _forward(
    engine: ModuleType,
    head: streaming.Head,
    hidden: Tensor,  # [N, H]
    low: Tensor | None,  # [N, r]
    targets: Tensor,  # [N]
    objective: Objective,
    chunks: list[Chunk],
    grads: list[Tensor | None],  # of hidden [N, H], low [N, r], weight [V, H], bias [V], up [V, r], to be written
) -> FusedPreferenceOutput:
    of_hidden, of_low, of_weight, of_bias, of_up = grads
    trained = any(grad is not None for grad in grads[2:])
    flat = _buffer(chunks, engine.row_bytes(head) if trained else 0, hidden.device)
    logp = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    result = None
    for number, chunk in enumerate(chunks):
        some, part = chunk.tokens, chunk.objective
        rows, unit_low = hidden[some], None if of_low is None else of_low[some]
        of_rows: dict[str, Any] = {} if low is None else {"low": low[some], "unit_low": unit_low}
        of_head: dict[str, Any] = {} if low is None else {"low": low[some], "grad_up": of_up}
        keep = engine.Kept.over(flat, rows.shape[0], head) if chunk.keep and trained else None
        stats, unit = engine.forward(head, rows, targets[some], unit=of_hidden is not None, keep=keep, **of_rows)
        logp[some] = own = stats.logp()
        result, coef = engine.objective(part, own)
        if of_hidden is not None:
            of_hidden[some] = _times(unit, coef)
        if unit_low is not None:
            unit_low.copy_(_times(unit_low, coef))
        if trained:
            of_head |= {"grad_weight": of_weight, "grad_bias": of_bias}
            engine.weight_grad(head, rows, stats, coef, keep=keep, add=number > 0, **of_head)
    if result is None or len(chunks) > 1:
        result, _ = engine.objective(objective, logp)
    return result


def _times(unit: Tensor, coef: Tensor) -> Tensor:
    """Zero times a non-finite row is still zero: nothing depends on that row."""
    return torch.where(coef[:, None] == 0, 0, unit * coef[:, None])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows whose loss depends on no other rows."""

    tokens: slice
    objective: Objective
    keep: bool  # whether its exponentials fit the budget


def plan(objective: Objective, tokens: int, row_bytes: int, budget: int) -> list[Chunk]:
    """Cut the rows into chunks of whole groups (no pair across a cut) whose exponentials fit `budget` bytes.

    One chunk where everything fits, or where the loss couples all pairs. A group too large alone is a chunk without
    keeping. Reads cu_seqlens and pairs only where there is something to cut.
    """
    fits = tokens * row_bytes <= budget
    if fits or objective.coupled:
        return [Chunk(slice(0, tokens), objective, fits)]
    ends, pairs = objective.cu_seqlens.tolist(), objective.pairs.tolist()
    chunks = []
    for first, last in _merge(_components(len(ends) - 1, pairs), ends, row_bytes, budget):
        here = slice(ends[first], ends[last])
        keep = (here.stop - here.start) * row_bytes <= budget
        chunks.append(Chunk(here, _restrict(objective, pairs, first, last, here), keep))
    return chunks


def _components(responses: int, pairs: list[list[int]]) -> list[tuple[int, int]]:
    """Smallest ranges of responses that no pair leaves."""
    reach = list(range(responses))
    for better, worse in pairs:
        low, high = min(better, worse), max(better, worse)
        reach[low] = max(reach[low], high)
    ranges, first, furthest = [], 0, 0
    for at in range(responses):
        furthest = max(furthest, reach[at])
        if furthest == at:
            ranges.append((first, at + 1))
            first = furthest = at + 1
    return ranges


def _merge(ranges: list[tuple[int, int]], ends: list[int], row_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Neighbouring ranges joined while they fit, and those that do not fit joined with each other: few, large GEMMs.

    Of the ways to make so few, one of chunks about equal in size: the largest decides how much memory is touched, and
    no chunk is left with GEMMs a few rows thin.
    """

    def size(first: int, last: int) -> int:
        return (ends[last] - ends[first]) * row_bytes

    def joined(most: int) -> list[tuple[int, int]]:
        merged: list[tuple[int, int]] = []
        for first, last in ranges:
            alone = merged and size(*merged[-1]) > budget and size(first, last) > budget
            if merged and (size(merged[-1][0], last) <= most or alone):
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        return merged

    fewest = joined(budget)
    for eighths in range(7, 0, -1):
        smaller = joined(budget * eighths // 8)
        if len(smaller) > len(fewest):
            break
        fewest = smaller
    return fewest


def _restrict(o: Objective, pairs: list[list[int]], first: int, last: int, tokens: slice) -> Objective:
    """The objective of responses first .. last alone, divided by the totals of the whole."""
    mine = torch.tensor([p for p, (better, _) in enumerate(pairs) if first <= better < last], dtype=torch.int64)
    mine = mine.to(o.pairs.device)

    def of_pairs(value):
        return value[mine] if isinstance(value, Tensor) and value.dim() else value

    return dataclasses.replace(
        o,
        cu_seqlens=o.cu_seqlens[first : last + 1] - tokens.start,
        pairs=o.pairs[mine] - first,
        token_weight=None if o.token_weight is None else o.token_weight[tokens],
        reference_scores=None if o.reference_scores is None else o.reference_scores[first:last],
        beta=of_pairs(o.beta),
        pair_weight=of_pairs(o.pair_weight),
        num_pairs=max(len(pairs), 1) if o.num_pairs is None else o.num_pairs,
        num_sft_tokens=o.sft_tokens(),
    )


def _buffer(chunks: list[Chunk], row_bytes: int, device: torch.device) -> Tensor:
    """One buffer for the exponentials of the largest kept chunk."""
    rows = max((c.tokens.stop - c.tokens.start for c in chunks if c.keep), default=0)
    return torch.empty(rows * row_bytes, dtype=torch.uint8, device=device)
