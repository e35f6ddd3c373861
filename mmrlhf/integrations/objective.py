"""The loss of a micro-batch as other trainers name it: TRL's loss types and weights, with segment weights and betas.

Values are those of TRL where TRL has the loss: `label_smoothing` acts on the types of SMOOTHED alone, "ipo" and
"sigmoid_norm" go by log-ratios per token, "bco_pair" has no running mean, "sft" is the mean over all chosen tokens,
"aot" sorts the pairs of the micro-batch. A mean over the pairs of the micro-batch.

    pair_scores   token log-probabilities -> the two scores of each pair (LD-DPO's tail weight included)
    f_score       log-ratio -> what an f-divergence puts in its place (f-DPO)
    objective     both sides, the loss types, their weights, WPO's weight a pair -> loss and rewards
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrlhf import ops
from mmrlhf.batch import GroupBatch
from mmrlhf.integrations.rows import PackedRows
from mmrlhf.ops import checks
from mmrlhf.ops.sequence_score import REDUCTIONS

BETA_MODES = ("fixed", "margin")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
SORTED = ("aot", "aot_unpaired")  # optimal transport between the sorted log-ratios of two sides
SMOOTHED = ("robust", "exo_pair", *SORTED)
# Built on the difference of two rewards, where the log Z of an f-divergence cancels.
DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
# Loss type -> (kind of mmrlhf.ops, reduction if the loss prescribes one).
LOSS_TYPES: dict[str, tuple[str | None, str | None]] = {
    "sigmoid": ("sigmoid", None),
    "hinge": ("hinge", None),
    "ipo": ("ipo", "mean"),
    "exo_pair": ("exo_pair", None),
    "nca_pair": ("nca_pair", None),
    "robust": ("robust", None),
    "bco_pair": (None, None),
    "sppo_hard": ("sppo_hard", None),
    "aot": (None, None),
    "aot_unpaired": (None, None),
    "apo_zero": ("apo_zero", None),
    "apo_down": ("apo_down", None),
    "discopop": ("discopop", None),
    "sigmoid_norm": ("sigmoid", "mean"),
    "sft": (None, None),
}


@dataclass(frozen=True)
class LossSettings:
    """Raises ValueError at construction, naming the option."""

    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    beta_mode: str = "fixed"
    beta_w: float = 0.5
    beta_k: float = 0.5
    reduction: str = "sum"
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    ld_alpha: float | None = None  # LD-DPO 2409.06411: weight of tokens beyond the shorter response's length
    f_divergence_type: str = "reverse_kl"  # f-DPO 2309.16240
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False  # WPO 2406.11827: pairs weigh by how likely the policy itself is to write them

    def __post_init__(self) -> None:
        if not self.loss_type:
            raise ValueError(f"loss_type is empty; use one or more of {', '.join(LOSS_TYPES)}")
        for kind in self.loss_type:
            checks.one_of("loss_type", kind, tuple(LOSS_TYPES))
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} loss types")
        checks.positive("beta", self.beta)
        checks.one_of("beta_mode", self.beta_mode, BETA_MODES)
        checks.not_negative("beta_w", self.beta_w)
        checks.positive("beta_k", self.beta_k)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.positive("discopop_tau", self.discopop_tau)
        checks.one_of("f_divergence_type", self.f_divergence_type, F_DIVERGENCES)
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError(f"f_alpha_divergence_coef must be finite, got {self.f_alpha_divergence_coef}")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be None or in [0, 1], got {self.ld_alpha}")
        self._check_smoothing()
        self._check_combinations()

    def _check_smoothing(self) -> None:
        checks.not_negative("label_smoothing", self.label_smoothing)
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but none of {', '.join(self.loss_type)} has one; use "
                f"{' or '.join(SMOOTHED)}, or set it to 0"
            )
        if self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("loss_type 'exo_pair' needs label_smoothing above 0 (1e-3 is usual)")

    def _check_combinations(self) -> None:
        others = sorted(set(self.loss_type) - set(DIFFERENCES))
        if self.f_divergence_type != "reverse_kl" and others:
            raise ValueError(
                f"f_divergence_type {self.f_divergence_type!r} has no meaning for {', '.join(others)}, whose rewards "
                f"are not subtracted; use reverse_kl, or {', '.join(DIFFERENCES)}"
            )
        mixed = [kind for kind in self.loss_type if kind in SORTED]
        if mixed and self.beta_mode == "margin":
            raise ValueError(
                f"loss_type {mixed[0]!r} sorts the pairs, so that none keeps its beta; beta_mode must be 'fixed'"
            )
        if mixed and self.use_weighting:
            raise ValueError(
                f"loss_type {mixed[0]!r} sorts the pairs, so that none keeps a weight; use_weighting must be False"
            )


@dataclass(frozen=True)
class Result:
    """`loss` carries a gradient to the log-probabilities; the rest is detached."""

    loss: Tensor  # []
    chosen_rewards: Tensor  # [P], beta * log-ratio
    rejected_rewards: Tensor  # [P]
    chosen_logps: Tensor  # [P], sums without segment weights
    rejected_logps: Tensor  # [P]
    beta: Tensor  # [P]


def objective(
    logp: Tensor,  # [N]
    packed: PackedRows,
    kept: Tensor,  # [N], the reference's
    settings: LossSettings,
    *,
    num_pairs: float | Tensor | None = None,
    log_sum_sq: Tensor | None = None,  # [N], log of the sum of squared probabilities; for use_weighting
) -> Result:
    """The loss of a micro-batch: each type's mean over the pairs, weighted and added up.

    With `num_pairs`, the pairs of a whole optimiser step, it is this micro-batch's share of the step's mean. Raises
    ValueError naming the row where beta_mode is "margin" and a pair has none.
    """
    batch = packed.batch
    beta = _beta(packed, settings)
    ours, theirs = (
        pair_scores(values, batch, batch.token_weight, reduction=settings.reduction, ld_alpha=settings.ld_alpha)
        for values in (logp, kept)
    )
    pair_weight = _wpo_weight(logp, batch, log_sum_sq) if settings.use_weighting else None
    weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    total = logp.new_zeros(())
    for kind, weight in zip(settings.loss_type, weights, strict=True):
        total = total + weight * _term(kind, logp, batch, ours, theirs, beta, pair_weight, settings)
    if num_pairs is not None:
        total = total * (batch.pairs.shape[0] / num_pairs)
    with torch.no_grad():
        rewards = beta * (ours - theirs)
        betas = torch.as_tensor(beta, dtype=torch.float32, device=logp.device).expand(rewards.shape[1:])
        logps = pair_scores(logp, batch, None, reduction="sum", ld_alpha=settings.ld_alpha)
    return Result(total, rewards[0], rewards[1], logps[0], logps[1], betas)


def _beta(packed: PackedRows, settings: LossSettings) -> float | Tensor:
    if settings.beta_mode == "fixed":
        return settings.beta
    if packed.without_margin is not None:
        raise ValueError(
            f"{packed.without_margin}: beta_mode is 'margin', but its pair has no margin; give the row a margin, or "
            "its responses scores, or set beta_mode to 'fixed'"
        )
    assert packed.batch.margin is not None
    return ops.dynamic_beta(packed.batch.margin, beta=settings.beta, w=settings.beta_w, k=settings.beta_k)


def pair_scores(
    logp: Tensor,  # [N]
    batch: GroupBatch,
    token_weight: Tensor | None,  # [N]
    *,
    reduction: str,
    ld_alpha: float | None = None,
) -> Tensor:
    """Scores of each pair's better and worse response, [2, P].

    With `ld_alpha`, tokens beyond the length of the pair's shorter response weigh that much (LD-DPO); a mean is over
    the weights without it, as in TRL. A response of three is then scored once for each of its pairs.
    """
    if ld_alpha is None:
        scores = ops.sequence_score(logp, batch.cu_seqlens, token_weight=token_weight, reduction=reduction)
        return scores[batch.pairs.T]
    # Sums up to a token, so that a part of a response is a difference of two; in float64, for what cancels.
    weighted = (logp if token_weight is None else logp * token_weight).double()
    upto = F.pad(weighted.cumsum(0), (1, 0))  # [N + 1]
    start, end = batch.cu_seqlens[:-1][batch.pairs.T].long(), batch.cu_seqlens[1:][batch.pairs.T].long()  # [2, P]
    middle = start + (end - start).amin(0)
    scores = upto[middle] - upto[start] + ld_alpha * (upto[end] - upto[middle])
    if reduction == "mean":
        scores = scores / _weights(batch, token_weight).clamp(min=torch.finfo(torch.float32).tiny)
    return scores.to(logp.dtype)


def _weights(batch: GroupBatch, token_weight: Tensor | None) -> Tensor:
    """Sum of the token weights of each pair's responses, [2, P]."""
    if token_weight is None:
        return batch.cu_seqlens.diff()[batch.pairs.T].float()
    return ops.sequence_score(token_weight.float(), batch.cu_seqlens)[batch.pairs.T]


