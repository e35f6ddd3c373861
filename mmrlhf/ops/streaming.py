"""The torch backend of the head, and the frame of the cpu one: logits a block of the vocabulary at a time.

[N, V] is never made unless asked for. One offset a row, known before the first block: k = rint(z_y * log2(e)), the
target's logit z_y being a gather-dot with its row of `weight`. Then E = 2^(z * log2(e) - k) needs no running maximum, a
block is one GEMM and one pass (`exp2_rowsum_`, the part that the cpu backend compiles) over a reused tile, and dX = E W
and dW = E^T (..) are plain GEMMs. The target's column is left out of E and of its sum S': logp = -log1p(S' / E_y) keeps
its relative precision as p_y -> 1.

S' above 2^64 (logp < -44 nats) is rare: such rows are found afterwards (one bool read) and done again with their true
maximum in the place of z_y. float32 arithmetic throughout; half precisions are raised block by block on the CPU, and
multiplied into float32 by the GEMM itself on CUDA. Not covered: float64 (ops.reference), a sharded weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.ops.reference import FusedPreferenceOutput, Objective

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
REDO_ABOVE = 2.0**64


@dataclass(frozen=True)
class Tiles:
    rows: int
    columns: int


# Measured on 2 cores (1 MiB L2 each), H = 896: a [512, 1024] float32 tile is within 1% of the best; tiles of 8 MiB and
# more cost up to 2x in the GEMM. On CUDA a tile only has to fill the device and bound the memory.
_TILE_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
_ROWS = {"cpu": 512, "cuda": 8192}
_COLUMNS = {"cpu": 2048, "cuda": 16384}


def pick(rows: int, vocab: int, device_type: str = "cpu") -> Tiles:
    """Tile of logits for N rows and V columns: full rows up to a cap, columns from what is left of the byte budget."""
    kind = device_type if device_type in _TILE_BYTES else "cuda"
    tile_rows = max(1, min(rows, _ROWS[kind]))
    columns = _TILE_BYTES[kind] // (4 * tile_rows)
    return Tiles(tile_rows, max(1, min(vocab, columns, _COLUMNS[kind])))


def exp2_(logits: Tensor, offset: Tensor) -> Tensor:
    """logits <- 2^(logits * log2(e) - offset), in place.

    The offset is taken off first: a product is rounded in proportion to its size, small near the target.
    (exp_ would save the product, and takes 2.8x as long as exp2_ here.)
    """
    return logits.sub_(offset * LN2).mul_(LOG2E).exp2_()


def exp2_rowsum_(tile: Tensor, offset: Tensor) -> Tensor:
    """tile [n, c] <- 2^(tile * log2(e) - offset [n]), in place; returns row sums [n]: all a compiled epilogue does."""
    return exp2_(tile, offset[:, None]).sum(1)


Epilogue = Callable[[Tensor, Tensor], Tensor]


def offset_of(logit: Tensor) -> Tensor:
    return (logit * LOG2E).round()


@dataclass(frozen=True)
class Head:
    """z = softcap * tanh((logit_scale * h W^T + bias) / softcap), or without the cap."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None

    @property
    def wide(self) -> bool:
        """Whether the GEMM takes half precision and gives float32 by itself."""
        return self.weight.device.type == "cuda" and self.weight.dtype != torch.float32

    def block(self, start: int, stop: int) -> Tensor:
        """Rows of the weight in the dtype the GEMMs take. [stop - start, H]

        Contiguous, as hidden is, so that a strided input gives bitwise what its copy gives.
        """
        block = self.weight[start:stop].contiguous()
        return block if self.wide else block.float()

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden rows in the dtype the GEMMs take."""
        return hidden if self.wide else hidden.float()

    def project_(self, rows: Tensor, block: Tensor, start: int, tile: Tensor) -> Tensor | None:
        """tile [n, c] <- logits z; returns their slope dz / d(uncapped z) [n, c] where there is a cap."""
        if self.wide:
            torch.mm(rows, block.T, out_dtype=torch.float32, out=tile)
        else:
            torch.mm(rows, block.T, out=tile)
        return self._finish_(tile, slice(start, start + block.shape[0]))

    def target(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """The targets' logits z_y [n] by gather-dot, and their slope [n] where there is a cap."""
        z = (rows.float() * self.weight[targets].float()).sum(1)
        return z, self._finish_(z, targets)

    def _finish_(self, z: Tensor, columns: slice | Tensor) -> Tensor | None:
        """Products to logits, in place: scale, bias, cap."""
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        if self.bias is not None:
            z.add_(self.bias[columns].float())
        if self.softcap is None:
            return None
        # 1 - tanh(a)^2 as 4 sigmoid(2a) sigmoid(-2a): by subtraction a saturated logit would keep no digit of it.
        twice = z.mul_(1 / self.softcap) * 2
        slope = torch.sigmoid(twice).mul_(torch.sigmoid(-twice)).mul_(4)
        z.tanh_().mul_(self.softcap)
        return slope


