"""Device code of `linear_logp` that runs a few numbers a row, before and after the pass over the vocabulary.

    target_logit    z_y and the offset k; then come the tiles of `linear_logp`: E and its partial sums
    finish          partial sums to S', log-probabilities and statistics
    unit_gradient   dlogp/dh from E W
    logp            log-probabilities and S from S', for rows of which some may have been run again

Sums of partial sums are float64 and in one fixed order. Not covered: float64 hidden rows or weight.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmrlhf.kernels.triton.mathlib import LN2, LOG2E, log1p, tanh_and_slope

# Rows of `partial`. Without statistics only the first is there.
SUM = tl.constexpr(0)  # sum of E
ENTROPY = tl.constexpr(1)  # sum of E * (t - the tile's largest t), with t = z log2(e) - k
SQUARES = tl.constexpr(2)  # sum of (E * 2^-32)^2: E reaches 2^64, its square would not fit
LOGITS = tl.constexpr(3)  # sum of z log2(e)
MAXIMUM = tl.constexpr(4)  # largest t


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("target", "z_y", "slope_y", "offset"))
def target_logit_kernel(
    hidden,  # [rows, width]
    weight,  # [vocab, width]
    bias,  # [vocab] or None
    target,  # [rows]
    z_y,  # [rows] out: the target's logit
    slope_y,  # [rows] out: the slope of the cap there; or None
    offset,  # [rows] out: k
    rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    logit_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gather-dot of each row with its target's row of the weight. A target outside [0, vocab) is not read: NaN.

    In float64, which N H products do not notice: every other logit is measured from this one, and a sum of rounded
    products, each larger than it, put the slope of a cap 13 roundings off where PyTorch's GEMM was 1 off.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    y = tl.load(target + row, mask=row_mask, other=0).to(tl.int64)
    known = row_mask & (y >= 0) & (y < vocab)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float64)
    for start in range(0, width, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        mask = known[:, None] & (inner < width)[None, :]
        a = tl.load(hidden + row.to(tl.int64)[:, None] * hidden_stride + inner[None, :], mask=mask, other=0.0)
        b = tl.load(weight + y[:, None] * weight_stride + inner[None, :], mask=mask, other=0.0)
        acc += a.to(tl.float64) * b.to(tl.float64)
    z = tl.sum(acc, axis=1).to(tl.float32) * logit_scale
    if bias is not None:
        z += tl.load(bias + y, mask=known, other=0.0).to(tl.float32)
    if SOFTCAP:
        tanh, slope = tanh_and_slope(z / softcap)
        z = tanh * softcap
        tl.store(slope_y + row, slope, mask=row_mask)
    z = tl.where(known, z, float("nan"))
    tl.store(z_y + row, z, mask=row_mask)
    tl.store(offset + row, tl.floor(z * LOG2E + 0.5), mask=row_mask)


@triton.jit
def _added(partial, tiles, stride, row, row_mask, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum of one statistic over the tiles, always in the same order. [BLOCK_M] float64"""
    acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float64)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < tiles)[:, None] & row_mask[None, :]
        acc += tl.load(partial + tile.to(tl.int64)[:, None] * stride + row[None, :], mask=mask, other=0.0).to(
            tl.float64
        )
    return tl.sum(acc, axis=0)


