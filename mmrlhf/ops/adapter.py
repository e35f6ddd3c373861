"""LoRA on the lm_head: logits gain scale * (hidden a^T) b^T, without a merged weight or a [V, H] gradient.

The rank-r rows u = scale * hidden a^T [N, r] are an ordinary tensor, made here in float32: autograd gives the gradient
of a, and what of hidden's goes through u. The engines take u beside the hidden rows and b beside the weight: one more
GEMM of depth r on every tile of logits, dlogp/du [N, r] beside dlogp/dh, and db = E^T (c u) beside dW. All of them come
from the same exponentials, so an adapter costs 2 N V r flops where the head costs 2 N V H.
Several adapters are one of the sum of their ranks. Not covered: dropout before a, DoRA, a bias in b.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.ops import checks


@dataclass(frozen=True)
class LoraAdapter:
    """logits += logit_scale * scale * (hidden a^T) b^T; a and b float32, bfloat16 or float16, trained or not.

    It is checked when it is used, beside hidden and weight: TypeError for a dtype, ValueError for a shape.
    """

    a: Tensor  # [r, H]: PEFT's lora_A[name].weight
    b: Tensor  # [V, r]: PEFT's lora_B[name].weight; with a shard, this rank's rows
    scale: float = 1.0  # PEFT's scaling[name]: alpha / r, or alpha / sqrt(r)


Adapters = LoraAdapter | Iterable[LoraAdapter] | None


def several(adapter: Adapters) -> tuple[LoraAdapter, ...]:
    """The adapters one by one; TypeError for anything else."""
    if adapter is None:
        return ()
    if isinstance(adapter, LoraAdapter):
        return (adapter,)
    found = tuple(adapter) if isinstance(adapter, Iterable) else (adapter,)
    for each in found:
        if not isinstance(each, LoraAdapter):
            raise TypeError(f"adapter must be a LoraAdapter, or several, got {type(each).__name__}")
    return found


def tensors(adapters: tuple[LoraAdapter, ...]) -> list[Tensor]:
    return [tensor for each in adapters for tensor in (each.a, each.b)]


def check(
    adapters: tuple[LoraAdapter, ...],
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
) -> None:
    """TypeError for a dtype, ValueError for a shape, a device or a scale."""
    dtypes = tuple(dict.fromkeys((*checks.HEAD_DTYPES, hidden.dtype)))
    for each in adapters:
        checks.tensor("adapter.a", each.a, dtypes)
        checks.tensor("adapter.b", each.b, dtypes)
        rank = each.a.shape[0] if each.a.dim() == 2 else 0
        if rank == 0 or each.a.shape[1] != hidden.shape[-1]:
            raise ValueError(
                f"adapter.a must have shape [r, H] with H = {hidden.shape[-1]} of hidden, got {list(each.a.shape)}"
            )
        checks.shape("adapter.b", each.b, (weight.shape[0], rank), "a row of rank r for each row of weight")
        checks.same_device("hidden", hidden, **{"adapter.a": each.a, "adapter.b": each.b})
        if isinstance(each.scale, bool) or not isinstance(each.scale, (int, float)) or not math.isfinite(each.scale):
            raise ValueError(f"adapter.scale must be a finite number, got {each.scale!r}")


def low_rows(adapters: tuple[LoraAdapter, ...], hidden: Tensor) -> Tensor | None:
    """u [N, r] float32 of hidden [N, H], differentiable; autocast, whose dtype hidden has already, is not asked."""
    if not adapters:
        return None
    autocast = contextlib.nullcontext() if hidden.is_meta else torch.autocast(hidden.device.type, enabled=False)
    with autocast:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = hidden.to(dtype)
        return _beside([torch.nn.functional.linear(wide, each.a.to(dtype)) * each.scale for each in adapters])


def up_rows(adapters: tuple[LoraAdapter, ...]) -> Tensor | None:
    """B [V, r] that goes with `low_rows`."""
    return _beside([each.b for each in adapters]) if adapters else None


def _beside(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
