"""The torch backend of the head, and the frame of the cpu one: logits a block of the vocabulary at a time.

[N, V] is never made unless asked for. One offset a row, known before the first block: k = rint(z_y * log2(e)), the
target's logit z_y being a gather-dot with its row of `weight`. Then E = 2^(z * log2(e) - k) needs no running maximum, a
block is one GEMM and one pass (`exp2_rowsum_`, the part that the cpu backend compiles) over a reused tile, and dX = E W
and dW = E^T (..) are plain GEMMs. The target's column is left out of E and of its sum S': logp = -log1p(S' / E_y) keeps
its relative precision as p_y -> 1.

S' above 2^64 (logp < -44 nats) is rare: such rows are found afterwards (one bool read, which waits for a CUDA device)
and done again with their true maximum in the place of z_y. float32 arithmetic throughout; half precisions are raised
block by block on the CPU, and multiplied into float32 by the GEMM itself on CUDA. What a head and its rows are, a LoRA
on it and a sharded vocabulary included: `head`. Not covered: float64 (ops.reference).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.ops.head import LN2, LOG2E, Epilogue, Head, Rows, exp2_, exp2_rowsum_, offset_of, place_
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective

__all__ = [
    "LN2",
    "LOG2E",
    "REDO_ABOVE",
    "Epilogue",
    "Head",
    "Kept",
    "Rows",
    "Tiles",
    "exp2_",
    "exp2_rowsum_",
    "forward",
    "objective",
    "offset_of",
    "pick",
    "row_bytes",
    "weight_grad",
]
REDO_ABOVE = 2.0**64


@dataclass(frozen=True)
class Tiles:
    rows: int
    columns: int


# Measured on 2 cores (512 KiB of L2 each), H = 896, both GEMMs and the pass on 8192 columns, which L3 holds; medians
# of 24 interleaved rounds. N = 2048: [1024, 1024] 1.88 U, [2048, 1024] 1.93, [512, 1024] 1.94, [512, 512] 2.09.
# N = 128 to 512: 512 to 2048 columns within 5%. Over a whole vocabulary [1024, 1024] and [512, 1024] could not be told
# apart: 2.13 and 2.25 U in 5 rounds, 2.04 and 1.96 in 3. On CUDA a tile only has to fill the device and bound memory.
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_ROWS = {"cpu": 1024, "cuda": 8192}
_COLUMNS = {"cpu": 1536, "cuda": 16384}


def pick(rows: int, vocab: int, device_type: str = "cpu") -> Tiles:
    """Tile of logits for N rows and V columns: equal parts of the rows, columns from the rest of the byte budget."""
    kind = device_type if device_type in _TILE_BYTES else "cuda"
    parts = max(1, -(-rows // _ROWS[kind]))
    tile_rows = max(1, -(-rows // parts))
    columns = _TILE_BYTES[kind] // (4 * tile_rows)
    return Tiles(tile_rows, max(1, min(vocab, columns, _COLUMNS[kind])))


class Kept:
    """Exponentials of [n, V] in one flat buffer, cut into contiguous [n, c] tiles, one a block of the vocabulary."""

    def __init__(
        self,
        flat: Tensor,  # [rows * vocab] float32
        rows: int,
        vocab: int,
        columns: int,  # of a tile
    ):
        self.flat, self.rows, self.vocab, self.columns = flat, rows, vocab, columns

    @classmethod
    def empty(cls, rows: int, head: Head, columns: int | None = None) -> Kept:
        vocab, device = head.weight.shape[0], head.weight.device
        flat = torch.empty(rows * vocab, dtype=torch.float32, device=device)
        return cls(flat, rows, vocab, columns or pick(rows, vocab, device.type).columns)

    @classmethod
    def over(cls, flat: Tensor, rows: int, head: Head) -> Kept:
        """The same over the first bytes of a larger `flat` [bytes] uint8."""
        vocab = head.weight.shape[0]
        some = flat[: 4 * rows * vocab].view(torch.float32)
        return cls(some, rows, vocab, pick(rows, vocab, flat.device.type).columns)

    def tile(self, start: int, stop: int) -> Tensor:
        return self.flat[start * self.rows : stop * self.rows].view(self.rows, stop - start)

    def place_(self, targets: Tensor, value: Tensor) -> None:
        """Write `value` [n] into each row's target column, all tiles in one go; a target of -1 has none."""
        if self.vocab == 0:
            return
        column = targets.clamp(min=0)
        start = column.div(self.columns, rounding_mode="floor") * self.columns
        width = (self.vocab - start).clamp(max=self.columns)
        index = start * self.rows + torch.arange(self.rows, device=targets.device) * width + (column - start)
        self.flat.scatter_(0, index, torch.where(targets >= 0, value, self.flat[index]))

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, self.vocab, self.columns):
            stop = min(start + self.columns, self.vocab)
            yield start, stop, self.tile(start, stop)