@dataclass
class Rows:
    """What a pass over the vocabulary knows of n rows."""

    targets: Tensor  # [n] int64
    z_y: Tensor  # [n] target logit
    slope_y: Tensor | None  # [n]
    offset: Tensor  # [n] k, an integer
    rest: Tensor  # [n] S'
    redone: Tensor | None = None  # indices of the rows whose offset is their true maximum
    epilogue: Epilogue = exp2_rowsum_  # makes every exponential, E_y too: what it rounds alike cancels in S' / E_y

    def of(self, index: Tensor, *, offset: Tensor | None = None) -> Rows:
        """Some of the rows, as copies."""
        slope_y = None if self.slope_y is None else self.slope_y[index]
        offset = self.offset[index] if offset is None else offset
        return Rows(self.targets[index], self.z_y[index], slope_y, offset, self.rest[index], epilogue=self.epilogue)

    @property
    def e_y(self) -> Tensor:
        return self.epilogue(self.z_y.clone()[:, None], self.offset)

    @property
    def total(self) -> Tensor:
        """S = S' + E_y."""
        return self.rest + self.e_y

    def logp(self) -> Tensor:
        # Where k is the row's maximum (a row done again) E_y may be 0; a difference of logarithms is exact enough.
        far = self.z_y - self.offset * LN2 - torch.log(self.total)
        return torch.where(self.offset == offset_of(self.z_y), -torch.log1p(self.rest / self.e_y), far)

    def target_fix(self) -> Tensor:
        """What the target's column of E has to be for E / S to be p - onehot: -S', times its slope. [n]"""
        return -self.rest if self.slope_y is None else -self.rest * self.slope_y


class Kept:
    """Exponentials of [n, V] in one flat buffer, cut into contiguous [n, c] tiles, one a block of the vocabulary."""

    def __init__(self, flat: Tensor, rows: int, vocab: int, columns: int):
        self.flat, self.rows, self.vocab, self.columns = flat, rows, vocab, columns

    @classmethod
    def empty(cls, rows: int, head: Head, columns: int | None = None) -> Kept:
        vocab, device = head.weight.shape[0], head.weight.device
        flat = torch.empty(rows * vocab, dtype=torch.float32, device=device)
        return cls(flat, rows, vocab, columns or pick(rows, vocab, device.type).columns)

    @classmethod
    def over(cls, flat: Tensor, rows: int, head: Head) -> Kept:
        """The same over the first bytes of a larger `flat` [bytes]."""
        vocab = head.weight.shape[0]
        some = flat[: 4 * rows * vocab].view(torch.float32)
        return cls(some, rows, vocab, pick(rows, vocab, flat.device.type).columns)

    def tile(self, start: int, stop: int) -> Tensor:
        return self.flat[start * self.rows : stop * self.rows].view(self.rows, stop - start)

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        for start in range(0, self.vocab, self.columns):
            stop = min(start + self.columns, self.vocab)
            yield start, stop, self.tile(start, stop)


