"""The loss of a micro-batch as other trainers name it: TRL's loss types and weights, with segment weights and betas.

Values are those of TRL where TRL has the loss: `label_smoothing` acts on "robust" and "exo_pair" alone, "ipo" and
"sigmoid_norm" go by log-ratios per token, "bco_pair" has no running mean, "sft" is the mean over all chosen tokens.
A mean over the pairs of the micro-batch. Not covered: losses that sort a batch (aot), f-divergences.
"""

from __future__ import annotations

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
SMOOTHED = ("robust", "exo_pair")
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
    "apo_zero": ("apo_zero", None),
    "apo_down": ("apo_down", None),
    "discopop": ("discopop", None),
    "sigmoid_norm": ("sigmoid", "mean"),
    "sft": (None, None),
}
_WHY_NOT = {
    "aot": "it sorts the batch's scores, which mixes prompts",
    "aot_unpaired": "it sorts the batch's scores, which mixes prompts",
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

    def __post_init__(self) -> None:
        for kind in self.loss_type:
            if kind not in LOSS_TYPES:
                why = f" ({_WHY_NOT[kind]})" if kind in _WHY_NOT else ""
                raise ValueError(f"loss_type {kind!r} is not supported{why}; use one of {', '.join(LOSS_TYPES)}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} loss types")
        checks.positive("beta", self.beta)
        checks.one_of("beta_mode", self.beta_mode, BETA_MODES)
        checks.not_negative("beta_w", self.beta_w)
        checks.positive("beta_k", self.beta_k)
        checks.one_of("reduction", self.reduction, REDUCTIONS)
        checks.positive("discopop_tau", self.discopop_tau)
        checks.not_negative("label_smoothing", self.label_smoothing)
        if self.label_smoothing and not set(self.loss_type) & set(SMOOTHED):
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, but none of {', '.join(self.loss_type)} has one; use "
                f"{' or '.join(SMOOTHED)}, or set it to 0"
            )
        if "exo_pair" in self.loss_type and not 0 < self.label_smoothing < 1:
            raise ValueError("loss_type 'exo_pair' needs label_smoothing above 0 and below 1 (1e-3 is usual)")
        if "robust" in self.loss_type and self.label_smoothing >= 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5) for 'robust', got {self.label_smoothing}")


@dataclass(frozen=True)
class Result:
    """`loss` carries a gradient to the log-probabilities; the rest is detached."""

    loss: Tensor  # []
    chosen_rewards: Tensor  # [P], beta * log-ratio
    rejected_rewards: Tensor  # [P]
    beta: Tensor  # [P]


def objective(
    logp: Tensor,  # [N]
    packed: PackedRows,
    kept: Tensor,  # [N], the reference's
    settings: LossSettings,
    *,
    num_pairs: float | Tensor | None = None,
) -> Result:
    """The loss of a micro-batch: each type's mean over the pairs, weighted and added up.

    With `num_pairs`, the pairs of a whole optimiser step, it is this micro-batch's share of the step's mean. Raises
    ValueError naming the row where beta_mode is "margin" and a pair has none.
    """
    batch = packed.batch
    better, worse = batch.pairs[:, 0], batch.pairs[:, 1]
    beta = _beta(packed, settings)
    weights = settings.loss_weights or (1.0,) * len(settings.loss_type)
    total = logp.new_zeros(())
    for kind, weight in zip(settings.loss_type, weights, strict=True):
        total = total + weight * _term(kind, logp, batch, kept, beta, settings)
    if num_pairs is not None:
        total = total * (better.numel() / num_pairs)
    with torch.no_grad():
        ratio = _ratio(logp, batch, kept, settings.reduction)
        rewards = beta * ratio[better], beta * ratio[worse]
        betas = torch.as_tensor(beta, dtype=torch.float32, device=logp.device).expand(better.shape)
    return Result(total, *rewards, betas)


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


def _ratio(logp: Tensor, batch: GroupBatch, kept: Tensor, reduction: str) -> Tensor:
    """Log-ratio of each response, [R]."""
    ours, reference = (
        ops.sequence_score(values, batch.cu_seqlens, token_weight=batch.token_weight, reduction=reduction)
        for values in (logp, kept)
    )
    return ours - reference


def _term(
    kind: str, logp: Tensor, batch: GroupBatch, kept: Tensor, beta: float | Tensor, settings: LossSettings
) -> Tensor:
    better, worse = batch.pairs[:, 0], batch.pairs[:, 1]
    if kind == "sft":
        nll = -ops.sequence_score(logp, batch.cu_seqlens)[better].sum()
        return nll / batch.cu_seqlens.diff()[better].sum().clamp(min=1)
    name, prescribed = LOSS_TYPES[kind]
    ratio = _ratio(logp, batch, kept, prescribed or settings.reduction)
    if name is None:
        losses = -F.logsigmoid(beta * ratio[better]) - F.logsigmoid(-beta * ratio[worse])
        return losses.mean()
    return ops.preference_loss(
        ratio,
        torch.zeros_like(ratio),
        batch.pairs,
        beta=beta,
        kind=name,
        label_smoothing=settings.label_smoothing if kind in SMOOTHED else 0.0,
        discopop_tau=settings.discopop_tau,
    ).loss
