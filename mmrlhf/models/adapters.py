"""LoRA layers in as few passes over memory as they need, on CUDA in half precision.

PEFT keeps adapters in float32 and casts to them: `W x + (x.float() Aᵀ Bᵀ) * scale` reads and writes a row of a 7B
model's layer some ten times in float32 beside the one GEMM, 0.75 ms a layer at 1750 tokens where the GEMMs take 1.2 ms
(arithmetic, 4.2 TB/s and 700 TFLOP/s), and keeps the float32 inputs for the backward. Here A and B are rounded to the
model's dtype for the multiplication, as autocast would, and the second product is added where the first already lies:

    low = x Aᵀ [T, r];   out = x Wᵀ + bias;   out += scale * low Bᵀ     kept for the backward: x, low, A and B rounded

Adapters and their gradients stay float32. `install` gives PEFT's own layers this forward; what it does not cover goes
to PEFT as before: other devices and dtypes, a trained or quantised base weight, several adapters at once, merged ones,
variants (DoRA), adapter biases, dropout in training.
"""

from __future__ import annotations

import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
_done: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def install(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the forward below, once; how many have it anew. Values stay theirs."""
    if model in _done:
        return 0
    _done.add(model)
    count = 0
    for module in model.modules():
        if _is_lora_linear(module) and "forward" not in vars(module):
            module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
            count += 1
    return count


def _is_lora_linear(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__name__ != "Linear" or not kind.__module__.startswith("peft."):
        return False
    return type(module.get_base_layer()) is nn.Linear  # type: ignore[operator]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of a PEFT LoRA layer: x [..., in] to [..., out]."""
    name = None if args or kwargs else _plain_adapter(layer, x)
    if name is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base = layer.get_base_layer()
    factors = (layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return adapted_linear(x, base.weight, base.bias, *factors)


def _plain_adapter(layer: Any, x: Tensor) -> str | None:
    """The one adapter in force, if the layer is of the kind that `adapted_linear` computes, on these inputs."""
    if layer.disable_adapters or layer.merged or not _takes(x):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    weight = layer.get_base_layer().weight
    if len(names) != 1 or weight.requires_grad or weight.dtype != x.dtype or type(weight) is not nn.Parameter:
        return None
    (name,) = names
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
    if dropout or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    return name


def _takes(x: Tensor) -> bool:
    """Whether the short way pays: on a CPU PEFT's own forward is the definition."""
    return x.is_cuda and x.dtype in HALF


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x Wᵀ + bias + scale * (x Aᵀ) Bᵀ: [..., out] in the dtype of x.

    x [..., in], weight [out, in] without a gradient, bias [out] or None; a [r, in] and b [out, r] in any float dtype,
    in which their gradients come. Products are rounded to the dtype of x, the gradients of a and b are not (CUDA).
    """
    return _AdaptedLinear.apply(x, weight, bias, a, b, scale)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        rows = x.reshape(-1, x.shape[-1])  # [T, in]
        down, up = a.to(x.dtype), b.to(x.dtype)  # [r, in], [out, r]
        low = rows @ down.T  # [T, r]
        out = torch.nn.functional.linear(rows, weight, bias)  # [T, out]
        out.addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(rows, weight, low, down, up)
        ctx.scale, ctx.shape, ctx.dtypes = scale, x.shape, (a.dtype, b.dtype)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, weight, low, down, up = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])  # [T, out]
        by_low = grad @ up  # [T, r], before the scale
        by_x = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = grad @ weight
            by_x.addmm_(by_low, down, alpha=ctx.scale)
            by_x = by_x.view(ctx.shape)
        if ctx.needs_input_grad[2]:
            by_bias = grad.sum(0)
        by_a = _product(by_low.T, rows, ctx.dtypes[0]).mul_(ctx.scale)
        by_b = _product(grad.T, low, ctx.dtypes[1]).mul_(ctx.scale)
        return by_x, None, by_bias, by_a, by_b, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`; on CUDA without rounding it to the dtype of the factors first."""
    if left.is_cuda and left.dtype in HALF and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)
