"""Losses with the signatures of two libraries people already call, on mmrlhf's ops.

    FusedLinearDPOLoss     liger_kernel.chunked_loss.LigerFusedLinearDPOLoss: same constructor, forward and result
    linear_cross_entropy   cut_cross_entropy.linear_cross_entropy: same arguments, negative log-likelihoods

What differs is said at each: ignored positions never meet the vocabulary, a frozen head costs no weight gradient, an
all-ignored row scores 0 instead of NaN, and what the other library drops in silence raises. Neither library is needed.
Not covered: a weight sharded over devices, float64, double backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrlhf.ops import checks, fused_preference_loss, linear_logp, sequence_score

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)
SMOOTHED = ("exo_pair", "robust")


class FusedLinearDPOLoss(nn.Module):
    """Takes the place of `LigerFusedLinearDPOLoss`, argument by argument.

    `compiled` and `chunk_size` are accepted and change nothing: there is nothing to compile, and memory is bounded in
    bytes (`mmrlhf.ops.fused_preference_loss`). `loss_type` may also be "ipo", on log-ratios per token. ValueError for
    every value out of range, and for `label_smoothing` with a loss type that has none (Liger drops it without a word).
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        checks.positive("beta", beta)
        checks.not_negative("alpha", alpha)
        checks.positive("chunk_size", chunk_size)
        checks.positive("discopop_tau", discopop_tau)
        checks.one_of("loss_type", loss_type, LOSS_TYPES)
        _check_smoothing(loss_type, label_smoothing)
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.compiled, self.chunk_size = compute_nll_loss, compiled, chunk_size
        self.use_ref_model, self.average_log_prob = use_ref_model, average_log_prob
        self.loss_type, self.label_smoothing, self.discopop_tau = loss_type, label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,  # [V, H]
        _input: Tensor,  # [2B, T, H], chosen rows first
        target: Tensor,  # [2B, T], already shifted
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (chosen logps [B], rejected logps [B], chosen logits mean, rejected logits mean, NLL, chosen rewards
        [B], rejected rewards [B])); nats, float32, and only `loss` carries a gradient, to _input, lin_weight and bias.

        The logits' means are over all positions, as in Liger, and cost one pass over the weight, not [2B, T, V].
        """
        self._check(_input, target, ref_input, ref_weight)
        rows = target.shape[0]
        keep = (target != self.ignore_index).flatten()
        index = keep.nonzero()[:, 0]  # one wait for the device; the rows left out are what is saved
        hidden, targets = _input.flatten(0, 1)[index], target.flatten()[index]
        lengths = (target != self.ignore_index).sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))  # [2B + 1]
        first = torch.arange(rows // 2, device=target.device)
        pairs = torch.stack((first, first + rows // 2), 1)  # [B, 2]
        reduction = "mean" if self.average_log_prob else "sum"
        kept = None  # [N]
        if self.use_ref_model:
            assert ref_input is not None
            assert ref_weight is not None
            with torch.no_grad():
                kept = linear_logp(ref_input.flatten(0, 1)[index], ref_weight, targets, bias=ref_bias)
        loss, logp, nll = self._loss(hidden, lin_weight, targets, bias, cu_seqlens, pairs, kept)
        score = sequence_score(logp, cu_seqlens, reduction=reduction)
        ratio = score if kept is None else score - sequence_score(kept, cu_seqlens, reduction=reduction)
        rewards = self.beta * ratio
        half = rows // 2
        means = [_mean_logit(part, lin_weight, bias) for part in (_input[:half], _input[half:])]
        return loss, (score[:half], score[half:], *means, nll, rewards[:half], rewards[half:])

    def _loss(self, hidden, weight, targets, bias, cu_seqlens, pairs, kept) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, logp [N] detached, NLL a token of the chosen rows)."""
        reduction = "mean" if self.average_log_prob or self.loss_type == "ipo" else "sum"
        reference = None if kept is None else sequence_score(kept, cu_seqlens, reduction=reduction)
        sft_weight = self.alpha if self.compute_nll_loss else 0.0
        if self.loss_type != "bco_pair":
            out = fused_preference_loss(
                hidden,
                weight,
                targets,
                cu_seqlens,
                pairs,
                reduction=reduction,
                # Kinds with a reference compare with 0 where there is no reference model.
                reference_scores=torch.zeros_like(cu_seqlens[1:], dtype=torch.float32) if kept is None else reference,
                beta=self.beta,
                kind=self.loss_type,
                label_smoothing=self.label_smoothing,
                discopop_tau=self.discopop_tau,
                sft_weight=sft_weight,
                bias=bias,
            )
            return out.loss, out.logp, self._nll(out.sft_loss)
        # Liger's bco_pair has no running mean delta, which the kind of that name in mmrlhf.ops has.
        logp = linear_logp(hidden, weight, targets, bias=bias)
        score = sequence_score(logp, cu_seqlens, reduction=reduction)
        reward = self.beta * (score if reference is None else score - reference)
        losses = -F.logsigmoid(reward[pairs[:, 0]]) - F.logsigmoid(-reward[pairs[:, 1]])
        chosen = cu_seqlens[pairs.shape[0]]
        nll = -sequence_score(logp, cu_seqlens)[pairs[:, 0]].sum() / chosen.clamp(min=1)
        loss = losses.sum() / max(pairs.shape[0], 1) + sft_weight * nll
        return loss, logp.detach(), self._nll(nll.detach())

    def _nll(self, nll: Tensor) -> Tensor:
        return nll if self.compute_nll_loss else torch.zeros_like(nll)

    def _check(self, _input, target, ref_input, ref_weight) -> None:
        if _input.dim() != 3 or _input.shape[0] % 2:
            raise ValueError(f"_input must have shape [2B, T, H], chosen rows first, got {list(_input.shape)}")
        checks.shape("target", target, tuple(_input.shape[:2]), "one token a position of _input")
        if self.use_ref_model and (ref_input is None or ref_weight is None):
            raise ValueError("use_ref_model is True, so ref_input and ref_weight are needed; or set it to False")
        if not self.use_ref_model and ref_input is not None:
            raise ValueError("ref_input is given, but use_ref_model is False and would leave it out")
        if ref_input is not None and ref_input.shape[:2] != _input.shape[:2]:
            raise ValueError(
                f"ref_input must have shape [2B, T, H'] with [2B, T] = {list(_input.shape[:2])}, "
                f"got {list(ref_input.shape)}"
            )