def row_bytes(head: Head) -> int:
    """Bytes of the exponentials of one row."""
    return 4 * head.weight.shape[0]


def objective(o: Objective, logp: Tensor) -> tuple[FusedPreferenceOutput, Tensor]:
    """Everything after the log-probabilities [N], and d loss / d logp [N]; the result carries no gradient."""
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        result = o(leaf)
        (coef,) = torch.autograd.grad(result.loss, leaf)
    return dataclasses.replace(result, loss=result.loss.detach()), coef


def _place(tile: Tensor, targets: Tensor, start: int, value: float | Tensor) -> None:
    """Write `value` into each row's target column, where the block has it, without waiting for the device."""
    local = targets - start
    inside = (local >= 0) & (local < tile.shape[1])
    index = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside, value, tile.gather(1, index)[:, 0])[:, None])


def _exponentials(
    head: Head, hidden: Tensor, rows: Rows, *, keep: Kept | None = None
) -> Iterator[tuple[slice, int, int, Tensor, Tensor]]:
    """Yield (row slice, start, stop, E [n, c] with 0 at the targets, weight block) and add to `rows.rest`."""
    vocab, count = head.weight.shape[0], hidden.shape[0]
    size = pick(count, vocab, hidden.device.type)
    columns = keep.columns if keep is not None else size.columns
    scaled = head.rows(hidden)
    spare = torch.empty(0 if keep else size.rows * columns, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, columns):
        stop = min(start + columns, vocab)
        block = head.block(start, stop)
        for first in range(0, count, size.rows):
            some = slice(first, min(first + size.rows, count))
            if keep is not None:
                tile = keep.tile(start, stop)[some]
            else:
                tile = spare[: (some.stop - first) * (stop - start)].view(some.stop - first, stop - start)
            slope = head.project_(scaled[some], block, start, tile)
            _place(tile, rows.targets[some], start, -math.inf)
            rows.rest[some] += rows.epilogue(tile, rows.offset[some])
            if slope is not None:
                tile.mul_(slope)
            yield some, start, stop, tile, block


def _sweep(head: Head, hidden: Tensor, rows: Rows, unit: Tensor | None, keep: Kept | None) -> None:
    """Fill `rows.rest`, `unit` [n, H] (dlogp/dh) and `keep`, all of them for the present offset."""
    rows.rest.zero_()
    if unit is not None:
        unit.zero_()
    for some, _, _, tile, block in _exponentials(head, hidden, rows, keep=keep):
        if unit is not None:
            _addmm(unit[some], tile, block)
    if unit is not None:
        # dlogp/dz_v = 1[v = y] - E_v / S, and 1 - p_y = S' / S, exact as p_y -> 1.
        scale = head.logit_scale / rows.total
        unit.mul_(-scale[:, None])
        unit.addcmul_(head.weight[rows.targets].float(), (-rows.target_fix() * scale)[:, None])


