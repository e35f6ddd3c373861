"""The triton backend's library GEMMs: operands in one half precision or float32, sums and result in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right, in the dtype of `right`; a half-precision `out` is rounded to once, and not added to."""
    left = left.to(right.dtype)
    if out.dtype != torch.float32:
        assert not add, "a half-precision sum of several products would be rounded several times"
        out.copy_(product(left, right))
    elif not add:
        product(left, right, out)
    elif right.dtype == torch.float32:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def column_sums(tile: Tensor, coef: Tensor) -> Tensor:
    """tile^T coef [c] float32; for bfloat16 a GEMM with coef as two bfloat16 columns, which together keep 16 bits."""
    if tile.dtype == torch.float32:
        return (tile * coef[:, None]).sum(0)
    return product(tile.T, torch.cat(in_two(coef[:, None]), 1)).sum(1)


def multiply_exact(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """`multiply` for a narrow float32 `right`: a bfloat16 `left` meets it as two bfloat16 matrices, 16 bits in all."""
    if left.dtype == torch.float32:
        multiply(out, left, right, add=add)
        return
    for which, part in enumerate(in_two(right)):
        multiply(out, left, part, add=add or which > 0)


def in_two(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the sum of two bfloat16 ones, to 2^-17 of it."""
    high = value.bfloat16()
    return high, (value - high.float()).bfloat16()
