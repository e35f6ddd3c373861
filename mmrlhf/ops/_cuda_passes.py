"""The cuda backend's rows, and the two ways to their exponentials (see `_cuda`): launches, and the blocks they do."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrlhf import _C as device
from mmrlhf.ops._gemm import (
    column_block,
    most_rows,
    multiply,
    multiply_exact,
    padded,
    product,
    stored,
    wave_chunk,
)
from mmrlhf.ops.streaming import Head, Rows, offset_of

TILE_COLUMNS = 1024  # a partial sum of the epilogue, kTileColumns of kernels/cuda/launch.h


@dataclass
class DeviceRows(Rows):
    """`Rows` whose log-probabilities the pass has made."""

    known: Tensor | None = None  # [n]

    def logp(self) -> Tensor:
        return super().logp() if self.known is None else self.known


@dataclass(frozen=True)
class Units:
    """Where E W goes, and an adapter's E B; each may be left out."""

    unit: Tensor | None  # [N, H]
    low: Tensor | None = None  # [N, r]

    def __bool__(self) -> bool:
        return self.unit is not None or self.low is not None

    def of(self, head: Head) -> list[tuple[Tensor, Tensor]]:
        """(the gradient, the matrix that it is made with) of each that is there."""
        pairs = ((self.unit, head.weight), (self.low, head.up))
        return [(grad, matrix) for grad, matrix in pairs if grad is not None and matrix is not None]


def exp2_rowsum_(tile: Tensor, offset: Tensor) -> Tensor:
    """`streaming.exp2_rowsum_` as the kernels round it: tile [n, c] float32 in place; returns row sums [n]."""
    sums = torch.empty_like(offset)
    device.exp2_rowsum_cuda(tile, offset.contiguous(), sums, stream=stream_of(tile))
    return sums


def packed(head: Head) -> Head:
    """What a kernel takes: no gradients, a weight with its columns side by side, float32 bias and B without gaps."""
    weight, bias, up = head.weight.detach(), head.bias, head.up
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        weight = weight.clone(memory_format=torch.contiguous_format)
    bias = None if bias is None else bias.detach().float().contiguous()
    return dataclasses.replace(
        head, weight=weight, bias=bias, up=None if up is None else up.detach().float().contiguous()
    )


def block_of(head: Head, start: int, stop: int) -> Head:
    """Some rows of the vocabulary."""
    parts = (None if each is None else each[start:stop] for each in (head.weight, head.bias, head.up))
    weight, bias, up = parts
    assert weight is not None
    return dataclasses.replace(head, weight=weight, bias=bias, up=up)


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device; 0 off CUDA, where a test runs the kernels' code on the host."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.device.type == "cuda" else 0


def rows_of(head: Head, hidden: Tensor, targets: Tensor, low: Tensor | None) -> DeviceRows:
    """The targets' logits and offsets. `targets`: `Head.local`."""

    def empty() -> Tensor:
        return torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)

    if low is not None or head.shard is not None:
        z_y, slope_y = head.target(head.rows(hidden), targets, low)
        return DeviceRows(targets, z_y, slope_y, offset_of(z_y), empty(), epilogue=exp2_rowsum_, known=empty())
    slope_y = None if head.softcap is None else empty()
    rows = DeviceRows(targets, empty(), slope_y, empty(), empty(), epilogue=exp2_rowsum_, known=empty())
    device.target_logit_cuda(
        hidden,
        head.weight,
        targets,
        rows.z_y,
        rows.offset,
        bias=head.bias,
        slope_y=slope_y,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
        stream=stream_of(hidden),
    )
    return rows


def finish(rows: DeviceRows, some: slice, partial: Tensor) -> None:
    """Partial sums [tiles, n] to S' and log-probabilities of some rows."""
    assert rows.known is not None
    vectors = (rows.z_y[some], rows.offset[some], rows.rest[some], rows.known[some])
    device.finish_cuda(partial, *vectors, stream=stream_of(partial))


def finish_units(head: Head, rows: Rows, units: Units) -> None:
    """dlogp/dh from E W, and of an adapter dlogp/du from E B."""
    for grad, matrix in units.of(head):
        device.unit_gradient_cuda(
            grad,
            matrix,
            rows.targets,
            rows.z_y,
            rows.offset,
            rows.rest,
            slope_y=rows.slope_y,
            logit_scale=head.logit_scale,
            stream=stream_of(grad),
        )


