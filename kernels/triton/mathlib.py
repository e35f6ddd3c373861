"""Scalar functions the kernels share, written out where Triton has none or an approximate one.

The float64 ones are for vectors as short as the number of rows or pairs: with 53 bits, plain exp and log plus a series
near 0 keep the relative precision of float32 results everywhere, which float32 lg2.approx would not. The float32 ones
run a logit each, so they are short. Not covered: half precision (raise first).
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmrlhf.kernels.triton import interpreter  # noqa: F401  every module of kernels imports this one

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p(x):
    """log(1 + x), float64, x >= 0. The series' first dropped term is below 3e-16 relative where it is used."""
    return tl.where(x < 1e-5, x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - 0.25 * x))), tl.log(1.0 + x))


@triton.jit
def expm1(x):
    """exp(x) - 1, float64. Above 1e-4 the subtraction loses 13 of 53 bits, which float32 results do not see."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x / 24.0)))
    return tl.where(tl.abs(x) < 1e-4, series, tl.exp(x) - 1.0)


@triton.jit
def logsigmoid(x):
    """log(sigmoid(x)), float64."""
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), float64, never through inf."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2, float32: tanh within a few ulp, the slope too, or within |x| ulp, what one rounding of
    x does to it. It is not a difference where tanh is near 1.

    Below 0.625 Cephes' odd polynomial (tanhf); above it, with u = exp(-2|x|), 1 - 2u / (1 + u) and 4u / (1 + u)^2.
    """
    size = tl.abs(x)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = x + x * square * series
    u = tl.exp2(size * (-2.0 * LOG2E))
    inverse = 1.0 / (1.0 + u)
    far = 1.0 - 2.0 * u * inverse
    far = tl.where(x < 0, -far, far)
    small = size < 0.625
    tanh = tl.where(small, near, far)
    slope = tl.where(small, 1.0 - near * near, 4.0 * u * inverse * inverse)
    return tanh, slope
