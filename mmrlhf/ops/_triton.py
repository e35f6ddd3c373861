"""The triton backend of the head: the functions of `streaming`, on the kernels of `mmrlhf.kernels.triton`.

Half precision: one GEMM makes E = 2^(z log2(e) - k) in bfloat16 with its row sums, whole rows at a time, as many as fit
a byte budget; float32: library GEMM tiles of logits, a block of columns at a time, and one pass over each. `forward`
and `weight_grad` mean what they mean in `streaming`, `Kept` holds one [n, V] matrix of exponentials, and `objective`
is everything after the log-probabilities in one launch.
Rows with S' above 2^64 are found and run again on the device: nothing here waits for it, and a CUDA graph can hold all
of it. With a vocabulary sharded over ranks z_y, S' and dlogp/dh are all-reduced as in `streaming`, and the host reads
which rows to run again. Not covered: float64, and float16 (see `refuse`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mmrlhf.kernels.triton import configs, launch, launch_preference, launch_redo
from mmrlhf.kernels.triton.configs import EpilogueConfig, GemmConfig
from mmrlhf.kernels.triton.launch_preference import Buffers, Terms
from mmrlhf.ops import reference
from mmrlhf.ops._gemm import (
    ALIGNED,
    Kept,
    column_block,
    most_rows,
    multiply,
    multiply_exact,
    padded,
    product,
    row_bytes,  # noqa: F401  (an engine has it)
    stored,
    wave_chunk,
)
from mmrlhf.ops._head_grad import sum_gradients
from mmrlhf.ops._triton_redo import DeviceRows, epilogue_of, redo
from mmrlhf.ops.head import place_
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective
from mmrlhf.ops.streaming import Head, Rows, offset_of

ROW_STEP = 128  # rows of a GEMM tile: a chunk that is no multiple leaves part of one idle


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot take these tensors; None if they can.

    float16: E spans 2^-126 to 2^64 where float16 has 2^-24 to 2^16, and half the rows of a head with logits of standard
    deviation 4 are over 2^16; so E is bfloat16, and a GEMM wants the weight in it too. Rounded to bfloat16, it puts
    dlogp/dh up to 2.1x as far from float64 as PyTorch's own float16 path; as a sum of two bfloat16 matrices, which is
    exact, it costs 1U more, and every device that runs this has bfloat16 at the speed of float16.
    """
    if any(t.dtype == torch.float16 for t in tensors):
        return "it takes float32 and bfloat16, not float16, whose range does not hold the exponentials"
    if any(t.dtype not in (torch.float32, torch.bfloat16) for t in tensors):
        return f"it takes float32 and bfloat16, not {str(tensors[0].dtype).removeprefix('torch.')}"
    if all(t.device.type == "cuda" for t in tensors):
        arch = launch.arch(tensors[0])
        return None if arch >= 80 else f"it needs compute capability 8.0, this device has {arch // 10}.{arch % 10}"
    if launch.interpreted():
        return None if all(t.dtype == torch.float32 for t in tensors) else "Triton's interpreter takes float32 only"
    return f"its tensors must be on a CUDA device, not {tensors[0].device}"


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
    unit: bool = False,
    keep: Kept | None = None,
    low: Tensor | None = None,  # [N, r] float32, with head.up
    unit_low: Tensor | None = None,  # [N, r] float32 out: dlogp/dlow
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary, and the unit gradient dlogp/dh [N, H] float32: see `streaming.forward`."""
    head, hidden = _packed(head), hidden.contiguous()
    rows = _rows(head, hidden, low, head.local(targets))
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    kept = None if keep is None else keep.matrix
    config = _config(head, hidden)
    if isinstance(config, EpilogueConfig):
        _sweep_columns(head, hidden, low, rows, grad, unit_low, kept, config)
    else:
        _sweep_rows(head, hidden, rows, grad, kept, config)
    head.sum_(rows.rest)
    _finish_unit(head, rows, grad, unit_low)
    redo(head, hidden, rows, _chunk(head, hidden), unit=grad, kept=kept, low=low, unit_low=unit_low)
    if kept is not None and kept.numel():
        place_(kept, rows.targets, 0, rows.target_fix().to(kept.dtype))
    return rows, grad


def statistics(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
) -> tuple[Rows, launch.Statistics]:
    """The rows, and their statistics, in one pass that stores no exponential."""
    head, hidden = _packed(head), hidden.contiguous()
    rows = _rows(head, hidden, None, targets.long())
    found = launch.Statistics.empty(hidden.shape[0], hidden.device)
    config = _config(head, hidden, statistics=True)
    if isinstance(config, EpilogueConfig):
        _sweep_columns(head, hidden, None, rows, None, None, None, config, found)
    else:
        _exponentials(head, hidden, rows, slice(0, hidden.shape[0]), None, config, found)
    redo(head, hidden, rows, _chunk(head, hidden), statistics=found)
    return rows, found


def _packed(head: Head) -> Head:
    """A kernel takes a weight with its columns side by side, as every model's is, and the bias without gaps."""
    weight, bias = head.weight, head.bias
    if weight.stride(1) != 1:
        weight = weight.clone(memory_format=torch.contiguous_format)
    up = None if head.up is None else head.up.float().contiguous()
    return dataclasses.replace(head, weight=weight, bias=None if bias is None else bias.contiguous(), up=up)


