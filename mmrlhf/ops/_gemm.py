"""What the engines of a CUDA device share (triton and cuda): buffers of exponentials, how rows and columns are cut so
that those in flight fit a workspace, and the library's GEMMs.

E is float32 for a float32 head and bfloat16 for a bfloat16 one, whose range holds 2^64; `Kept` is one [n, V] matrix of
it. A GEMM takes operands in one half precision or float32, and sums and gives float32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.ops.streaming import Head

# Exponentials in flight where none are kept. 1/4 of the 50 MiB of an H100's L2 would keep them there but feed the GEMMs
# tiles of 40 rows; what counts is enough rows to fill the device: 1,700 of them at V = 152k in bfloat16.
WORKSPACE_BYTES = 512 << 20
ALIGNED = 16  # entries: a leading dimension that vector loads and TMA take


def padded(columns: int) -> int:
    """Leading dimension of a buffer of `columns`."""
    return -(-columns // ALIGNED) * ALIGNED


def stored(head: Head) -> torch.dtype:
    """The dtype of the exponentials: bfloat16 holds 2^64, and multiplies a bfloat16 weight."""
    return torch.float32 if head.weight.dtype == torch.float32 else torch.bfloat16


def row_bytes(head: Head) -> int:
    """Bytes of the exponentials of one row; with a sharded vocabulary, on the rank that holds most of it."""
    return padded(head.most_rows) * stored(head).itemsize


@dataclass
class Kept:
    """Exponentials [n, V] with an aligned leading dimension."""

    flat: Tensor
    rows: int
    vocab: int
    columns: int  # V: one tile

    @classmethod
    def empty(cls, rows: int, head: Head, columns: int | None = None) -> Kept:
        vocab = head.weight.shape[0]
        flat = torch.empty(rows * padded(vocab), dtype=stored(head), device=head.weight.device)
        return cls(flat, rows, vocab, vocab)

    @classmethod
    def over(cls, flat: Tensor, rows: int, head: Head) -> Kept:
        """The same over the first bytes of a larger `flat` [bytes]."""
        vocab, dtype = head.weight.shape[0], stored(head)
        return cls(flat[: rows * padded(vocab) * dtype.itemsize].view(dtype), rows, vocab, vocab)

    @property
    def matrix(self) -> Tensor:
        leading = padded(self.vocab)
        return self.flat[: self.rows * leading].view(self.rows, leading)[:, : self.vocab]

    def tiles(self, width: int) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, E [n, c]) of blocks whose dW [c, width] in float32 fits the workspace."""
        size = column_block(width, self.vocab, 4, ALIGNED)
        for start in range(0, self.vocab, size):
            yield start, min(start + size, self.vocab), self.matrix[:, start : start + size]


def most_rows(vocab: int, itemsize: int, step: int) -> int:
    """Most rows whose exponentials fit the workspace, in whole GEMM tiles of `step`."""
    return max(WORKSPACE_BYTES // (padded(max(vocab, 1)) * itemsize) // step * step, step)


def row_chunk(rows: int, vocab: int, itemsize: int, step: int) -> int:
    """Rows whose exponentials fit the workspace, in whole GEMM tiles of `step`, and chunks of about the same size."""
    most = most_rows(vocab, itemsize, step)
    chunks = -(-rows // most)
    return max(rows, 1) if chunks <= 1 else -(-rows // (chunks * step)) * step


@functools.lru_cache(maxsize=1024)
def wave_chunk(rows: int, most: int, width: int, step: int, processors: int) -> int:
    """Rows a chunk, at most `most`, a multiple of `step`, for which E W [rows, width] takes the fewest waves.

    A tile of 128 x 256 goes through the whole vocabulary, so a wave that the last tiles leave half empty costs as much
    as a full one: of H = 3584 on 132 multiprocessors 1,664 rows are 182 tiles, two waves, and 1,152 rows 126, one.
    Of equal counts the fewest chunks, and of those the most even ones.
    """
    columns = -(-width // 256)

    def waves(count: int) -> int:
        return -(-(-(-count // 128) * columns) // processors)

    def cost(size: int) -> tuple[int, int, int]:
        full, rest = divmod(rows, size)
        return full * waves(size) + waves(rest), full + (rest > 0), size

    whole = -(-max(rows, 1) // step) * step
    best = min(range(step, min(whole, most) + 1, step), key=cost)
    return max(rows, 1) if best == whole else best


def column_block(rows: int, vocab: int, itemsize: int, step: int) -> int:
    """Columns whose tile of n rows fits the workspace, in whole tiles of `step`."""
    most = WORKSPACE_BYTES // (max(rows, 1) * itemsize) // step * step
    return max(1, min(vocab, max(most, step)))


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right in float32."""
    if left.dtype == torch.float32:
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    if out is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def multiply(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """out (+)= left @ right, in the dtype of `right`; a half-precision `out` is rounded to once, and not added to."""
    left = left.to(right.dtype)
    if out.dtype != torch.float32:
        assert not add, "a half-precision sum of several products would be rounded several times"
        torch.mm(left, right, out=out)  # dW [V, H]: so many tiles that none is cut, and summed in halves, along n
    elif not add:
        product(left, right, out)
    elif right.dtype == torch.float32:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=torch.float32, out=out)


def multiply_exact(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """`multiply` for a narrow float32 `right`: a bfloat16 `left` meets it as two bfloat16 matrices, 16 bits in all."""
    if left.dtype == torch.float32:
        multiply(out, left, right, add=add)
        return
    for which, part in enumerate(in_two(right)):
        multiply(out, left, part, add=add or which > 0)


def column_sums(tile: Tensor, coef: Tensor) -> Tensor:
    """tile^T coef [c] float32; for bfloat16 a GEMM with coef as two bfloat16 columns, which together keep 16 bits."""
    if tile.dtype == torch.float32:
        return (tile * coef[:, None]).sum(0)
    return product(tile.T, torch.cat(in_two(coef[:, None]), 1)).sum(1)


def in_two(value: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the sum of two bfloat16 ones, to 2^-17 of it."""
    high = value.bfloat16()
    return high, (value - high.float()).bfloat16()
