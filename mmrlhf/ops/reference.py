"""The definition of correct: every op and every loss kind in plain PyTorch, differentiated by autograd.

Exact in float64, and the baseline in float32 (half precisions are raised to float32 first). It makes the whole [N, V]
matrix of logits, so it is for tests, for reading and for small heads. What comes after the log-probabilities are
short vectors, for which the fast path runs this code, and the one table of `loss_kinds`: a loss is written once.

    token log-probabilities [N] --sequence_score--> scores [R] --preference_loss--> losses [P] --> loss
    `Objective` is that chain with its settings; `fused_preference_loss` is `linear_logp` followed by it.

Not covered: checks of the arguments (the public functions do them), and speed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mmrlhf.ops.adapter import Adapters, several
from mmrlhf.ops.loss_kinds import LOSSES, LossOptions
from mmrlhf.ops.sharded import VocabShard

Beta = float | Tensor | Callable[[Tensor, Tensor | None], "float | Tensor"]
Op = TypeVar("Op", bound=Callable)


def _without_autocast(op: Op) -> Op:
    """Autocast has cast the operands by now; left on, it would lower what is raised to float32 here once more."""

    @functools.wraps(op)
    def run(hidden, *args, **options):
        with torch.autocast(hidden.device.type, enabled=False):
            return op(hidden, *args, **options)

    return run  # type: ignore[return-value]


@_without_autocast
def linear_logp(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: Adapters = None,
    shard: VocabShard | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each target, [...] in nats: z_y - logsumexp(z), 0 where the target is `ignore_index`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    keep = targets != ignore_index
    hidden = torch.where(keep[..., None], hidden.to(dtype), 0)  # a non-finite ignored row gives no NaN gradient

    def whole(rows: Tensor) -> Tensor:
        return rows.to(dtype) if shard is None else shard.gather(rows.to(dtype))

    logits = hidden @ whole(weight).T
    for each in several(adapter):
        logits = logits + each.scale * (hidden @ each.a.to(dtype).T) @ whole(each.b).T
    logits = logits * logit_scale
    if bias is not None:
        logits = logits + whole(bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    index = torch.where(keep, targets, 0).long()[..., None]
    return torch.where(keep, logits.log_softmax(-1).gather(-1, index)[..., 0], 0)


def sequence_score(
    logp: Tensor,  # [N]
    cu_seqlens: Tensor,  # [R + 1]
    *,
    token_weight: Tensor | None = None,  # [N]
    reduction: str = "sum",
) -> Tensor:
    """Score of each response, [R] (DDPO Eq. 5). Sums run in float64, so their order cannot be seen in float32."""
    if token_weight is None:
        token_weight = torch.ones_like(logp)
    response = torch.searchsorted(
        cu_seqlens[1:].contiguous(), torch.arange(logp.numel(), device=logp.device), right=True
    )
    zeros = torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=logp.device)
    weighted = torch.where(token_weight == 0, 0, token_weight.double() * logp.double())
    score = zeros.index_put((response,), weighted, accumulate=True)
    if reduction == "mean":
        total = zeros.index_put((response,), token_weight.double(), accumulate=True)
        score = score / torch.where(total == 0, 1, total)
    return score.to(logp.dtype)


def dynamic_beta(margin: Tensor, *, beta: float = 0.1, w: float = 0.5, k: float = 0.5) -> Tensor:
    """beta * (1 + w * (1 - exp(-k * margin))), held in [beta, (1 + w) * beta]; a NaN margin gives beta. [P]"""
    known = torch.where(margin.isnan(), 0, margin).clamp(min=0)
    return beta * (1 - w * torch.expm1(-k * known))


def implicit_beta(
    log_ratio_margin: Tensor,  # [P]
    *,
    beta: float = 0.1,
    w: float = 0.5,
    keep: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One batch-level beta from the implicit reward, []: see `mmrlhf.ops.implicit_beta`."""
    count = int(log_ratio_margin.numel() * keep)
    if count == 0:
        return torch.full((), beta, dtype=log_ratio_margin.dtype, device=log_ratio_margin.device)
    mean, spread = log_ratio_margin.mean(), log_ratio_margin.std()
    density = torch.exp(-0.5 * ((log_ratio_margin - mean) / (spread + 1e-7)) ** 2)
    # The released code draws without replacement by density; the floor keeps that possible for far outliers. A margin
    # that is not finite may be drawn, and makes beta and with it the loss NaN, which is for the loop to skip.
    density = torch.where(density.isfinite(), density.clamp(min=1e-30), 1)
    kept = torch.multinomial(density, count, replacement=False, generator=generator)
    return (beta * (1 + w * (log_ratio_margin[kept].mean() - mean))).clamp(min=1e-3)


