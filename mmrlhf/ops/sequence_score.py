"""Token log-probabilities to one score a response, with a weight a token (RLHF-V's DDPO, Eq. 5)."""

from __future__ import annotations

from torch import Tensor

from mmrlhf.ops import checks, reference

REDUCTIONS = ("sum", "mean")


def sequence_score(
    logp: Tensor,  # [N]
    cu_seqlens: Tensor,  # [R + 1]
    *,
    token_weight: Tensor | None = None,  # [N]
    reduction: str = "sum",
) -> Tensor:
    """Score of each response, [R] in nats, in the dtype of `logp` (float32 or float64).

    `sum`: the weighted sum w * logp. `mean`: the same over the sum of w, which is DDPO Eq. 5 with w = 1 on unchanged
    and gamma on corrected tokens (N = |y_u| + gamma |y_c|). `cu_seqlens` (int32 or int64) says where each response's
    tokens lie; `token_weight` is finite and not negative, default 1. A response without tokens, or whose weights are
    all 0, scores 0 with zero gradient; a token of weight 0 adds nothing even if its log-probability is not finite.

    Raises TypeError for a dtype, ValueError for a shape, a device, a reduction or a value out of range.
    """
    checks.tensor("logp", logp, checks.SCORE_DTYPES)
    if logp.dim() != 1:
        raise ValueError(f"logp must have shape [N], got {list(logp.shape)}")
    checks.cu_seqlens(cu_seqlens, logp.numel())
    checks.same_device("logp", logp, cu_seqlens=cu_seqlens)
    checks.finite_weights("token_weight", token_weight, logp.numel(), "one weight a token", logp)
    checks.one_of("reduction", reduction, REDUCTIONS)
    return reference.sequence_score(logp, cu_seqlens, token_weight=token_weight, reduction=reduction)