def _rows(head: Head, hidden: Tensor, low: Tensor | None, targets: Tensor) -> Rows:
    def empty() -> Tensor:
        return torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)

    if low is not None:
        z_y, slope_y = head.target(hidden, targets, low)
        return DeviceRows(targets, z_y, slope_y, offset_of(z_y), empty())
    rows = DeviceRows(targets, empty(), None if head.softcap is None else empty(), empty(), empty())
    launch.target_logit(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        epilogue=epilogue_of(head),
        z_y=rows.z_y,
        slope_y=rows.slope_y,
        offset=rows.offset,
    )
    if head.shard is not None:
        for known in (rows.z_y, rows.slope_y):
            if known is not None:
                head.sum_(known.masked_fill_(targets < 0, 0))  # the one rank that has the target knows them
        rows.offset = offset_of(rows.z_y)
    return rows


def _config(head: Head, hidden: Tensor, *, statistics: bool = False) -> GemmConfig | EpilogueConfig:
    """How E is made: with an adapter, whose rank-r product is one more library GEMM, by the epilogue."""
    problem = launch.problem(hidden, head.weight, bias=head.bias, softcap=head.softcap, statistics=statistics)
    return configs.pick(problem) if head.up is None else configs.pick_epilogue(problem)


def _chunk(head: Head, hidden: Tensor) -> int:
    """Rows at a time; with a shard as many on every rank."""
    (rows, width), most = hidden.shape, most_rows(head.most_rows, stored(head).itemsize, ROW_STEP)
    return wave_chunk(rows, most, width, ROW_STEP, launch.processors(hidden))


def _sweep_rows(
    head: Head, hidden: Tensor, rows: Rows, unit: Tensor | None, kept: Tensor | None, config: GemmConfig
) -> None:
    """Whole rows at a time: `rows.rest`, E W in `unit`, and `kept`, all of them for the present offset."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    size = _chunk(head, hidden) if kept is None and unit is not None else max(count, 1)
    spare = None
    if kept is None and unit is not None:
        spare = torch.empty(size, padded(vocab), dtype=stored(head), device=hidden.device)
    for first in range(0, count, size):
        some = slice(first, min(first + size, count))
        here = kept
        if spare is not None:
            here = spare[: some.stop - first, :vocab]
        _exponentials(head, hidden[some], rows, some, here, config)
        if unit is not None and here is not None:
            multiply(unit[some], here, head.weight)


def _exponentials(
    head: Head,
    hidden: Tensor,
    rows: Rows,
    some: slice,
    out: Tensor | None,
    config: GemmConfig,
    statistics: launch.Statistics | None = None,
) -> None:
    """E of some rows, and their S'."""
    vocab = head.weight.shape[0]
    partial = _partial(hidden, vocab, config, statistics is not None)
    launch.exp2_gemm(
        hidden,
        head.weight,
        out,
        target=rows.targets[some],
        offset=rows.offset[some],
        bias=head.bias,
        epilogue=epilogue_of(head),
        partial=partial,
        config=config,
    )
    _sum(partial, rows, some, vocab, statistics)