def _addmm(out: Tensor, left: Tensor, right: Tensor, *, add: bool = True) -> None:
    """out (+)= left @ right in float32. bfloat16 `right` (CUDA) takes bfloat16 exponentials, whose range holds 2^64."""
    if right.dtype == torch.bfloat16:
        if add:
            torch.addmm(out, left.bfloat16(), right, out_dtype=torch.float32, out=out)
        else:
            torch.mm(left.bfloat16(), right, out_dtype=torch.float32, out=out)
    elif add:
        out.addmm_(left, right.float())
    else:
        torch.mm(left, right.float(), out=out)


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
    unit: bool = False,
    keep: Kept | None = None,
    epilogue: Epilogue = exp2_rowsum_,
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary: 1U, and 1U more for the unit gradient dlogp/dh [N, H] float32.

    `keep` is filled with E, its target columns fixed, so that `weight_grad` needs no recompute.
    """
    targets = targets.long()
    z_y, slope_y = head.target(head.rows(hidden), targets)
    rows = Rows(targets, z_y, slope_y, offset_of(z_y), torch.empty_like(z_y), epilogue=epilogue)
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    _sweep(head, hidden, rows, grad, keep)
    bad = ~(rows.rest <= REDO_ABOVE)
    if bad.any():
        _redo(head, hidden, rows, grad, keep, bad.nonzero()[:, 0])
    if keep is not None:
        fix = rows.target_fix()
        for start, _, tile in keep.tiles():
            _place(tile, targets, start, fix)
    return rows, grad


def _redo(head: Head, hidden: Tensor, rows: Rows, unit: Tensor | None, keep: Kept | None, index: Tensor) -> None:
    """The rows of `index` again, with their true maximum as the offset."""
    some = hidden[index]
    part = rows.of(index, offset=offset_of(_maximum(head, some)))
    grad = None if unit is None else unit[index]
    kept = None if keep is None else Kept.empty(index.numel(), head, keep.columns)
    _sweep(head, some, part, grad, kept)
    rows.offset[index], rows.rest[index], rows.redone = part.offset, part.rest, index
    if unit is not None and grad is not None:
        unit[index] = grad
    if keep is not None and kept is not None:
        for (_, _, tile), (_, _, again) in zip(keep.tiles(), kept.tiles(), strict=True):
            tile[index] = again


def _maximum(head: Head, hidden: Tensor) -> Tensor:
    """Largest logit of each row. [n]"""
    vocab, count = head.weight.shape[0], hidden.shape[0]
    size, scaled = pick(count, vocab, hidden.device.type), head.rows(hidden)
    peak = torch.full((count,), -math.inf, dtype=torch.float32, device=hidden.device)
    for start in range(0, vocab, size.columns):
        block = head.block(start, min(start + size.columns, vocab))
        for first in range(0, count, size.rows):
            some = slice(first, first + size.rows)
            tile = torch.empty(scaled[some].shape[0], block.shape[0], dtype=torch.float32, device=hidden.device)
            head.project_(scaled[some], block, start, tile)
            peak[some] = torch.maximum(peak[some], tile.amax(1))
    return peak


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
    """dW = E^T (c h) and db = E^T c with c = -upstream / S, written or added: 1U with `keep`, else 2U, E made again."""
    if grad_bias is not None and not add:
        grad_bias.zero_()
    if grad_weight is not None and not add and hidden.shape[0] == 0:
        grad_weight.zero_()
    apart = rows.redone if keep is None else None
    together = upstream if apart is None else upstream.index_fill(0, apart, 0)
    coef = -together.float() / rows.total
    weighted = hidden.float() * (coef * head.logit_scale)[:, None]
    if head.wide and hidden.dtype == torch.bfloat16:
        weighted = weighted.bfloat16()
    for some, start, stop, tile in _final_tiles(head, hidden, rows, keep):
        if grad_weight is not None:
            _addmm(grad_weight[start:stop], tile.T, weighted[some], add=add or some.start > 0)
        if grad_bias is not None:
            # Not a GEMV: its plain order of summation loses 3x the accuracy of sum's cascade over 500 rows.
            grad_bias[start:stop] += (tile * coef[some, None]).sum(0)
    if apart is not None:
        # Far from the target a logit's rounding is large, and differs with the shape of the GEMM: these rows are made
        # again in the shape in which their S was summed, so that their probabilities sum to 1.
        part = (hidden[apart], rows.of(apart), upstream[apart])
        weight_grad(head, *part, grad_weight=grad_weight, grad_bias=grad_bias, add=True)


def _final_tiles(head: Head, hidden: Tensor, rows: Rows, keep: Kept | None) -> Iterator[tuple[slice, int, int, Tensor]]:
    """E with its targets fixed, block by block: kept, or made again."""
    if keep is not None:
        for start, stop, tile in keep.tiles():
            yield slice(0, keep.rows), start, stop, tile
        return
    fix = rows.target_fix()
    again = dataclasses.replace(rows, rest=torch.zeros_like(rows.rest))
    for some, start, stop, tile, _ in _exponentials(head, hidden, again):
        _place(tile, rows.targets[some], start, fix[some])
        yield some, start, stop, tile
