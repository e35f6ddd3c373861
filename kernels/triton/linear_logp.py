"""Device code of `linear_logp`: the exponentials E = 2^(z log2(e) - k) of the logits, and their sums a row.

One offset a row, k = rint(z_y log2(e)), known before the GEMM from the target's logit alone; so a tile of logits turns
into a tile of E and a partial sum in one visit, and no tile ever waits for another. The target's column is left out of
the sum: S' is what the other tokens weigh, and logp = -log1p(S' / E_y). Two ways to the same tile: `exp2_epilogue` over
float32 logits that a library GEMM made, `exp2_gemm` with the same epilogue inside. Both leave partial sums
[statistic, vocabulary tile, row] for `finish`, which adds them in one fixed order: results never depend on timing.

Nothing here allocates what it returns. Not covered: float64, and rows with S' above 2^64, for which `redo` is.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmrlhf.kernels.triton.mathlib import tanh_and_slope
from mmrlhf.kernels.triton.rows import ENTROPY, LOGITS, MAXIMUM, SQUARES


@triton.jit
def _exponentials(
    raw,  # [BLOCK_M, BLOCK_V] float32, <h, W_v>
    bias,  # [BLOCK_V] float32 or None
    offset,  # [BLOCK_M] float32
    target,  # [BLOCK_M]
    column,  # [BLOCK_V]
    vocab,
    gain,
    cap,
    SOFTCAP: tl.constexpr,
):
    """z log2(e), t, which columns count, E, and what the gradient needs: E times the slope of the cap."""
    if SOFTCAP:
        x = raw * gain
        if bias is not None:
            x += bias[None, :]
        tanh, slope = tanh_and_slope(x)
        z = tanh * cap
        t = tl.fma(tanh, cap, -offset[:, None])
    else:
        z = raw * gain
        shift = -offset[:, None]
        if bias is not None:
            z += bias[None, :]
            shift += bias[None, :]
        t = tl.fma(raw, gain, shift)
    inside = (column < vocab)[None, :] & (column[None, :] != target[:, None])
    e = tl.where(inside, tl.exp2(t), 0.0)
    kept = e
    if SOFTCAP:
        kept = e * slope
    return z, t, inside, e, kept


@triton.jit
def _store_partial(pointer, stat_stride, mask, z, t, inside, e, STATS: tl.constexpr):
    """Sums of one tile over its columns, to partial[:, tile, rows]."""
    tl.store(pointer, tl.sum(e, axis=1), mask=mask)
    if STATS:
        largest = tl.max(tl.where(inside, t, float("-inf")), axis=1)
        tl.store(pointer + stat_stride * MAXIMUM, largest, mask=mask)
        # Counted from the tile's largest, E t is rounded in proportion to the entropy, not to the distance from the
        # target: `finish` puts the distance back in float64. A logit of -inf (a masked token) has E = 0, t = -inf.
        moment = tl.where(e > 0, e * (t - largest[:, None]), 0.0)
        tl.store(pointer + stat_stride * ENTROPY, tl.sum(moment, axis=1), mask=mask)
        small = e * 2.0**-32
        tl.store(pointer + stat_stride * SQUARES, tl.sum(small * small, axis=1), mask=mask)
        tl.store(pointer + stat_stride * LOGITS, tl.sum(tl.where(inside, z, 0.0), axis=1), mask=mask)


@triton.jit(
    do_not_specialize=("rows", "start", "stat_stride", "partial_stride"),
    do_not_specialize_on_alignment=("offset", "target", "partial"),
)
def exp2_epilogue_kernel(
    tile,  # [rows, columns] float32, <h, W_v> for v = start ...
    out,  # [rows, columns], may be `tile`; or None
    bias,  # [columns] or None
    offset,  # [rows]
    target,  # [rows]
    partial,  # [statistics, tiles, rows]
    rows,
    columns,
    start,
    tile_stride,
    out_stride,
    stat_stride,
    partial_stride,
    gain,
    bias_gain,
    cap,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One [BLOCK_M, BLOCK_V] tile a program: 4 bytes read and 4 (2 in bfloat16) written a logit, nothing else."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    local = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask, column_mask = row < rows, local < columns
    mask = row_mask[:, None] & column_mask[None, :]
    row64 = row.to(tl.int64)
    raw = tl.load(tile + row64[:, None] * tile_stride + local[None, :], mask=mask, other=0.0)
    b = None
    if bias is not None:
        b = tl.load(bias + local, mask=column_mask, other=0.0).to(tl.float32) * bias_gain
    k = tl.load(offset + row, mask=row_mask, other=0.0)
    y = (tl.load(target + row, mask=row_mask, other=-1) - start).to(tl.int32)
    z, t, inside, e, kept = _exponentials(raw, b, k, y, local, columns, gain, cap, SOFTCAP)
    if out is not None:
        tl.store(out + row64[:, None] * out_stride + local[None, :], kept.to(out.dtype.element_ty), mask=mask)
    pointer = partial + tl.program_id(1).to(tl.int64) * partial_stride + row
    _store_partial(pointer, stat_stride, row_mask, z, t, inside, e, STATS)


@triton.jit
def _store_tile(
    out, value, row, first, rows, vocab, out_stride, LOADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr
):
    if LOADS == "pointer":
        rows_here = row + tl.arange(0, BLOCK_M)
        column = first + tl.arange(0, BLOCK_V)
        mask = (rows_here < rows)[:, None] & (column < vocab)[None, :]
        pointer = out + rows_here.to(tl.int64)[:, None] * out_stride + column[None, :]
        tl.store(pointer, value.to(out.dtype.element_ty), mask=mask)
    else:
        out.store([row, first], value.to(out.dtype))


@triton.jit(
    do_not_specialize=("rows", "stat_stride", "partial_stride", "group_m"),
    do_not_specialize_on_alignment=("offset", "target", "partial"),
)
def exp2_gemm_kernel(
    hidden,  # [rows, width], or its descriptor with LOADS = "descriptor"
    weight,  # [vocab, width], or its descriptor
    out,  # [rows, vocab], or its descriptor; or None
    bias,  # [vocab] or None
    offset,  # [rows]
    target,  # [rows]
    partial,  # [statistics, vocabulary tiles, rows]
    rows,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    out_stride,
    stat_stride,
    partial_stride,
    group_m,
    gain,
    bias_gain,
    cap,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    LOADS: tl.constexpr,
    EVEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """Persistent: each program walks over tiles, rows first within a group of `group_m` tiles of rows, so that the
    weight comes from memory once a group, and from L2 for the rest of it.

    LOADS: "pointer" takes any width and stride; "descriptor" (made on the host) and "device_descriptor" are TMA, and
    need 16-byte aligned rows. Only the last can be warp-specialised on Hopper. SPLIT = 2 runs the epilogue in two
    halves, which halves the staging buffer of the store. EVEN: width is a multiple of BLOCK_H (pointer only).
    """
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_M), tl.cdiv(vocab, BLOCK_V)
    half: tl.constexpr = BLOCK_V // SPLIT
    if LOADS == "device_descriptor":
        hidden_block = tl.make_tensor_descriptor(hidden, [rows, width], [hidden_stride, 1], [BLOCK_M, BLOCK_H])
        weight_block = tl.make_tensor_descriptor(weight, [vocab, width], [weight_stride, 1], [BLOCK_V, BLOCK_H])
        out_block = out
        if out is not None:
            out_block = tl.make_tensor_descriptor(out, [rows, vocab], [out_stride, 1], [BLOCK_M, half])
    else:
        hidden_block, weight_block, out_block = hidden, weight, out
    span = group_m * column_tiles
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE
    ):
        group = tile // span
        group_rows = tl.minimum(row_tiles - group * group_m, group_m)
        row_tile = group * group_m + (tile % span) % group_rows
        column_tile = (tile % span) // group_rows
        first_row, first = row_tile * BLOCK_M, column_tile * BLOCK_V
        row = first_row + tl.arange(0, BLOCK_M)
        row_mask = row < rows
        # Asked for before the GEMM, they are there after it.
        k = tl.load(offset + row, mask=row_mask, other=0.0)
        y = tl.load(target + row, mask=row_mask, other=-1).to(tl.int32)
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        for step in range(tl.cdiv(width, BLOCK_H)):
            if LOADS == "pointer":
                inner = step * BLOCK_H + tl.arange(0, BLOCK_H)
                column = first + tl.arange(0, BLOCK_V)
                a_mask, b_mask = row_mask[:, None], (column < vocab)[:, None]
                if not EVEN:
                    a_mask, b_mask = a_mask & (inner < width)[None, :], b_mask & (inner < width)[None, :]
                a_at = hidden + row.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
                b_at = weight + column.to(tl.int64)[:, None] * weight_stride + inner[None, :]
                a, b = tl.load(a_at, mask=a_mask, other=0.0), tl.load(b_at, mask=b_mask, other=0.0)
            else:
                a = hidden_block.load([first_row, step * BLOCK_H])
                b = weight_block.load([first, step * BLOCK_H])
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        pointer = partial + (column_tile * SPLIT).to(tl.int64) * partial_stride + row
        if SPLIT == 2:
            left, right = acc.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
        for part in tl.static_range(SPLIT):
            raw = acc if SPLIT == 1 else left if part == 0 else right
            start = first + part * half
            column = start + tl.arange(0, half)
            shift = None
            if bias is not None:
                shift = tl.load(bias + column, mask=column < vocab, other=0.0).to(tl.float32) * bias_gain
            z, t, inside, e, kept = _exponentials(raw, shift, k, y, column, vocab, gain, cap, SOFTCAP)
            if out is not None:
                _store_tile(out_block, kept, first_row, start, rows, vocab, out_stride, LOADS, BLOCK_M, half)
            _store_partial(pointer + part * partial_stride, stat_stride, row_mask, z, t, inside, e, STATS)