def _partial(hidden: Tensor, vocab: int, config: GemmConfig | EpilogueConfig, statistics: bool = False) -> Tensor:
    shape = (launch.STATISTICS if statistics else 1, launch.partial_tiles(vocab, config), hidden.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=hidden.device)


def _sum(partial: Tensor, rows: Rows, some: slice, vocab: int, statistics: launch.Statistics | None = None) -> None:
    launch.finish(
        partial,
        z_y=rows.z_y[some],
        offset=rows.offset[some],
        vocab=vocab,
        rest=rows.rest[some],
        logp=torch.empty_like(rows.rest[some]),
        statistics=statistics,
    )


def _sweep_columns(
    head: Head,
    hidden: Tensor,
    low: Tensor | None,
    rows: Rows,
    unit: Tensor | None,
    unit_low: Tensor | None,
    kept: Tensor | None,
    config: EpilogueConfig,
    statistics: launch.Statistics | None = None,
) -> None:
    """A block of columns at a time: a library GEMM, then one pass over its tile."""
    count, vocab, dtype = hidden.shape[0], head.weight.shape[0], stored(head)
    stores = not (unit is None and unit_low is None and kept is None)
    apart = stores and kept is None and dtype != torch.float32  # E in half the bytes, as the GEMMs after it take it
    size = column_block(count, vocab, 4 + dtype.itemsize if apart else 4, config.tile_columns)
    spare = torch.empty(count, padded(size), dtype=dtype, device=hidden.device) if apart else None
    partial = _partial(hidden, vocab, config, statistics is not None)
    for sums in (unit, unit_low) if vocab == 0 else ():  # a rank without a row of the vocabulary
        if sums is not None:
            sums.zero_()
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block = head.weight[start:stop]
        tile = _logits(head, hidden, low, start, stop)
        out = tile if spare is None else spare[:, : stop - start]
        out = out if kept is None else kept[:, start:stop]
        first = start // config.tile_columns
        launch.exp2_epilogue(
            tile,
            out if stores else None,
            start=start,
            target=rows.targets,
            offset=rows.offset,
            bias=None if head.bias is None else head.bias[start:stop],
            epilogue=epilogue_of(head),
            partial=partial[:, first : first + launch.partial_tiles(stop - start, config)],
            config=config,
        )
        if unit is not None:
            multiply(unit, out, block, add=start > 0)
        if unit_low is not None and head.up is not None:
            multiply_exact(unit_low, out, head.up[start:stop], add=start > 0)
    _sum(partial, rows, slice(0, count), vocab, statistics)


def _logits(head: Head, hidden: Tensor, low: Tensor | None, start: int, stop: int) -> Tensor:
    """Products of the rows with a block of the weight, an adapter's included. [N, stop - start] float32"""
    tile = product(hidden, head.weight[start:stop].T)
    return tile if low is None or head.up is None else tile.addmm_(low, head.up[start:stop].T)


def _finish_unit(head: Head, rows: Rows, unit: Tensor | None, unit_low: Tensor | None) -> None:
    for grad, matrix in ((unit, head.weight), (unit_low, head.up)):
        if grad is not None and matrix is not None:
            launch.unit_gradient_(
                grad,
                matrix,
                rows.targets,
                z_y=rows.z_y,
                offset=rows.offset,
                rest=rows.rest,
                slope_y=rows.slope_y,
                logit_scale=head.logit_scale,
            )
            head.sum_(grad)


