"""Everything after the log-probabilities in one compiled call: what the cpu and cuda backends call `objective`.

`_C.preference_` on the CPU and `_C.preference_cuda` in one launch on a device are two walks over the same formulas
(kernels/cuda/preference_formulas.cuh), in float64 between float32 inputs and outputs. They take the place of an
autograd graph of some eighty small ops: on one core about 0.1 ms a call in the place of 1 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops import reference
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective


def objective(
    run: Callable[..., None],
    o: Objective,
    logp: Tensor,  # [N] float32
    **more: Any,
) -> tuple[FusedPreferenceOutput, Tensor]:
    """`Objective.__call__` and d loss / d logp [N], by `run`, one of the two ops; no result has a gradient."""
    responses, pairs, logp = o.cu_seqlens.numel() - 1, o.pairs.shape[0], logp.detach().contiguous()

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logp.device)

    out = {
        "scores": empty(responses),
        "rewards": empty(responses),
        "losses": empty(pairs),
        "margins": empty(pairs),
        "beta": empty(pairs),
        "coef": empty(logp.numel()),
        "loss": empty(),
        "accuracy": empty(),
        "sft_loss": empty(),
    }
    run(
        logp,
        o.cu_seqlens.contiguous(),
        o.pairs.contiguous(),
        *out.values(),
        token_weight=_vector(o.token_weight),
        reference_scores=_vector(o.reference_scores),
        pair_weight=_vector(o.pair_weight),
        kind=o.kind,
        mean=o.reduction == "mean",
        label_smoothing=o.label_smoothing,
        gamma_beta_ratio=o.gamma_beta_ratio,
        discopop_tau=o.discopop_tau,
        sft_weight=o.sft_weight,
        **_number("beta", _beta(o, logp), 0.0, torch.float32),
        **_number("num_pairs", o.num_pairs, max(pairs, 1), torch.float64),
        **_number("num_sft_tokens", o.num_sft_tokens, 0.0, torch.float64),
        **more,
    )
    coef = out.pop("coef")
    return FusedPreferenceOutput(**out, logp=logp), coef


def _beta(o: Objective, logp: Tensor) -> float | Tensor:
    if not callable(o.beta):
        return o.beta
    with torch.no_grad():
        scores = reference.sequence_score(logp, o.cu_seqlens, token_weight=o.token_weight, reduction=o.reduction)
        return o.beta(scores, o.reference_scores)


def _number(name: str, value: float | Tensor | None, default: float, dtype: torch.dtype) -> dict[str, float | Tensor]:
    """One number as an argument of the op; on a device, or where there are several, a tensor that it reads itself."""
    if not isinstance(value, Tensor):
        return {name: float(default if value is None else value)}
    if value.device.type == "cpu" and (value.dim() == 0 or name != "beta"):
        return {name: float(value)}
    tensor = value.detach().to(dtype).contiguous()
    return {f"{name}_tensor": tensor if name == "beta" else tensor.reshape(())}


def _vector(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().float().contiguous()
