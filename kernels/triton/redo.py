"""Device code that runs some rows of `linear_logp` again, which rows being known on the device alone.

A row with S' above 2^64 (its target more than 44 nats below the largest logit), or not finite, is done again with its
true maximum as the offset. Asking the host which rows these are would make it wait for the device, and end the capture
of a CUDA graph. So `select` writes their indices and their number, every kernel here is launched whatever they are, and
a program walks over as many tiles as that number gives: none, as a rule, and then it ends at once.

    select -> redo (MODE "maximum": offset <- rounded maximum) -> redo (MODE "exponentials") -> redo_finish -> redo_unit

Cost: 5 launches of programs that end at once where no row is bad. Each bad row costs 3 x 2 H V flops (the maximum, E,
E W), where an ordinary one costs 2 x; in tiles of 64 gathered rows, so that the weight is read from memory once a pass
for up to 64 of them, and without TMA: all rows bad is correct, and several times slower than all rows good.
`redo` makes the same E bitwise for the same rows, so that a gradient of the weight can make E once more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from mmrlhf.kernels.triton.linear_logp import _exponentials, _store_partial
from mmrlhf.kernels.triton.mathlib import LOG2E
from mmrlhf.kernels.triton.rows import _finish_rows, _unit_value

REDO_ABOVE = tl.constexpr(2.0**64)


@triton.jit(do_not_specialize=("rows",), do_not_specialize_on_alignment=("rest", "z_y", "offset"))
def select_kernel(
    rest,  # [rows] S'
    z_y,  # [rows]
    offset,  # [rows]
    index,  # [rows] out, int32: the rows in question, ascending; the first `count` entries are written
    count,  # [1] out, int32
    rows,
    DONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows to do again; with DONE those that were: their offset is over 32 above their own z_y log2(e).

    (S' above 2^64 of less than 2^31 tokens puts the maximum 33 or more above it.) Grid (1,).
    """
    found = 0
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mask = row < rows
        if DONE:
            own = tl.load(z_y + row, mask=mask, other=0.0).to(tl.float64) * LOG2E
            bad = tl.load(offset + row, mask=mask, other=0.0).to(tl.float64) - own > 32.0
        else:
            bad = (tl.load(rest + row, mask=mask, other=0.0) <= REDO_ABOVE) == 0  # so that a NaN is bad
        flag = (bad & mask).to(tl.int32)
        tl.store(index + found + tl.cumsum(flag, axis=0) - flag, row, mask=flag != 0)
        found += tl.sum(flag, axis=0)
    tl.store(count, found)


@triton.jit
def _chosen(index, first, some, block, BLOCK_M: tl.constexpr):
    """Places of a block of rows within their chunk, the rows themselves, and which of them there are."""
    slot = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = slot < some
    return slot, tl.load(index + first + slot, mask=mask, other=0), mask