def weight_grad(
    head: Head,
    hidden: Tensor,  # [N, H]
    rows: Rows,
    upstream: Tensor,  # [N] dloss/dlogp
    *,
    keep: Kept | None = None,
    low: Tensor | None = None,  # [N, r] float32
    **grads: Any,
) -> None:
    """`streaming.weight_grad`. `grads`: what `sum_gradients` writes, and whether it adds."""
    head, hidden = _packed(head), hidden.contiguous()
    coef = -upstream.float() / launch.log_probability(rows.rest, z_y=rows.z_y, offset=rows.offset)[1]
    sum_gradients(head, hidden, coef, _final_tiles(head, hidden, low, rows, keep), low=low, **grads)


def _final_tiles(
    head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, keep: Kept | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c] with its targets fixed) a block of columns at a time: kept, or made again."""
    (count, width), vocab = hidden.shape, head.weight.shape[0]
    if keep is not None:
        yield from keep.tiles(width)
        return
    config, dtype = _config(head, hidden), stored(head)
    step = math.lcm(config.tile_columns, ALIGNED)
    size = column_block(count, vocab, 4 if isinstance(config, EpilogueConfig) else dtype.itemsize, step)
    if isinstance(config, GemmConfig):
        size = min(size, column_block(width, vocab, 4, step))
    fix = rows.target_fix().to(dtype)
    redone = launch_redo.select(rows.rest, z_y=rows.z_y, offset=rows.offset, done=True)
    spare = torch.empty(count, padded(size), dtype=dtype, device=hidden.device)
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block = head.weight[start:stop]
        tile, local = spare[:, : stop - start], rows.targets - start
        common: dict[str, Any] = {
            "offset": rows.offset,
            "bias": None if head.bias is None else head.bias[start:stop],
            "epilogue": epilogue_of(head),
        }
        partial = _partial(hidden, stop - start, config)
        if isinstance(config, EpilogueConfig):
            logits, targets = _logits(head, hidden, low, start, stop), rows.targets
            launch.exp2_epilogue(logits, tile, start=start, target=targets, partial=partial, config=config, **common)
        else:
            launch.exp2_gemm(hidden, block, tile, target=local, partial=partial, config=config, **common)
        # By the kernel that summed their S: far from the target a logit's rounding is large, and another GEMM's is
        # another.
        common |= {"low": low, "up": None if head.up is None else head.up[start:stop]}
        launch_redo.exponentials(hidden, block, tile, redone, target=local, partial=None, by_row=True, **common)
        place_(tile, local, 0, fix)
        yield start, stop, tile


def objective(o: Objective, logp: Tensor) -> tuple[FusedPreferenceOutput, Tensor]:
    """`Objective.__call__` and d loss / d logp [N], in one launch. `logp` [N] is float32; no result has a gradient."""
    beta = o.beta
    if callable(beta):
        scores = reference.sequence_score(logp, o.cu_seqlens, token_weight=o.token_weight, reduction=o.reduction)
        with torch.no_grad():
            beta = beta(scores, o.reference_scores)
    out = Buffers.empty(o.cu_seqlens.numel() - 1, o.pairs.shape[0], logp.numel(), logp.device)
    shared = {f.name for f in fields(Terms)} & {f.name for f in fields(Objective)} - {"beta"}
    terms = Terms(beta=beta, **{name: getattr(o, name) for name in shared})
    launch_preference.preference(
        logp,
        o.cu_seqlens,
        o.pairs,
        token_weight=o.token_weight,
        reference_scores=o.reference_scores,
        terms=terms,
        out=out,
    )
    found = {f.name: getattr(out, f.name) for f in fields(FusedPreferenceOutput) if f.name != "logp"}
    return FusedPreferenceOutput(**found, logp=logp), out.coef