def row_bytes(head: Head) -> int:
    """Bytes of the exponentials of one row; with a sharded vocabulary, on the rank that holds most of it."""
    return 4 * head.most_rows


def objective(o: Objective, logp: Tensor) -> tuple[FusedPreferenceOutput, Tensor]:
    """Everything after the log-probabilities [N], and d loss / d logp [N]; the result carries no gradient."""
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        result = o(leaf)
        (coef,) = torch.autograd.grad(result.loss, leaf)
    return dataclasses.replace(result, loss=result.loss.detach()), coef


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
    unit: bool = False,
    keep: Kept | None = None,
    epilogue: Epilogue = exp2_rowsum_,
    low: Tensor | None = None,  # [N, r] float32, with head.up
    unit_low: Tensor | None = None,  # [N, r] float32 out: dlogp/dlow
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary: 1U (U = 2 N H V flops), and 1U more for the unit gradient dlogp/dh [N, H] float32.

    `keep` is filled with E, its target columns fixed, so that `weight_grad` needs no recompute.
    """
    targets, hidden = head.local(targets).contiguous(), head.rows(hidden)
    z_y, slope_y = head.target(hidden, targets, low)
    rows = Rows(targets, z_y, slope_y, offset_of(z_y), torch.empty_like(z_y), epilogue=epilogue)
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    out = _Sweep(grad, unit_low, keep)
    _sweep(head, hidden, low, rows, out)
    bad = ~(rows.rest <= REDO_ABOVE)
    if head.shard is not None:
        bad = head.shard.any(bad)
    if bad.any():
        _redo(head, hidden, low, rows, out, bad.nonzero()[:, 0])
    if keep is not None:
        keep.place_(targets, rows.target_fix())
    return rows, grad


@dataclass(frozen=True)
class _Sweep:
    """What a sweep fills besides the sums, all of it for one offset a row; each may be left out."""

    unit: Tensor | None  # [n, H], dlogp/dh
    unit_low: Tensor | None  # [n, r], dlogp/dlow
    keep: Kept | None


def _sweep(head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, out: _Sweep) -> None:
    """Fill `rows.rest` and `out`, for the present offset."""
    units = [] if out.unit is None else [(out.unit, head.weight)]
    if out.unit_low is not None and head.up is not None:
        units.append((out.unit_low, head.up))
    for total in (rows.rest, *(grad for grad, _ in units)):
        total.zero_()
    size = pick(hidden.shape[0], head.weight.shape[0], hidden.device.type).rows
    unit = None if out.unit is None else out.unit.split(size)
    unit_low = None if out.unit_low is None else out.unit_low.split(size)
    for part, start, stop, tile, block in _exponentials(head, hidden, low, rows, keep=out.keep):
        if unit is not None:
            _addmm(unit[part.index], tile, block)
        if unit_low is not None:
            _addmm(unit_low[part.index], tile, head.up_block(start, stop))
    head.sum_(rows.rest)
    if not units:
        return
    # dlogp/dz_v = 1[v = y] - E_v / S, and 1 - p_y = S' / S, exact as p_y -> 1.
    scale = head.logit_scale / rows.total
    for grad, matrix in units:
        grad.mul_(-scale[:, None])
        grad.addcmul_(head.at(matrix, rows.targets), (-rows.target_fix() * scale)[:, None])
        head.sum_(grad)


@dataclass(frozen=True)
class _Part:
    """Views of the rows that share a tile, made once a pass: 60 us each, cold, between GEMMs that fill the caches."""

    index: int
    some: slice
    rows: Tensor  # [n, H], as the GEMM takes them
    low: Tensor | None  # [n, r]
    offset: Tensor  # [n]
    rest: Tensor  # [n]
    targets: Tensor  # [n]
    fix: Tensor | None  # [n]


def _parts(
    head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, size: int, fix: Tensor | None
) -> tuple[_Part, ...]:
    count, scaled = hidden.shape[0], head.rows(hidden)
    found = []
    for index, first in enumerate(range(0, count, size)):
        some = slice(first, min(first + size, count))
        vectors = (rows.offset[some], rows.rest[some], rows.targets[some], None if fix is None else fix[some])
        found.append(_Part(index, some, scaled[some], None if low is None else low[some], *vectors))
    return tuple(found)


def _exponentials(
    head: Head,
    hidden: Tensor,
    low: Tensor | None,
    rows: Rows,
    *,
    keep: Kept | None = None,
    fix: Tensor | None = None,
) -> Iterator[tuple[_Part, int, int, Tensor, Tensor]]:
    """Yield (rows, start, stop, E [n, c] with `fix`, or 0, at the targets, weight block) and add to `rows.rest`."""
    vocab, count = head.weight.shape[0], hidden.shape[0]
    size = pick(count, vocab, hidden.device.type)
    columns = keep.columns if keep is not None else size.columns
    parts = _parts(head, hidden, low, rows, size.rows, fix)
    spare = torch.empty(0 if keep else size.rows * columns, dtype=torch.float32, device=hidden.device)
    views: dict[tuple[int, int], Tensor] = {}
    for start in range(0, vocab, columns):
        stop = min(start + columns, vocab)
        block = head.block(start, stop)
        for part in parts:
            if keep is not None:
                tile = keep.tile(start, stop)[part.some]
            else:
                shape = (part.rows.shape[0], stop - start)
                if shape not in views:
                    views[shape] = spare[: math.prod(shape)].view(shape)
                tile = views[shape]
            slope = head.project_(part.rows, block, start, tile, part.low)
            rows.epilogue(tile, part.offset, part.rest, part.targets, start, part.fix if slope is None else None)
            if slope is not None:
                tile.mul_(slope)
                if part.fix is not None:
                    place_(tile, part.targets, start, part.fix)
            yield part, start, stop, tile, block


def _addmm(out: Tensor, left: Tensor, right: Tensor, *, add: bool = True) -> None:
    """out (+)= left @ right in float32. bfloat16 `right` (CUDA) takes bfloat16 exponentials, whose range holds 2^64."""
    if right.dtype == torch.bfloat16:
        if add:
            torch.addmm(out, left.bfloat16(), right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left.bfloat16(), right, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(left, right if right.dtype == torch.float32 else right.float())
    else:
        torch.mm(left, right.float(), out=out)


def _redo(head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, out: _Sweep, index: Tensor) -> None:
    """The rows of `index` again, with their true maximum as the offset."""
    some, some_low = hidden[index], None if low is None else low[index]
    part = rows.of(index, offset=offset_of(_maximum(head, some, some_low)))
    again = _Sweep(
        None if out.unit is None else out.unit[index],
        None if out.unit_low is None else out.unit_low[index],
        None if out.keep is None else Kept.empty(index.numel(), head, out.keep.columns),
    )
    _sweep(head, some, some_low, part, again)
    rows.offset[index], rows.rest[index], rows.redone = part.offset, part.rest, index
    for whole, fresh in ((out.unit, again.unit), (out.unit_low, again.unit_low)):
        if whole is not None and fresh is not None:
            whole[index] = fresh
    if out.keep is not None and again.keep is not None:
        for (_, _, tile), (_, _, fresh) in zip(out.keep.tiles(), again.keep.tiles(), strict=True):
            tile[index] = fresh


def _maximum(head: Head, hidden: Tensor, low: Tensor | None) -> Tensor:
    """Largest logit of each row, of the whole vocabulary. [n]"""
    vocab, count = head.weight.shape[0], hidden.shape[0]
    size, scaled = pick(count, vocab, hidden.device.type), head.rows(hidden)
    peak = torch.full((count,), -math.inf, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, size.columns):
        block = head.block(start, min(start + size.columns, vocab))
        for first in range(0, count, size.rows):
            some = slice(first, first + size.rows)
            tile = torch.empty(scaled[some].shape[0], block.shape[0], dtype=torch.float32, device=hidden.device)
            head.project_(scaled[some], block, start, tile, None if low is None else low[some])
            peak[some] = torch.maximum(peak[some], tile.amax(1))
    if head.shard is not None:
        head.shard.max_(peak)
    return peak


def weight_grad(
    head: Head,
    hidden: Tensor,  # [N, H]
    rows: Rows,
    upstream: Tensor,  # [N] dloss/dlogp
    *,
    grad_weight: Tensor | None,  # [V, H] float32, or, if nothing is added to it, the weight's own dtype
    grad_bias: Tensor | None,  # [V] float32
    keep: Kept | None = None,
    add: bool = False,
    low: Tensor | None = None,  # [N, r] float32
    grad_up: Tensor | None = None,  # [V, r] float32
) -> None:
    """dW = E^T (c h), db = E^T c and dB = E^T (c low) with c = -upstream / S, written or added.

    1U with `keep`, else 2U, E made again. A block of dW is summed in float32 and rounded once.
    """
    if not add:
        for grad in (grad_weight, grad_bias, grad_up):
            if grad is not None and (grad is grad_bias or hidden.shape[0] == 0):
                grad.zero_()
    apart = rows.redone if keep is None else None
    whole = grad_weight
    if apart is not None and whole is not None and whole.dtype != torch.float32:
        # Two sums that only together are dW: rounding each would round twice.
        grad_weight = torch.empty(whole.shape, dtype=torch.float32, device=whole.device)
    together = upstream if apart is None else upstream.index_fill(0, apart, 0)
    coef = -together.float() / rows.total
    weighted = hidden.float() * (coef * head.logit_scale)[:, None]
    if head.wide and hidden.dtype == torch.bfloat16:
        weighted = weighted.bfloat16()
    weighted_low = None if low is None else low * (coef * head.logit_scale)[:, None]
    rounded = None if grad_weight is None else _block_sum(grad_weight, hidden.shape[0], keep)
    for some, start, stop, tile in _final_tiles(head, hidden, low, rows, keep):
        more = add or some.start > 0
        if grad_weight is not None:
            block = grad_weight[start:stop] if rounded is None else rounded[: stop - start]
            _addmm(block, tile.T, weighted[some], add=more)
            if rounded is not None and some.stop == hidden.shape[0]:
                grad_weight[start:stop] = block
        if grad_up is not None and weighted_low is not None:
            _addmm(grad_up[start:stop], tile.T, weighted_low[some], add=more)
        if grad_bias is not None:
            # Not a GEMV: its plain order of summation loses 3x the accuracy of sum's cascade over 500 rows.
            grad_bias[start:stop] += (tile * coef[some, None]).sum(0)
    if apart is not None:
        # Far from the target a logit's rounding is large, and differs with the shape of the GEMM: these rows are made
        # again in the shape in which their S was summed, so that their probabilities sum to 1.
        weight_grad(
            head,
            hidden[apart],
            rows.of(apart),
            upstream[apart],
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            add=True,
            low=None if low is None else low[apart],
            grad_up=grad_up,
        )
    if whole is not None and grad_weight is not None and grad_weight is not whole:
        whole.copy_(grad_weight)


def _block_sum(grad_weight: Tensor, rows: int, keep: Kept | None) -> Tensor | None:
    """Where a block of a half-precision dW is summed, [c, H] float32; None where dW is float32 itself."""
    if grad_weight.dtype == torch.float32:
        return None
    vocab, width = grad_weight.shape
    columns = pick(rows, vocab, grad_weight.device.type).columns if keep is None else keep.columns
    return torch.empty(min(columns, vocab), width, dtype=torch.float32, device=grad_weight.device)


def _final_tiles(
    head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, keep: Kept | None
) -> Iterator[tuple[slice, int, int, Tensor]]:
    """E with its targets fixed, block by block: kept, or made again."""
    if keep is not None:
        for start, stop, tile in keep.tiles():
            yield slice(0, keep.rows), start, stop, tile
        return
    fix = rows.target_fix()
    again = dataclasses.replace(rows, rest=torch.zeros_like(rows.rest))
    for part, start, stop, tile, _ in _exponentials(head, hidden, low, again, fix=fix):
        yield part.some, start, stop, tile