def _check_smoothing(loss_type: str, value: float) -> None:
    checks.not_negative("label_smoothing", value)
    if value and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing is {value}, but loss_type {loss_type!r} has none; use {' or '.join(SMOOTHED)}"
        )
    if loss_type == "exo_pair" and not value:
        raise ValueError(f"label_smoothing must be above 0 for loss_type 'exo_pair' (try 1e-3), got {value}")
    if value >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5) for loss_type {loss_type!r}, got {value}")


@torch.no_grad()
def _mean_logit(
    hidden: Tensor,  # [B, T, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
) -> Tensor:
    """Mean of all logits: the sum of rows times the sum of columns. 0 without positions."""
    total = hidden.sum((0, 1), dtype=torch.float32) @ weight.sum(0, dtype=torch.float32)
    mean = total / max(hidden.shape[0] * hidden.shape[1] * weight.shape[0], 1)
    return mean if bias is None or not hidden.numel() else mean + bias.float().mean()


def linear_cross_entropy(
    e: Tensor,  # [..., H]
    c: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = "cce",
    vocab_parallel_options: Any = None,
) -> Tensor:
    """Negative log-likelihood of `targets` under softmax(e cᵀ + bias), float32 nats, never [N, V].

    The signature of Cut Cross-Entropy. reduction "none" gives the shape of `targets`, 0 where ignored (with `shift` s,
    position t holds the loss of target t under row t - s, and the first s are 0); "sum"; "mean" over the targets that
    count, 0 if none does. The filter and accumulation options and `impl` are accepted and change nothing: no
    gradient is filtered, and sums are float32. `return_lse` and `vocab_parallel_options` raise ValueError.
    """
    checks.one_of("reduction", reduction, ("none", "sum", "mean"))
    if return_lse:
        raise ValueError("return_lse is not supported: linear_cross_entropy keeps no log-sum-exp; set it to False")
    if vocab_parallel_options is not None:
        raise ValueError("vocab_parallel_options is not supported: give linear_cross_entropy the whole weight c")
    steps = int(shift)
    if steps < 0 or (steps and targets.shape[-1] < steps):
        raise ValueError(f"shift must be between 0 and the {targets.shape[-1]} targets of a row, got {shift}")
    shifted = targets[..., steps:]
    hidden = e[..., : e.shape[-2] - steps, :] if steps else e
    nll = -linear_logp(hidden, c, shifted, bias=bias, softcap=softcap, ignore_index=ignore_index)
    if reduction == "none":
        return F.pad(nll, (steps, 0)) if steps else nll
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / (shifted != ignore_index).sum().clamp(min=1)