@triton.jit
def _moment(partial, tiles, stat_stride, stride, column, mask, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sum of E t over all tiles, and the largest t. [BLOCK_M] float64, float32"""
    acc = tl.zeros((BLOCK_T, BLOCK_M), tl.float64)
    peak = tl.full((BLOCK_T, BLOCK_M), float("-inf"), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        some = (tile < tiles)[:, None] & mask[None, :]
        at = partial + tile.to(tl.int64)[:, None] * stride + column[None, :]
        weight = tl.load(at, mask=some, other=0.0).to(tl.float64)
        largest = tl.load(at + stat_stride * MAXIMUM, mask=some, other=float("-inf"))
        acc += tl.load(at + stat_stride * ENTROPY, mask=some, other=0.0).to(tl.float64)
        acc += tl.where(weight == 0, 0.0, weight * largest.to(tl.float64))
        peak = tl.maximum(peak, largest)
    return tl.sum(acc, axis=0), tl.max(peak, axis=0)


@triton.jit
def _surprise(total, own):
    """-logp from S' and log2 of E_y, float64."""
    # Where k is the row's maximum, E_y may be tiny: there the difference of logarithms is exact enough.
    far = own < -64.0
    return tl.where(far, tl.log(total + tl.exp2(own)) - own * LN2, log1p(total / tl.where(far, 1.0, tl.exp2(own))))


@triton.jit
def _finish_rows(
    partial,
    z_y,
    offset,
    rest,
    logp,
    entropy,
    sum_p2,
    is_top1,
    mean_logit,
    maximum,
    column,  # [BLOCK_M] where in the partial sums
    row,  # [BLOCK_M] where in everything else
    mask,
    tiles,
    vocab,
    stat_stride,
    partial_stride,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    total = _added(partial, tiles, partial_stride, column, mask, BLOCK_M, BLOCK_T)
    z32, k32 = tl.load(z_y + row, mask=mask, other=0.0), tl.load(offset + row, mask=mask, other=0.0)
    z, k = z32.to(tl.float64), k32.to(tl.float64)
    own = z * LOG2E - k
    surprise = _surprise(total, own)
    tl.store(rest + row, total.to(tl.float32), mask=mask)
    tl.store(logp + row, (-surprise).to(tl.float32), mask=mask)
    if STATS:
        moment, largest = _moment(partial, tiles, stat_stride, partial_stride, column, mask, BLOCK_M, BLOCK_T)
        squares = _added(partial + stat_stride * SQUARES, tiles, partial_stride, column, mask, BLOCK_M, BLOCK_T)
        logits = _added(partial + stat_stride * LOGITS, tiles, partial_stride, column, mask, BLOCK_M, BLOCK_T)
        e_y = tl.exp2(own)
        whole = total + e_y
        # ln S - ln2 sum(E t) / S, with the target's share taken out of the difference: exact as p_y -> 1.
        spread = surprise + (own * total - moment) / whole * LN2
        tl.store(entropy + row, spread.to(tl.float32), mask=mask)
        tl.store(sum_p2 + row, ((squares * 2.0**64 + e_y * e_y) / (whole * whole)).to(tl.float32), mask=mask)
        mean = (logits * LN2 + z) / vocab
        tl.store(mean_logit + row, mean.to(tl.float32), mask=mask)
        # In float32, as the others were made: equal logits compare equal.
        top1 = (largest <= tl.fma(z32, LOG2E, -k32)) | (vocab == 1)
        tl.store(is_top1 + row, top1.to(tl.int8), mask=mask)
        peak = tl.maximum(largest.to(tl.float64), own)
        tl.store(maximum + row, ((peak + k) * LN2).to(tl.float32), mask=mask)


@triton.jit(
    do_not_specialize=("rows", "tiles", "stat_stride", "partial_stride"),
    do_not_specialize_on_alignment=("z_y", "offset", "rest", "logp"),
)
def finish_kernel(
    partial,  # [statistics, tiles, rows]
    z_y,  # [rows]
    offset,  # [rows]
    rest,  # [rows] out: S'
    logp,  # [rows] out, nats
    entropy,  # [rows] out, nats; these five with STATS
    sum_p2,  # [rows] out
    is_top1,  # [rows] out, 1 where no token has a larger logit than the target
    mean_logit,  # [rows] out
    maximum,  # [rows] out: the largest logit
    rows,
    tiles,
    vocab,
    stat_stride,
    partial_stride,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Partial sums to log-probabilities and statistics, in float64: a few hundred numbers a row."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    _finish_rows(
        partial,
        z_y,
        offset,
        rest,
        logp,
        entropy,
        sum_p2,
        is_top1,
        mean_logit,
        maximum,
        row,
        row,
        row < rows,
        tiles,
        vocab,
        stat_stride,
        partial_stride,
        STATS,
        BLOCK_M,
        BLOCK_T,
    )


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("rest", "z_y", "offset", "logp"))
def logp_kernel(
    rest,  # [rows]
    z_y,  # [rows]
    offset,  # [rows]
    logp,  # [rows] out, nats
    total,  # [rows] out: S = S' + E_y
    rows,
    BLOCK_M: tl.constexpr,
):
    """Log-probability and S of each row, from its S'."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = row < rows
    own = tl.load(z_y + row, mask=mask, other=0.0).to(tl.float64) * LOG2E
    own -= tl.load(offset + row, mask=mask, other=0.0).to(tl.float64)
    others = tl.load(rest + row, mask=mask, other=0.0).to(tl.float64)
    tl.store(logp + row, (-_surprise(others, own)).to(tl.float32), mask=mask)
    tl.store(total + row, (others + tl.exp2(own)).to(tl.float32), mask=mask)


@triton.jit
def _unit_value(
    product,  # [BLOCK_M, BLOCK_H] float32: E W, without the target's column
    weight,
    target,
    z_y,
    offset,
    rest,
    slope_y,
    row,
    row_mask,
    inner,
    inside_width,  # [1, BLOCK_H]
    vocab,
    weight_stride,
    logit_scale,
):
    """dlogp/dh = logit_scale (S' slope_y W_y - E W) / S: the target's share is S' / S = 1 - p_y, exact as p_y -> 1."""
    y = tl.load(target + row, mask=row_mask, other=0).to(tl.int64)
    others = tl.load(rest + row, mask=row_mask, other=0.0)
    own = tl.fma(tl.load(z_y + row, mask=row_mask, other=0.0), LOG2E, -tl.load(offset + row, mask=row_mask, other=0.0))
    scale = logit_scale / (others + tl.exp2(own))
    share = others * scale
    if slope_y is not None:
        share *= tl.load(slope_y + row, mask=row_mask, other=0.0)
    known = (row_mask & (y >= 0) & (y < vocab))[:, None] & inside_width
    w = tl.load(weight + y[:, None] * weight_stride + inner[None, :], mask=known, other=0.0).to(tl.float32)
    return tl.fma(share[:, None], w, -scale[:, None] * product)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("target", "z_y", "offset", "rest", "slope_y"))
def unit_gradient_kernel(
    product,  # [rows, width] float32: E W, without the target's column
    out,  # [rows, width] out, may be `product`
    weight,  # [vocab, width]
    target,  # [rows]
    z_y,  # [rows]
    offset,  # [rows]
    rest,  # [rows]
    slope_y,  # [rows] or None
    rows,
    vocab,
    width,
    product_stride,
    out_stride,
    weight_stride,
    logit_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dlogp/dh of each row, from E W."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inner = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask, inside_width = row < rows, (inner < width)[None, :]
    mask = row_mask[:, None] & inside_width
    row64 = row.to(tl.int64)[:, None]
    raw = tl.load(product + row64 * product_stride + inner[None, :], mask=mask, other=0.0)
    value = _unit_value(
        raw, weight, target, z_y, offset, rest, slope_y, row, row_mask, inner, inside_width, vocab, weight_stride,
        logit_scale,
    )  # fmt: skip
    tl.store(out + row64 * out_stride + inner[None, :], value.to(out.dtype.element_ty), mask=mask)
