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
from mmrlhf.ops.streaming import Head, Rows

WORKSPACE_BYTES = 512 << 20  # exponentials, and logits, in flight where none are kept: enough rows to fill the device
ALIGNED = 16  # entries: a leading dimension that vector loads and TMA take
TILE_COLUMNS = 1024  # a partial sum of the epilogue, kTileColumns of kernels/cuda/launch.h


def padded(columns: int) -> int:
    """Leading dimension of a buffer of `columns`."""
    return -(-columns // ALIGNED) * ALIGNED


def stored(head: Head) -> torch.dtype:
    return torch.float32 if head.weight.dtype == torch.float32 else torch.bfloat16


@dataclass
class DeviceRows(Rows):
    """`Rows` whose log-probabilities the pass has made."""

    known: Tensor | None = None  # [n]

    def logp(self) -> Tensor:
        return super().logp() if self.known is None else self.known


def exp2_rowsum_(tile: Tensor, offset: Tensor) -> Tensor:
    """`streaming.exp2_rowsum_` as the kernels round it: tile [n, c] float32 in place; returns row sums [n]."""
    sums = torch.empty_like(offset)
    device.exp2_rowsum_cuda(tile, offset.contiguous(), sums, stream=stream_of(tile))
    return sums


def packed(head: Head) -> Head:
    """What a kernel takes: no gradients, a weight with its columns side by side, a float32 bias without gaps."""
    weight, bias = head.weight.detach(), head.bias
    if weight.stride(1) != 1 or weight.stride(0) < weight.shape[1]:
        weight = weight.clone(memory_format=torch.contiguous_format)
    return dataclasses.replace(head, weight=weight, bias=None if bias is None else bias.detach().float().contiguous())


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's device; 0 off CUDA, where a test runs the kernels' code on the host."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.device.type == "cuda" else 0


def rows_of(head: Head, hidden: Tensor, targets: Tensor) -> DeviceRows:
    def empty() -> Tensor:
        return torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)

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


def _finish(rows: DeviceRows, some: slice, partial: Tensor) -> None:
    """Partial sums [tiles, n] to S' and log-probabilities of some rows."""
    assert rows.known is not None
    vectors = (rows.z_y[some], rows.offset[some], rows.rest[some], rows.known[some])
    device.finish_cuda(partial, *vectors, stream=stream_of(partial))


def _finish_unit(head: Head, rows: Rows, unit: Tensor) -> None:
    device.unit_gradient_cuda(
        unit,
        head.weight,
        rows.targets,
        rows.z_y,
        rows.offset,
        rows.rest,
        slope_y=rows.slope_y,
        logit_scale=head.logit_scale,
        stream=stream_of(unit),
    )


def column_block(rows: int, vocab: int, logit_bytes: int) -> int:
    """Columns whose tile of n rows fits the workspace, in whole tiles of the epilogue."""
    most = WORKSPACE_BYTES // (max(rows, 1) * logit_bytes) // TILE_COLUMNS * TILE_COLUMNS
    return min(vocab, max(most, TILE_COLUMNS))