def f_score(ratio: Tensor, settings: LossSettings) -> Tensor:
    """f'(exp(ratio)) of an f-divergence, what takes the place of the log-ratio; the log-ratio itself for reverse KL."""
    kind, order = settings.f_divergence_type, settings.f_alpha_divergence_coef - 1.0
    if kind == "forward_kl":
        return 1 - torch.exp((-ratio).clamp(max=80.0))  # exp(89) is infinite in float32
    if kind == "js_divergence":
        return math.log(2) + F.logsigmoid(ratio)
    if kind == "alpha_divergence" and abs(order) >= 1e-6:  # its limit is reverse KL
        return torch.expm1((order * ratio).clamp(max=80.0)) / order
    return ratio


def _wpo_weight(
    logp: Tensor,  # [N]
    batch: GroupBatch,
    log_sum_sq: Tensor | None,  # [N]
) -> Tensor:
    """Weight of each pair, [P]: mean probability a token of both sides, against that of the policy's own samples."""
    if log_sum_sq is None:
        raise ValueError("use_weighting needs the log_sum_sq of the policy's forward; see forward.add_forward")
    aligned = ops.sequence_score(logp.detach() - log_sum_sq, batch.cu_seqlens, reduction="mean")
    return aligned[batch.pairs].exp().prod(1)