def logits_of(head: Head, hidden: Tensor, low: Tensor | None, tile: Tensor) -> None:
    """tile [N, c] <- products of the rows with a block of the vocabulary, an adapter's included; not scaled yet."""
    product(hidden, head.weight.T, tile)
    if low is not None and head.up is not None:
        tile.addmm_(low, head.up.T)


def sweep_columns(
    head: Head, hidden: Tensor, low: Tensor | None, rows: DeviceRows, units: Units, kept: Tensor | None
) -> None:
    """A block of columns at a time: a library GEMM, then one pass over its tile."""
    vocab = head.weight.shape[0]
    partial = torch.empty(-(-vocab // TILE_COLUMNS), hidden.shape[0], dtype=torch.float32, device=hidden.device)
    if vocab == 0:  # a rank that holds none of it
        for grad, _ in units.of(head):
            grad.zero_()
    store = bool(units) or kept is not None
    for start, stop, out in _blocks(head, hidden, low, rows, partial, kept, store=store):
        if units.unit is not None:
            multiply(units.unit, out, head.weight[start:stop], add=start > 0)
        if units.low is not None and head.up is not None:
            multiply_exact(units.low, out, head.up[start:stop], add=start > 0)
    finish(rows, slice(None), partial)


def _blocks(
    head: Head,
    hidden: Tensor,
    low: Tensor | None,
    rows: Rows,
    partial: Tensor,
    kept: Tensor | None,
    *,
    store: bool,
    most: int | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c], 0 at the targets), with `partial` [tiles, n] filled. E is in `kept` or a reused buffer;
    without `store` the logits are there in its place. c is at most `most`."""
    count, vocab, dtype = hidden.shape[0], head.weight.shape[0], stored(head)
    apart = store and (kept is not None or dtype != torch.float32)  # E does not overwrite the logits
    size = column_block(count, vocab, 4 + dtype.itemsize if apart and kept is None else 4, TILE_COLUMNS)
    size = min(size, most or size)
    logits = torch.empty(count, padded(size), dtype=torch.float32, device=hidden.device)
    spare = torch.empty(count, padded(size), dtype=dtype, device=hidden.device) if apart and kept is None else logits
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block, tile = block_of(head, start, stop), logits[:, : stop - start]
        logits_of(block, hidden, low, tile)
        out = spare[:, : stop - start] if kept is None else kept[:, start:stop]
        first = start // TILE_COLUMNS
        device.exp2_epilogue_cuda(
            tile,
            out if store else None,
            rows.targets,
            rows.offset,
            partial[first : first - (-(stop - start) // TILE_COLUMNS)],
            start=start,
            bias=block.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap or 0.0,
            stream=stream_of(hidden),
        )
        yield start, stop, out


@functools.cache
def _hopper(index: int) -> int:
    """Multiprocessors of a device that `exp2_gemm_sm90_` runs on; 0 of another."""
    about = torch.cuda.get_device_properties(index)
    built = device.build_info()["exp2_gemm"] and (about.major, about.minor) == (9, 0)
    return about.multi_processor_count if built else 0


def hopper_plan(head: Head, hidden: Tensor) -> dict[str, Any] | None:
    """How the Hopper GEMM cuts the problem; None where it does not take it."""
    matrices = (hidden, head.weight)
    fits = all(m.dtype == torch.bfloat16 and m.stride(0) % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
    if not fits or head.up is not None or hidden.shape[1] % 8 or not hidden.numel() or not head.weight.numel():
        return None
    units = _hopper(hidden.get_device()) if hidden.device.type == "cuda" else 0
    if not units:
        return None
    return dict(device.exp2_gemm_sm90_plan(hidden.shape[0], head.weight.shape[0], multiprocessors=units))


def sweep_rows(
    head: Head, hidden: Tensor, rows: DeviceRows, units: Units, kept: Tensor | None, plan: dict[str, Any]
) -> None:
    """Some rows at a time: the GEMM with the exponentials inside, then E W."""
    (count, vocab), unit = (hidden.shape[0], head.weight.shape[0]), units.unit
    spare, size = None, count
    if kept is None and unit is not None:
        step, units_here = plan["row_step"], _hopper(hidden.get_device())
        size = wave_chunk(count, most_rows(vocab, 2, step), hidden.shape[1], step, units_here)
        spare = torch.empty(size, padded(vocab), dtype=torch.bfloat16, device=hidden.device)[:, :vocab]
    for first in range(0, count, size):
        some = slice(first, min(first + size, count))
        out = kept if spare is None else spare[: some.stop - first]
        partial = _exp2_gemm(head, hidden[some], out, rows.targets[some], rows.offset[some])
        finish(rows, some, partial)
        if unit is not None and out is not None:
            multiply(unit[some], out, head.weight)


def _exp2_gemm(head: Head, hidden: Tensor, out: Tensor | None, targets: Tensor, offset: Tensor) -> Tensor:
    """E of rows of hidden, and its partial sums [tiles, n]. `head` may be a block of the vocabulary."""
    units = _hopper(hidden.get_device())
    plan = device.exp2_gemm_sm90_plan(hidden.shape[0], head.weight.shape[0], multiprocessors=units)
    partial = torch.empty(plan["tiles"], plan["padded_rows"], dtype=torch.float32, device=hidden.device)
    device.exp2_gemm_sm90_(
        hidden,
        head.weight,
        out,
        target=targets,
        offset=offset,
        partial=partial,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap or 0.0,
        tile=plan["tile"],
        stream=stream_of(hidden),
    )
    return partial[:, : hidden.shape[0]]


def tiles_again(head: Head, hidden: Tensor, low: Tensor | None, rows: Rows) -> Iterator[tuple[int, int, Tensor]]:
    """E a block of columns at a time, 0 at the targets, as `forward` made it before rows were run again."""
    (count, width), vocab = hidden.shape, head.weight.shape[0]
    most = column_block(width, vocab, 4, TILE_COLUMNS)  # whose dW in float32 fits the workspace
    if hopper_plan(head, hidden) is None:
        partial = torch.empty(-(-vocab // TILE_COLUMNS), count, dtype=torch.float32, device=hidden.device)
        yield from _blocks(head, hidden, low, rows, partial, None, store=True, most=most)
        return
    size = min(column_block(count, vocab, 2, TILE_COLUMNS), most)
    spare = torch.empty(count, padded(size), dtype=torch.bfloat16, device=hidden.device)
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        tile = spare[:, : stop - start]
        _exp2_gemm(block_of(head, start, stop), hidden, tile, rows.targets - start, rows.offset)
        yield start, stop, tile


@dataclass(frozen=True)
class Statistics:
    """What a pass over the vocabulary says of each row, each [N]."""

    entropy: Tensor  # float32, nats
    sum_p2: Tensor  # float32
    mean_logit: Tensor  # float32, nats
    is_top1: Tensor  # int8
    known: Tensor  # float32, nats

    def logp(self) -> Tensor:
        return self.known


def sweep_statistics(head: Head, hidden: Tensor, targets: Tensor) -> Statistics:
    """The statistics of rows [N, H]; no exponential is stored, and no row has to be run again."""
    count, vocab = hidden.shape[0], head.weight.shape[0]

    def empty(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, dtype=dtype, device=hidden.device)

    size = column_block(count, vocab, 4, TILE_COLUMNS)
    logits = torch.empty(count, padded(size), dtype=torch.float32, device=hidden.device)
    partial = torch.empty(5, -(-vocab // TILE_COLUMNS), count, dtype=torch.float32, device=hidden.device)
    z_y = empty().fill_(torch.nan)  # a target that is no token is in no block: its logp is NaN, as linear_logp's
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block, tile = block_of(head, start, stop), logits[:, : stop - start]
        logits_of(block, hidden, None, tile)
        first = start // TILE_COLUMNS
        device.token_statistics_cuda(
            tile,
            targets,
            z_y,
            partial[:, first : first - (-(stop - start) // TILE_COLUMNS)],
            start=start,
            bias=block.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap or 0.0,
            stream=stream_of(hidden),
        )
    found = Statistics(empty(), empty(), empty(), empty(torch.int8), empty())
    vectors = (found.known, found.entropy, found.sum_p2, found.mean_logit, found.is_top1)
    device.finish_statistics_cuda(partial, z_y, *vectors, vocab=vocab, stream=stream_of(hidden))
    return found