def row_chunk(rows: int, vocab: int, step: int) -> int:
    """Rows whose bfloat16 exponentials fit the workspace, in whole GEMM tiles, and chunks of about the same size."""
    most = max(WORKSPACE_BYTES // (padded(vocab) * 2) // step * step, step)
    chunks = -(-rows // most)
    return max(rows, 1) if chunks <= 1 else -(-rows // (chunks * step)) * step


def sweep_columns(head: Head, hidden: Tensor, rows: DeviceRows, unit: Tensor | None, kept: Tensor | None) -> None:
    """A block of columns at a time: a library GEMM, then one pass over its tile."""
    vocab = head.weight.shape[0]
    partial = torch.empty(-(-vocab // TILE_COLUMNS), hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for start, stop, out in _blocks(head, hidden, rows, partial, kept, store=unit is not None or kept is not None):
        if unit is not None:
            multiply(unit, out, head.weight[start:stop], add=start > 0)
    _finish(rows, slice(None), partial)
    if unit is not None:
        _finish_unit(head, rows, unit)


def _blocks(
    head: Head, hidden: Tensor, rows: Rows, partial: Tensor, kept: Tensor | None, *, store: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c], 0 at the targets), with `partial` [tiles, n] filled. E is in `kept` or a reused buffer;
    without `store` the logits are there in its place."""
    (count, _), vocab, dtype = hidden.shape, head.weight.shape[0], stored(head)
    apart = store and (kept is not None or dtype != torch.float32)  # E does not overwrite the logits
    size = column_block(count, vocab, 4 + dtype.itemsize if apart and kept is None else 4)
    logits = torch.empty(count, padded(size), dtype=torch.float32, device=hidden.device)
    spare = torch.empty(count, padded(size), dtype=dtype, device=hidden.device) if apart and kept is None else logits
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        tile = logits[:, : stop - start]
        product(hidden, head.weight[start:stop].T, tile)
        out = spare[:, : stop - start] if kept is None else kept[:, start:stop]
        first = start // TILE_COLUMNS
        device.exp2_epilogue_cuda(
            tile,
            out if store else None,
            rows.targets,
            rows.offset,
            partial[first : first - (-(stop - start) // TILE_COLUMNS)],
            start=start,
            bias=None if head.bias is None else head.bias[start:stop],
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
    if not fits or head.softcap is not None or hidden.shape[1] % 8 or not hidden.numel():
        return None
    units = _hopper(hidden.get_device()) if hidden.device.type == "cuda" else 0
    if not units:
        return None
    return dict(device.exp2_gemm_sm90_plan(hidden.shape[0], head.weight.shape[0], multiprocessors=units))


def sweep_rows(
    head: Head, hidden: Tensor, rows: DeviceRows, unit: Tensor | None, kept: Tensor | None, plan: dict[str, Any]
) -> None:
    """Some rows at a time: the GEMM with the exponentials inside, then E W."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    spare, size = None, count
    if kept is None and unit is not None:
        size = row_chunk(count, vocab, plan["row_step"])
        spare = torch.empty(size, padded(vocab), dtype=torch.bfloat16, device=hidden.device)[:, :vocab]
    for first in range(0, count, size):
        some = slice(first, min(first + size, count))
        out = kept if spare is None else spare[: some.stop - first]
        partial = _exp2_gemm(head, hidden[some], out, rows.targets[some], rows.offset[some])
        _finish(rows, some, partial)
        if unit is not None and out is not None:
            multiply(unit[some], out, head.weight)
    if unit is not None:
        _finish_unit(head, rows, unit)


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
        tile=plan["tile"],
        stream=stream_of(hidden),
    )
    return partial[:, : hidden.shape[0]]


def product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out <- left @ right, in float32 from half precision too; a half-precision `out` is rounded once."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right."""
    if not add:
        product(left, right, out)
    elif left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def tiles_again(head: Head, hidden: Tensor, rows: Rows) -> Iterator[tuple[int, int, Tensor]]:
    """E a block of columns at a time, 0 at the targets, as `forward` made it."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    if hopper_plan(head, hidden) is None:
        partial = torch.empty(-(-vocab // TILE_COLUMNS), count, dtype=torch.float32, device=hidden.device)
        yield from _blocks(head, hidden, rows, partial, None, store=True)
        return
    size = column_block(count, vocab, 2)
    spare = torch.empty(count, padded(size), dtype=torch.bfloat16, device=hidden.device)
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        bias = None if head.bias is None else head.bias[start:stop]
        block = dataclasses.replace(head, weight=head.weight[start:stop], bias=bias)
        _exp2_gemm(block, hidden, spare[:, : stop - start], rows.targets - start, rows.offset)
        yield start, stop, spare[:, : stop - start]
