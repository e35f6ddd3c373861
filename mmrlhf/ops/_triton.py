"""The triton backend of the head: the functions of `streaming`, on the kernels of `mmrlhf.kernels.triton`.

Half precision: one GEMM makes E = 2^(z log2(e) - k) in bfloat16 with its row sums, whole rows at a time, as many as fit
a byte budget; float32: library GEMM tiles of logits, a block of columns at a time, and one pass over each. `forward`
and `weight_grad` mean what they mean in `streaming`, `Kept` holds one [n, V] matrix of exponentials, and `objective`
is everything after the log-probabilities in one launch.
Rows with S' above 2^64 are found with one bool read and run again, as there. Not covered: float16 (its range does not
hold E, and its GEMM would not take bfloat16), float64, a sharded weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mmrlhf.kernels.triton import configs, launch, launch_preference
from mmrlhf.kernels.triton.configs import EpilogueConfig, GemmConfig
from mmrlhf.kernels.triton.launch import Epilogue
from mmrlhf.kernels.triton.launch_preference import Buffers, Terms
from mmrlhf.ops import reference
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective
from mmrlhf.ops.streaming import REDO_ABOVE, Head, Rows, offset_of

# Exponentials in flight where none are kept. 1/4 of the 50 MiB of an H100's L2 would keep them there but feed the GEMMs
# tiles of 40 rows; what counts is enough rows to fill the device: 1,700 of them at V = 152k in bfloat16.
WORKSPACE_BYTES = 512 << 20
ROW_STEP = 128  # rows of a GEMM tile: a chunk that is no multiple leaves part of one idle


@dataclass
class Kept:
    """Exponentials [n, V], bfloat16 for a bfloat16 head, with an aligned leading dimension."""

    flat: Tensor
    rows: int
    vocab: int
    columns: int  # V: one tile

    @classmethod
    def empty(cls, rows: int, head: Head, columns: int | None = None) -> Kept:
        vocab = head.weight.shape[0]
        flat = torch.empty(rows * launch.padded(vocab), dtype=stored(head), device=head.weight.device)
        return cls(flat, rows, vocab, vocab)

    @classmethod
    def over(cls, flat: Tensor, rows: int, head: Head) -> Kept:
        """The same over the first bytes of a larger `flat` [bytes]."""
        vocab = head.weight.shape[0]
        return cls(flat[: rows * row_bytes(head)].view(stored(head)), rows, vocab, vocab)

    @property
    def matrix(self) -> Tensor:
        leading = launch.padded(self.vocab)
        return self.flat[: self.rows * leading].view(self.rows, leading)[:, : self.vocab]


def row_bytes(head: Head) -> int:
    """Bytes of the exponentials of one row."""
    return launch.padded(head.weight.shape[0]) * stored(head).itemsize


def stored(head: Head) -> torch.dtype:
    return torch.float32 if head.weight.dtype == torch.float32 else torch.bfloat16


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
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
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary, and the unit gradient dlogp/dh [N, H] float32: see `streaming.forward`."""
    hidden, targets = hidden.contiguous(), targets.long()
    rows = _rows(head, hidden, targets)
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    _sweep(head, hidden, rows, grad, None if keep is None else keep.matrix)
    bad = ~(rows.rest <= REDO_ABOVE)
    if bad.any():
        _redo(head, hidden, rows, grad, keep, bad.nonzero()[:, 0])
    if keep is not None:
        fix = rows.target_fix().to(keep.flat.dtype)
        keep.matrix.scatter_(1, rows.targets[:, None], fix[:, None])
    return rows, grad


def _epilogue(head: Head) -> Epilogue:
    return Epilogue(head.logit_scale, head.softcap)


def _rows(head: Head, hidden: Tensor, targets: Tensor) -> Rows:
    def empty() -> Tensor:
        return torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)

    rows = Rows(targets, empty(), None if head.softcap is None else empty(), empty(), empty())
    launch.target_logit(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        epilogue=_epilogue(head),
        z_y=rows.z_y,
        slope_y=rows.slope_y,
        offset=rows.offset,
    )
    return rows


