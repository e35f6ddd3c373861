"""The cuda backend's rows that are run again; nothing here waits for the device.

Which rows have S' above 2^64 is known on the device alone, so all that running them again takes is launched always, and
ends at once where there are none: 6 launches up to 1,700 rows at V = 152k, 5 more for each 1,700 after (kernels/cuda,
redo.cu). With a sharded vocabulary the ranks agree on the rows, their maxima and their sums by reductions of [N] each,
whatever rows there are, so that none of them waits for a value either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrlhf import _C as device
from mmrlhf.ops._cuda_passes import DeviceRows, Units, finish, stream_of
from mmrlhf.ops._gemm import padded, row_chunk, stored
from mmrlhf.ops.streaming import REDO_ABOVE, Head, Rows

COLUMNS = 128  # a partial sum of these kernels, kRedoColumns of kernels/cuda/launch.h
ROW_STEP = 128  # rows of a part are a multiple of it


@dataclass(frozen=True)
class Chosen:
    """Rows in ascending order, and how many they are."""

    index: Tensor  # [N] int32, of which `count` are written
    count: Tensor  # [1] int32

    @property
    def words(self) -> dict[str, Any]:
        return {"index": self.index, "count": self.count, "stream": stream_of(self.index)}


def select(rows: Rows, *, done: bool = False) -> Chosen:
    """The rows to do again: S' above 2^64, or not a number. `done`: those that were, seen by their offset alone."""
    like = rows.rest
    chosen = Chosen(
        torch.empty(like.shape, dtype=torch.int32, device=like.device), like.new_empty(1, dtype=torch.int32)
    )
    device.select_cuda(rows.rest, rows.z_y, rows.offset, done=done, **chosen.words)
    return chosen


def redo(
    head: Head,
    hidden: Tensor,  # [N, H]
    rows: DeviceRows,
    *,
    unit: Tensor | None = None,  # [N, H]
    kept: Tensor | None = None,  # [N, V]
    low: Tensor | None = None,  # [N, r] float32, with head.up
    unit_low: Tensor | None = None,  # [N, r]
) -> None:
    """The rows with S' above 2^64 again, with their true maximum as the offset: their entries of `rows` and of what
    else is given are written over. With a shard, `unit` and `unit_low` are this rank's part of the sum."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    if count == 0:
        return
    if head.shard is not None:
        rows.rest.masked_fill_(head.shard.any(~(rows.rest <= REDO_ABOVE)), torch.inf)
    chosen = select(rows)
    size = row_chunk(count, head.most_rows, stored(head).itemsize, ROW_STEP)
    parts = [{"first": first, "capacity": min(size, count - first)} for first in range(0, count, size)]
    scratch = torch.empty(-(-vocab // COLUMNS), size, dtype=torch.float32, device=hidden.device)
    given: dict[str, Any] = {"bias": head.bias, **_words(head, low), **chosen.words}
    targets, offset = rows.targets, rows.offset
    for part in parts:
        partial = scratch[:, : part["capacity"]]
        device.redo_maximum_cuda(hidden, head.weight, targets, offset, partial=partial, **given, **part)
    if head.shard is not None:
        head.shard.max_(rows.offset)  # of a row that is not run again every rank has the same
    units, by_row = Units(unit, unit_low), kept is not None
    spare = None
    if units and not by_row:
        spare = torch.empty(size, padded(vocab), dtype=stored(head), device=hidden.device)[:, :vocab]
    for part in parts:
        partial, out = scratch[:, : part["capacity"]], kept if spare is None else spare[: part["capacity"]]
        here: dict[str, Any] = {"partial": partial, "by_row": by_row, **given, **part}
        device.redo_exponentials_cuda(hidden, head.weight, out, targets, offset, **here)
        _finish(head, rows, partial, chosen, part["first"])
        if out is not None:
            _units(head, rows, units, out, chosen, part, by_row)
    if head.shard is not None:
        finish(rows, slice(None), rows.rest[None])


def _units(
    head: Head, rows: DeviceRows, units: Units, exponentials: Tensor, chosen: Chosen, part: dict[str, int], by_row: bool
) -> None:
    """dlogp/dh, and of an adapter dlogp/du, of a part of the chosen rows."""
    for grad, matrix in units.of(head):
        device.redo_unit_cuda(
            grad,
            exponentials,
            matrix,
            rows.targets,
            rows.z_y,
            rows.offset,
            rows.rest,
            by_row=by_row,
            slope_y=rows.slope_y,
            logit_scale=head.logit_scale,
            **part,
            **chosen.words,
        )


def _words(head: Head, low: Tensor | None) -> dict[str, Any]:
    return {
        "low": low,
        "up": None if low is None else head.up,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap or 0.0,
    }


def _finish(head: Head, rows: DeviceRows, partial: Tensor, chosen: Chosen, first: int) -> None:
    """S' and log-probabilities of a part of the chosen rows."""
    assert rows.known is not None
    if head.shard is None:
        device.finish_cuda(partial, rows.z_y, rows.offset, rows.rest, rows.known, first=first, **chosen.words)
        return
    # S' of a row done again holds its maximum, which weighs 0.7 at least: what is 0 is another row.
    fresh = torch.zeros_like(rows.rest)
    device.finish_cuda(partial, rows.z_y, rows.offset, fresh, torch.empty_like(rows.rest), first=first, **chosen.words)
    head.sum_(fresh)
    rows.rest.copy_(torch.where(fresh != 0, fresh, rows.rest))


def exponentials_(
    head: Head,  # a block of the vocabulary from `start` on
    hidden: Tensor,  # [N, H]
    rows: Rows,
    chosen: Chosen,
    tile: Tensor,  # [N, c]
    *,
    start: int,
    low: Tensor | None = None,  # [N, r]
) -> None:
    """E of the chosen rows into their rows of `tile`, by the kernel that summed their S': far from the target a logit's
    rounding is large, and another GEMM's is another."""
    device.redo_exponentials_cuda(
        hidden,
        head.weight,
        tile,
        rows.targets,
        rows.offset,
        partial=None,
        first=0,
        capacity=hidden.shape[0],
        start=start,
        by_row=True,
        bias=head.bias,
        **_words(head, low),
        **chosen.words,
    )