@dataclass(frozen=True)
class PreferenceOutput:
    """`loss` carries the gradient; rewards, margins and accuracy are detached. All in the dtype of the scores."""

    loss: Tensor  # [], sum of losses * pair_weight / num_pairs
    losses: Tensor  # [P]
    rewards: Tensor  # [R], beta * (score - reference score); with a beta a pair, the mean of the response's pairs
    margins: Tensor  # [P], beta * (log-ratio of better - log-ratio of worse)
    accuracy: Tensor  # [], share of the pairs whose margin is above 0; 0 without pairs


@dataclass(frozen=True)
class FusedPreferenceOutput:
    """Only `loss` carries a gradient, on every backend."""

    loss: Tensor  # [], preference loss + sft_weight * sft_loss
    losses: Tensor  # [P]
    scores: Tensor  # [R]
    rewards: Tensor  # [R]
    margins: Tensor  # [P]
    accuracy: Tensor  # []
    logp: Tensor  # [N], nats
    sft_loss: Tensor  # [], nats a token
    beta: Tensor  # [P]


def preference_loss(
    scores: Tensor,  # [R]
    reference_scores: Tensor | None,  # [R]
    pairs: Tensor,  # [P, 2]
    *,
    beta: float | Tensor = 0.1,  # or [P]
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,  # [P]
    gamma_beta_ratio: float = 0.5,
    discopop_tau: float = 0.05,
    num_pairs: float | Tensor | None = None,
) -> PreferenceOutput:
    """Scores to loss through `LOSSES[kind]`; see `mmrlhf.ops.preference_loss`."""
    ratio = scores if reference_scores is None else scores - reference_scores
    beta = beta.to(scores.dtype) if isinstance(beta, Tensor) else beta
    better, worse = pairs[:, 0].long(), pairs[:, 1].long()
    losses = LOSSES[kind].term(
        ratio[better], ratio[worse], beta, LossOptions(label_smoothing, gamma_beta_ratio, discopop_tau)
    )
    weighted = losses if pair_weight is None else losses * pair_weight
    count = max(pairs.shape[0], 1) if num_pairs is None else _number(num_pairs)
    with torch.no_grad():
        margins = beta * (ratio[better] - ratio[worse])
        rewards = _response_beta(beta, pairs, ratio) * ratio
        accuracy = (margins > 0).to(scores.dtype).sum() / max(pairs.shape[0], 1)
    return PreferenceOutput((weighted.sum() / count).to(scores.dtype), losses, rewards, margins, accuracy)


def _number(total: float | Tensor) -> float | Tensor:
    """A total that comes as a tensor of one number, of whatever shape, as a scalar: what it divides keeps its shape."""
    return total.reshape(()) if isinstance(total, Tensor) else total


def _response_beta(beta: float | Tensor, pairs: Tensor, ratio: Tensor) -> float | Tensor:
    """The beta of a response's reward: its pairs' mean, and all pairs' mean where it is in none. [R]"""
    if not isinstance(beta, Tensor) or beta.dim() == 0 or beta.numel() == 0:
        return beta if not isinstance(beta, Tensor) or beta.numel() else 0.0
    zeros, member = torch.zeros_like(ratio), (pairs.flatten().long(),)
    each = beta[:, None].expand(-1, 2).flatten()
    total = zeros.index_put(member, each, accumulate=True)
    count = zeros.index_put(member, torch.ones_like(each), accumulate=True)
    return torch.where(count > 0, total / count.clamp(min=1), beta.mean())