@triton.jit
def _products(
    acc,  # [BLOCK_M, BLOCK_V] float32
    left,  # [rows, width]
    right,  # [vocab, width]
    row,
    row_mask,
    column,
    column_mask,
    width,
    left_stride,
    right_stride,
    BLOCK_H: tl.constexpr,
):
    """acc + left[row] right[column]^T."""
    for start in range(0, width, BLOCK_H):
        inner = start + tl.arange(0, BLOCK_H)
        inside_width = (inner < width)[None, :]
        a_at = left + row.to(tl.int64)[:, None] * left_stride + inner[None, :]
        b_at = right + column.to(tl.int64)[:, None] * right_stride + inner[None, :]
        a = tl.load(a_at, mask=row_mask[:, None] & inside_width, other=0.0)
        b = tl.load(b_at, mask=column_mask[:, None] & inside_width, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit(
    do_not_specialize=("first", "capacity", "stat_stride", "partial_stride"),
    do_not_specialize_on_alignment=("offset", "target"),
)
def redo_kernel(
    hidden,  # [rows, width]
    weight,  # [vocab, width]: the whole, or a block of it
    out,  # [capacity, vocab], or [rows, vocab] with BY_ROW; or None
    bias,  # [vocab] or None
    low,  # [rows, rank] float32, an adapter's part of the rows; or None
    up,  # [vocab, rank] float32, its part of the weight; or None
    offset,  # [rows]; out in MODE "maximum"
    target,  # [rows], counted from the block's first column
    partial,  # [statistics, vocabulary tiles, capacity]; or None
    index,  # [rows]
    count,  # [1]
    first,
    capacity,
    vocab,
    width,
    rank,
    hidden_stride,
    weight_stride,
    out_stride,
    low_stride,
    up_stride,
    stat_stride,
    partial_stride,
    gain,
    bias_gain,
    cap,
    MODE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BY_ROW: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """E and its partial sums, or the rounded maximum, of the selected rows first ... first + capacity."""
    some = tl.minimum(tl.load(count) - first, capacity)
    row_tiles, column_tiles = tl.cdiv(tl.maximum(some, 0), BLOCK_M), tl.cdiv(vocab, BLOCK_V)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        slot, row, row_mask = _chosen(index, first, some, tile % row_tiles, BLOCK_M)
        column_tile = tile // row_tiles
        column = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
        column_mask = column < vocab
        acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
        acc = _products(
            acc, hidden, weight, row, row_mask, column, column_mask, width, hidden_stride, weight_stride, BLOCK_H
        )
        if low is not None:
            acc = _products(acc, low, up, row, row_mask, column, column_mask, rank, low_stride, up_stride, 16)
        shift = None
        if bias is not None:
            shift = tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32) * bias_gain
        if MODE == "maximum":
            none = tl.zeros((BLOCK_M,), tl.float32)
            z, _, _, _, _ = _exponentials(acc, shift, none, row, column, vocab, gain, cap, SOFTCAP)
            best = tl.max(tl.where(column_mask[None, :], z, float("-inf")), axis=1)
            # The order in which maxima arrive cannot be seen in the largest of them.
            tl.atomic_max(offset + row, tl.floor(best + 0.5), mask=row_mask)
        else:
            k = tl.load(offset + row, mask=row_mask, other=0.0)
            y = tl.load(target + row, mask=row_mask, other=-1).to(tl.int32)
            z, t, inside, e, kept = _exponentials(acc, shift, k, y, column, vocab, gain, cap, SOFTCAP)
            if out is not None:
                place = row if BY_ROW else slot
                at = out + place.to(tl.int64)[:, None] * out_stride + column[None, :]
                tl.store(at, kept.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
            if partial is not None:
                pointer = partial + column_tile.to(tl.int64) * partial_stride + slot
                _store_partial(pointer, stat_stride, row_mask, z, t, inside, e, STATS)


@triton.jit(
    do_not_specialize=("first", "capacity", "tiles", "stat_stride", "partial_stride"),
    do_not_specialize_on_alignment=("z_y", "offset", "rest", "logp"),
)
def redo_finish_kernel(
    partial,  # [statistics, tiles, capacity]
    z_y,  # [rows]
    offset,  # [rows]
    rest,  # [rows] out
    logp,  # [rows] out
    entropy,  # [rows] out; these five with STATS
    sum_p2,
    is_top1,
    mean_logit,
    maximum,
    index,  # [rows]
    count,  # [1]
    first,
    capacity,
    tiles,
    vocab,
    stat_stride,
    partial_stride,
    STATS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`finish` of the selected rows."""
    some = tl.minimum(tl.load(count) - first, capacity)
    if tl.program_id(0) * BLOCK_M < some:
        slot, row, mask = _chosen(index, first, some, tl.program_id(0), BLOCK_M)
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
            slot,
            row,
            mask,
            tiles,
            vocab,
            stat_stride,
            partial_stride,
            STATS,
            BLOCK_M,
            BLOCK_T,
        )


@triton.jit(
    do_not_specialize=("first", "capacity"),
    do_not_specialize_on_alignment=("target", "z_y", "offset", "rest", "slope_y"),
)
def redo_unit_kernel(
    e,  # [capacity, vocab], or [rows, vocab] with BY_ROW
    weight,  # [vocab, width]: that of the head, or an adapter's part of it
    out,  # [rows, width] out
    target,  # [rows]
    z_y,  # [rows]
    offset,  # [rows]
    rest,  # [rows]
    slope_y,  # [rows] or None
    index,  # [rows]
    count,  # [1]
    first,
    capacity,
    vocab,
    width,
    e_stride,
    weight_stride,
    out_stride,
    logit_scale,
    BY_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """E W of the selected rows, and their dlogp/dh from it; of an adapter, their gradient by its part of the rows."""
    some = tl.minimum(tl.load(count) - first, capacity)
    row_tiles, inner_tiles = tl.cdiv(tl.maximum(some, 0), BLOCK_M), tl.cdiv(width, BLOCK_H)
    for tile in range(tl.program_id(0), row_tiles * inner_tiles, tl.num_programs(0)):
        slot, row, row_mask = _chosen(index, first, some, tile % row_tiles, BLOCK_M)
        inner = (tile // row_tiles) * BLOCK_H + tl.arange(0, BLOCK_H)
        inside_width = (inner < width)[None, :]
        place = row if BY_ROW else slot
        acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for start in range(0, vocab, BLOCK_V):
            column = start + tl.arange(0, BLOCK_V)
            a_at = e + place.to(tl.int64)[:, None] * e_stride + column[None, :]
            b_at = weight + column.to(tl.int64)[:, None] * weight_stride + inner[None, :]
            a = tl.load(a_at, mask=row_mask[:, None] & (column < vocab)[None, :], other=0.0)
            b = tl.load(b_at, mask=(column < vocab)[:, None] & inside_width, other=0.0)
            acc = tl.dot(a.to(b.dtype), b, acc, input_precision="ieee")
        value = _unit_value(
            acc, weight, target, z_y, offset, rest, slope_y, row, row_mask, inner, inside_width, vocab, weight_stride,
            logit_scale,
        )  # fmt: skip
        at = out + row.to(tl.int64)[:, None] * out_stride + inner[None, :]
        tl.store(at, value.to(out.dtype.element_ty), mask=row_mask[:, None] & inside_width)
