"""The installed Liger-Kernel's fused linear DPO loss, on response rows alone, as the other sides have them."""

from __future__ import annotations

import torch
from torch import Tensor


def dpo(
    hidden: Tensor,  # [N, H], pairs of neighbouring responses of equal length
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    *,
    responses: int,
    beta: float,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """(scores [R], loss). No reference model: its scores are 0. `compiled` is Liger's default."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    def better_first(rows: Tensor) -> Tensor:
        """[R, T, ...] with the better responses in the first half, as Liger takes them."""
        split = rows.view(responses // 2, 2, -1, *rows.shape[1:])
        return split.transpose(0, 1).reshape(responses, -1, *rows.shape[1:])

    module = LigerFusedLinearDPOLoss(beta=beta, use_ref_model=False, compiled=compiled)
    loss, (better, worse, *_) = module(weight, better_first(hidden), better_first(targets))
    return torch.stack([better, worse], 1).flatten(), loss


def missing() -> str | None:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss  # noqa: F401
    except ImportError as error:
        return f"liger-kernel is not installed ({error})"
    return None


def version() -> str:
    from importlib.metadata import version

    return version("liger-kernel")


def scaled_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] of Liger's fused linear scaled cross-entropy: per token, no [N, V] kept."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)


def missing_scaled() -> str | None:
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (  # noqa: F401
            LigerFusedLinearScaledCrossEntropyFunction,
        )
    except ImportError as error:
        return f"no liger-kernel with a fused linear scaled cross-entropy is installed ({error})"
    return None