@dataclass(frozen=True, eq=False)  # tensors have no equality; and torch 2.10 hashes what it calls in traced code
class Objective:
    """From token log-probabilities [N] to the loss: the settings of `fused_preference_loss` after the head."""

    cu_seqlens: Tensor  # [R + 1]
    pairs: Tensor  # [P, 2]
    token_weight: Tensor | None = None  # [N]
    reduction: str = "sum"
    reference_scores: Tensor | None = None  # [R]
    beta: Beta = 0.1
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.5
    discopop_tau: float = 0.05
    pair_weight: Tensor | None = None  # [P]
    sft_weight: float = 0.0
    num_pairs: float | Tensor | None = None
    num_sft_tokens: float | Tensor | None = None

    @property
    def coupled(self) -> bool:
        """Whether every score must be known before the gradient of any pair."""
        return LOSSES[self.kind].coupled or callable(self.beta)

    def times_better(self) -> Tensor:
        """In how many pairs each response is the better one, [R]."""
        zeros = torch.zeros(self.cu_seqlens.numel() - 1, dtype=torch.float64, device=self.pairs.device)
        better = self.pairs[:, 0].long()
        return zeros.index_put((better,), torch.ones_like(better, dtype=torch.float64), accumulate=True)

    def sft_tokens(self) -> float | Tensor:
        """What the sft term is divided by: `num_sft_tokens`, or the better responses' tokens, counted once a pair."""
        if self.num_sft_tokens is not None:
            return _number(self.num_sft_tokens)
        return (self.times_better() * self.cu_seqlens.diff()).sum().clamp(min=1)

    def __call__(self, logp: Tensor) -> FusedPreferenceOutput:
        scores = sequence_score(logp, self.cu_seqlens, token_weight=self.token_weight, reduction=self.reduction)
        beta = self.beta
        if callable(beta):
            with torch.no_grad():
                beta = beta(scores.detach(), self.reference_scores)
        out = preference_loss(
            scores,
            self.reference_scores,
            self.pairs,
            beta=beta,
            kind=self.kind,
            label_smoothing=self.label_smoothing,
            pair_weight=self.pair_weight,
            gamma_beta_ratio=self.gamma_beta_ratio,
            discopop_tau=self.discopop_tau,
            num_pairs=self.num_pairs,
        )
        nll = sequence_score(-logp, self.cu_seqlens).double()  # [R], every token weighs 1
        sft_loss = ((nll * self.times_better()).sum() / self.sft_tokens()).to(logp.dtype)
        loss = out.loss + self.sft_weight * sft_loss if self.sft_weight else out.loss
        betas = torch.as_tensor(beta, dtype=logp.dtype, device=logp.device).detach().expand(self.pairs.shape[0])
        return FusedPreferenceOutput(
            loss=loss,
            losses=out.losses.detach(),
            scores=scores.detach(),
            rewards=out.rewards,
            margins=out.margins,
            accuracy=out.accuracy,
            logp=logp.detach(),
            sft_loss=sft_loss.detach(),
            beta=betas.clone(),
        )


def fused_preference_loss(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    cu_seqlens: Tensor,  # [R + 1]
    pairs: Tensor,  # [P, 2]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: Adapters = None,
    shard: VocabShard | None = None,
    **settings,
) -> FusedPreferenceOutput:
    """`linear_logp`, then `Objective(cu_seqlens, pairs, **settings)`."""
    logp = linear_logp(
        hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, adapter=adapter, shard=shard
    )
    known = {f.name for f in dataclasses.fields(Objective)}
    unknown = set(settings) - known
    if unknown:
        raise TypeError(f"unknown settings {sorted(unknown)}; known: {sorted(known)}")
    return Objective(cu_seqlens, pairs, **settings)(logp)


@dataclass(frozen=True)
class TokenStatistics:
    """What a row's distribution p over the vocabulary is like; each [...] float32 (float64 from float64)."""

    entropy: Tensor  # -sum p log p, nats
    sum_p2: Tensor  # sum of squared probabilities: 1 for a sure row, 1 / V for a uniform one
    mean_logit: Tensor  # mean of z over the vocabulary
    logp: Tensor | None = None  # log-probability of the target, nats; this and the next None without targets
    is_top1: Tensor | None = None  # bool: no token has a larger logit than the target, so a tie counts


@torch.no_grad()
@_without_autocast
def token_statistics(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor | None = None,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenStatistics:
    """See `mmrlhf.ops.token_statistics`."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T * logit_scale
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    whole = (-torch.where(p > 0, p * logp, 0 * p).sum(-1), (p * p).sum(-1), logits.mean(-1))
    if targets is None:
        return TokenStatistics(*whole)
    counts = targets != ignore_index
    index = torch.where(counts, targets, 0).long()[..., None]
    top1 = counts & (logits.gather(-1, index)[..., 0] >= logits.amax(-1))
    own = logp.gather(-1, index)[..., 0]
    entropy, sum_p2, mean_logit, own = (torch.where(counts, each, 0) for each in (*whole, own))
    return TokenStatistics(entropy, sum_p2, mean_logit, own, top1)