def _term(
    kind: str,
    logp: Tensor,  # [N]
    batch: GroupBatch,
    ours: Tensor,  # [2, P]
    theirs: Tensor,  # [2, P]
    beta: float | Tensor,
    pair_weight: Tensor | None,  # [P]
    settings: LossSettings,
) -> Tensor:
    """Mean over the pairs of their weighted losses of one type."""
    better = batch.pairs[:, 0]
    if kind == "sft":
        nll = -ops.sequence_score(logp, batch.cu_seqlens)[better].sum()
        return _mean((nll / batch.cu_seqlens.diff()[better].sum().clamp(min=1)).expand(better.shape), pair_weight)
    if kind in SORTED:
        # Both sides of the difference sorted: policy against reference, or chosen against rejected log-ratios.
        left, right = ((side[0] - side[1]) for side in (ours, theirs)) if kind == "aot" else ours - theirs
        x, eps = beta * (left.sort()[0] - right.sort()[0]), settings.label_smoothing
        return _mean(-(1 - eps) * F.logsigmoid(x) - eps * F.logsigmoid(-x), pair_weight)
    name, prescribed = LOSS_TYPES[kind]
    ratio = f_score(ours - theirs, settings)
    if prescribed == "mean" and settings.reduction == "sum":
        ratio = ratio / _weights(batch, batch.token_weight).clamp(min=torch.finfo(torch.float32).tiny)
    if name is None:
        return _mean(-F.logsigmoid(beta * ratio[0]) - F.logsigmoid(-beta * ratio[1]), pair_weight)
    count = better.numel()
    first = torch.arange(count, device=ratio.device)
    return ops.preference_loss(
        ratio.flatten(),
        torch.zeros_like(ratio.flatten()),
        torch.stack((first, first + count), 1),
        beta=beta,
        kind=name,
        label_smoothing=settings.label_smoothing if kind in SMOOTHED else 0.0,
        discopop_tau=settings.discopop_tau,
        pair_weight=pair_weight,
    ).loss


def _mean(losses: Tensor, pair_weight: Tensor | None) -> Tensor:
    return (losses if pair_weight is None else losses * pair_weight).mean()