def _config(head: Head, hidden: Tensor, *, statistics: bool = False) -> GemmConfig | EpilogueConfig:
    return configs.pick(
        launch.problem(hidden, head.weight, bias=head.bias, softcap=head.softcap, statistics=statistics)
    )


def row_chunk(rows: int, vocab: int, itemsize: int) -> int:
    """Rows whose exponentials fit the workspace, in whole GEMM tiles, and chunks of about the same size."""
    most = max(WORKSPACE_BYTES // (launch.padded(vocab) * itemsize) // ROW_STEP * ROW_STEP, ROW_STEP)
    chunks = -(-rows // most)
    return max(rows, 1) if chunks <= 1 else -(-rows // (chunks * ROW_STEP)) * ROW_STEP


def column_block(rows: int, vocab: int, itemsize: int, step: int) -> int:
    """Columns whose tile of n rows fits the workspace, in whole tiles of the kernel."""
    most = WORKSPACE_BYTES // (max(rows, 1) * itemsize) // step * step
    return min(vocab, max(most, step))


def _sweep(head: Head, hidden: Tensor, rows: Rows, unit: Tensor | None, kept: Tensor | None) -> None:
    """Fill `rows.rest`, `unit` and `kept`, all of them for the present offset."""
    config = _config(head, hidden)
    if isinstance(config, EpilogueConfig):
        _sweep_columns(head, hidden, rows, unit, kept, config)
        return
    count, vocab = hidden.shape[0], head.weight.shape[0]
    size = row_chunk(count, vocab, stored(head).itemsize) if kept is None and unit is not None else max(count, 1)
    spare = None
    if kept is None and unit is not None:
        spare = torch.empty(size, launch.padded(vocab), dtype=stored(head), device=hidden.device)
    for first in range(0, count, size):
        some = slice(first, min(first + size, count))
        here = kept
        if spare is not None:
            here = spare[: some.stop - first, :vocab]
        _exponentials(head, hidden[some], rows, some, here, config)
        if unit is not None and here is not None:
            _multiply(unit[some], here, head.weight)
    _finish_unit(head, rows, unit)


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
        epilogue=_epilogue(head),
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
    rows: Rows,
    unit: Tensor | None,
    kept: Tensor | None,
    config: EpilogueConfig,
    statistics: launch.Statistics | None = None,
) -> None:
    """A block of columns at a time: a library GEMM, then one pass over its tile."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    size = column_block(count, vocab, 4, config.tile_columns)
    partial = _partial(hidden, vocab, config, statistics is not None)
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block = head.weight[start:stop]
        tile = _product(hidden, block.T)
        out = tile if kept is None else kept[:, start:stop]
        first = start // config.tile_columns
        launch.exp2_epilogue(
            tile,
            out if unit is not None or kept is not None else None,
            start=start,
            target=rows.targets,
            offset=rows.offset,
            bias=None if head.bias is None else head.bias[start:stop],
            epilogue=_epilogue(head),
            partial=partial[:, first : first + launch.partial_tiles(stop - start, config)],
            config=config,
        )
        if unit is not None:
            _multiply(unit, out, block, add=start > 0)
    _sum(partial, rows, slice(0, count), vocab, statistics)
    _finish_unit(head, rows, unit)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right in float32, in the dtype of `right`."""
    left = left.to(right.dtype)
    if not add:
        _product(left, right, out)
    elif right.dtype == torch.float32:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def _finish_unit(head: Head, rows: Rows, unit: Tensor | None) -> None:
    if unit is not None:
        launch.unit_gradient_(
            unit,
            head.weight,
            rows.targets,
            z_y=rows.z_y,
            offset=rows.offset,
            rest=rows.rest,
            slope_y=rows.slope_y,
            logit_scale=head.logit_scale,
        )


def _redo(head: Head, hidden: Tensor, rows: Rows, unit: Tensor | None, keep: Kept | None, index: Tensor) -> None:
    """The rows of `index` again, with their true maximum as the offset."""
    some = hidden[index]
    part = rows.of(index, offset=offset_of(_maximum(head, some, rows.of(index))))
    grad = None if unit is None else torch.empty(some.shape, dtype=torch.float32, device=hidden.device)
    kept = None if keep is None else Kept.empty(index.numel(), head).matrix
    _sweep(head, some, part, grad, kept)
    rows.offset[index], rows.rest[index], rows.redone = part.offset, part.rest, index
    if unit is not None and grad is not None:
        unit[index] = grad
    if keep is not None and kept is not None:
        keep.matrix[index] = kept


def _maximum(head: Head, hidden: Tensor, rows: Rows) -> Tensor:
    """Largest logit of each row, a statistic of a pass that stores nothing. [n]"""
    statistics = launch.Statistics.empty(hidden.shape[0], hidden.device)
    config = _config(head, hidden, statistics=True)
    if isinstance(config, EpilogueConfig):
        _sweep_columns(head, hidden, rows, None, None, config, statistics)
    else:
        _exponentials(head, hidden, rows, slice(0, hidden.shape[0]), None, config, statistics)
    return statistics.maximum


def weight_grad(
    head: Head,
    hidden: Tensor,  # [N, H]
    rows: Rows,
    upstream: Tensor,  # [N] dloss/dlogp
    *,
    grad_weight: Tensor | None,  # [V, H] float32
    grad_bias: Tensor | None,  # [V] float32
    keep: Kept | None = None,
    add: bool = False,
) -> None:
    """dW = E^T (c h) and db = E^T c with c = -upstream / S, written or added: see `streaming.weight_grad`."""
    apart = rows.redone if keep is None else None
    together = upstream if apart is None else upstream.index_fill(0, apart, 0)
    coef = -together.float() / rows.total
    weighted = (hidden.float() * (coef * head.logit_scale)[:, None]).to(head.weight.dtype)
    for start, stop, tile in _final_tiles(head, hidden.contiguous(), rows, keep):
        if grad_weight is not None:
            _multiply(grad_weight[start:stop], tile.T, weighted, add=add)
        if grad_bias is not None:
            total = _column_sums(tile, coef)
            grad_bias[start:stop] = grad_bias[start:stop] + total if add else total
    if apart is not None:
        # Made again in the shape in which their S was summed: far from the target a logit's rounding is large.
        part = (hidden[apart], rows.of(apart), upstream[apart])
        weight_grad(head, *part, grad_weight=grad_weight, grad_bias=grad_bias, add=True)


def _column_sums(tile: Tensor, coef: Tensor) -> Tensor:
    """tile^T coef [c] float32; for bfloat16 a GEMM with coef as two bfloat16 columns, which together keep 16 bits."""
    if tile.dtype == torch.float32:
        return (tile * coef[:, None]).sum(0)
    high = coef.bfloat16()
    return _product(tile.T, torch.stack([high, (coef - high.float()).bfloat16()], 1)).sum(1)


def _final_tiles(head: Head, hidden: Tensor, rows: Rows, keep: Kept | None) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c] with its targets fixed): kept whole, or made again a block of columns at a time."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    if keep is not None:
        yield 0, vocab, keep.matrix
        return
    config, dtype = _config(head, hidden), stored(head)
    step = math.lcm(config.tile_columns, 16)
    size = column_block(count, vocab, 4 if isinstance(config, EpilogueConfig) else dtype.itemsize, step)
    fix = rows.target_fix().to(dtype)
    spare = torch.empty(count, launch.padded(size), dtype=dtype, device=hidden.device)
    for start in range(0, vocab, size):
        stop = min(start + size, vocab)
        block = head.weight[start:stop]
        tile, local = spare[:, : stop - start], rows.targets - start
        common: dict[str, Any] = {
            "offset": rows.offset,
            "bias": None if head.bias is None else head.bias[start:stop],
            "epilogue": _epilogue(head),
            "partial": _partial(hidden, stop - start, config),
        }
        if isinstance(config, EpilogueConfig):
            launch.exp2_epilogue(
                _product(hidden, block.T), tile, start=start, target=rows.targets, **common, config=config
            )
        else:
            launch.exp2_gemm(hidden, block, tile, target=local, **common, config=config)
        inside = (local >= 0) & (local < stop - start)
        index = local.clamp(0, stop - start - 1)[:, None]
        tile.scatter_(1, index, torch.where(inside[:, None], fix[:, None], tile.gather(1, index)))
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
