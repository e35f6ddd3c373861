"""Launcher of `preference`: token log-probabilities to the loss and its derivative for every token, in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.kernels.triton import configs
from mmrlhf.kernels.triton import preference as preference_device
from mmrlhf.kernels.triton.launch import on_device


@dataclass(frozen=True)
class Buffers:
    """What the kernel writes: float32, and a float64 scratch."""

    scores: Tensor  # [R]
    rewards: Tensor  # [R]
    d_score: Tensor  # [R], d loss / d score, without the sft term
    losses: Tensor  # [P]
    margins: Tensor  # [P]
    beta: Tensor  # [P]
    coef: Tensor  # [N], d loss / d logp, with the sft term
    loss: Tensor  # [] each: apart, for a view could not be changed in place where autograd is involved
    accuracy: Tensor
    sft_loss: Tensor
    scratch: Tensor  # [3 R + 2 P]

    @classmethod
    def empty(cls, responses: int, pairs: int, tokens: int, device: torch.device) -> Buffers:
        def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            scores=of(responses),
            rewards=of(responses),
            d_score=of(responses),
            losses=of(pairs),
            margins=of(pairs),
            beta=of(pairs),
            coef=of(tokens),
            loss=of(),
            accuracy=of(),
            sft_loss=of(),
            scratch=of(3 * responses + 2 * pairs, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Terms:
    """The settings of `fused_preference_loss` after the head, as the kernel takes them; `Objective` without callables.

    With `margin` [P], beta is scaled a pair by Dynamic Reward Scaling with `w` and `k`.
    """

    reduction: str = "sum"
    beta: float | Tensor = 0.1  # or [P], or []
    kind: str = "sigmoid"
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.5
    discopop_tau: float = 0.05
    margin: Tensor | None = None  # [P]
    w: float = 0.5
    k: float = 0.5
    pair_weight: Tensor | None = None  # [P]
    num_pairs: float | Tensor | None = None
    sft_weight: float = 0.0
    num_sft_tokens: float | Tensor | None = None


def preference(
    logp: Tensor,  # [N] float32
    cu_seqlens: Tensor,  # [R + 1]
    pairs: Tensor,  # [P, 2]
    *,
    token_weight: Tensor | None,  # [N]
    reference_scores: Tensor | None,  # [R]
    terms: Terms,
    out: Buffers,
) -> None:
    """Scores, rewards, margins, losses, loss, and d loss / d logp, with the arithmetic of `ops.reference` in float64.

    `cu_seqlens` must cover [0, N) and `pairs` lie in [0, R): indices are not checked on the device.
    Raises ValueError for a kind this backend does not have.
    """
    if terms.kind not in preference_device.KINDS:
        raise ValueError(
            f"kind must be one of {', '.join(preference_device.KINDS)} on the triton backend, got {terms.kind!r}"
        )
    responses, count, tokens = cu_seqlens.numel() - 1, pairs.shape[0], logp.numel()
    sizes = (out.scores.numel(), out.losses.numel(), out.coef.numel())
    assert sizes == (responses, count, tokens), f"out is for {sizes}, not {(responses, count, tokens)}"
    beta = terms.beta if isinstance(terms.beta, Tensor) else None
    num_pairs, num_pairs_value = _number(terms.num_pairs, max(count, 1))
    num_sft, num_sft_value = _number(terms.num_sft_tokens, 0)
    config = configs.PREFERENCE
    with on_device(logp):
        preference_device.preference_kernel[(1,)](
            logp.contiguous(),
            _contiguous(token_weight),
            cu_seqlens.contiguous(),
            pairs.contiguous(),
            _contiguous(reference_scores),
            beta,
            _contiguous(terms.margin),
            _contiguous(terms.pair_weight),
            num_pairs,
            num_sft,
            out.scores,
            out.rewards,
            out.d_score,
            out.losses,
            out.margins,
            out.beta,
            out.coef,
            out.loss,
            out.accuracy,
            out.sft_loss,
            out.scratch,
            responses,
            count,
            beta.stride(0) if beta is not None and beta.dim() else 0,
            0.0 if beta is not None else float(terms.beta),
            float(terms.w),
            float(terms.k),
            float(terms.label_smoothing),
            float(terms.gamma_beta_ratio),
            float(terms.discopop_tau),
            float(num_pairs_value),
            float(num_sft_value),
            float(terms.sft_weight),
            KIND=terms.kind,
            MEAN=terms.reduction == "mean",
            PER_PAIR=terms.margin is not None or (beta is not None and beta.dim() > 0),
            BLOCK_R=config.block_r,
            BLOCK_T=config.block_t,
            BLOCK_P=config.block_p,
            num_warps=config.num_warps,
        )


def _number(value: float | Tensor | None, default: float) -> tuple[Tensor | None, float]:
    """A total as the kernel takes it: a tensor of one number, which is read on the device, or a number."""
    if isinstance(value, Tensor):
        return value.reshape(1), 0.0
    return None, float(default if value is None else value)


def _contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()
