"""The cuda backend of the head: the functions of `streaming`, on the compiled kernels of kernels/cuda.

Two ways to the exponentials E = 2^(z log2(e) - k). On Hopper, from bfloat16 and without a cap, one GEMM makes them and
their sums (`exp2_gemm_sm90_`, where the build had CUTLASS), whole rows at a time. Everywhere else a library GEMM makes
float32 logits a block of columns at a time, and one pass reads the block and writes E. Around them, one launch each:
the targets' logits, the sums' end, the unit gradient, and everything after the log-probabilities.
E is float32 for a float32 head and bfloat16 for a bfloat16 one, `Kept` one [n, V] matrix of it. Rows with S' above 2^64
are found with one bool read, which waits, and go through `streaming`. Not covered: float16 (its range does not hold E,
and its GEMM takes no bfloat16), float64, an adapter on the head, a sharded vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf import _C as device
from mmrlhf.ops import _compiled, streaming
from mmrlhf.ops._cuda_passes import (
    DeviceRows,
    exp2_rowsum_,
    hopper_plan,
    multiply,
    packed,
    padded,
    product,
    rows_of,
    stored,
    stream_of,
    sweep_columns,
    sweep_rows,
    tiles_again,
)
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective
from mmrlhf.ops.streaming import REDO_ABOVE, Head, Rows


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
        vocab = head.weight.shape[0]
        return cls(flat[: rows * row_bytes(head)].view(stored(head)), rows, vocab, vocab)

    @property
    def matrix(self) -> Tensor:
        leading = padded(self.vocab)
        return self.flat[: self.rows * leading].view(self.rows, leading)[:, : self.vocab]


def row_bytes(head: Head) -> int:
    """Bytes of the exponentials of one row."""
    return padded(head.weight.shape[0]) * stored(head).itemsize


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    about = device.build_info()
    if not about["cuda"]:
        return "the compiled extension was built without CUDA"
    if any(t.device.type != "cuda" for t in tensors):
        return f"its tensors must be on a CUDA device, not {tensors[0].device}"
    if any(t.dtype not in (torch.float32, torch.bfloat16) for t in tensors):
        return f"it takes float32 and bfloat16, not {str(tensors[0].dtype).removeprefix('torch.')}"
    major, minor = torch.cuda.get_device_capability(tensors[0].device)
    if not runs_on(about["cuda_archs"], 10 * major + minor):
        return f"it was built for {about['cuda_archs']}, this device has compute capability {major}.{minor}"
    return None


def runs_on(architectures: str, capability: int) -> bool:
    """Whether code for `architectures`, in CMake's notation, runs on a device of 10 * major + minor.

    Machine code runs on its own major version from its minor on, PTX on everything later; what is for one
    architecture alone (90a) runs there alone.
    """
    for each in architectures.split():
        name, _, kind = each.partition("-")
        digits = name.rstrip("af")
        if not digits.isdigit():  # native, all, all-major
            return True
        version = int(digits)
        if name != digits:
            fits = capability == version
        else:
            fits = capability >= version and (kind != "real" or capability // 10 == version // 10)
        if fits:
            return True
    return False


def forward(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
    unit: bool = False,
    keep: Kept | None = None,
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary, and the unit gradient dlogp/dh [N, H] float32: see `streaming.forward`."""
    head, hidden = packed(head), hidden.detach().contiguous()
    rows = rows_of(head, hidden, targets.long().contiguous())
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    kept = None if keep is None else keep.matrix
    plan = hopper_plan(head, hidden)
    if plan is None:
        sweep_columns(head, hidden, rows, grad, kept)
    else:
        sweep_rows(head, hidden, rows, grad, kept, plan)
    bad = ~(rows.rest <= REDO_ABOVE)
    if kept is not None:
        kept.scatter_(1, rows.targets[:, None], rows.target_fix().to(kept.dtype)[:, None])
    if bad.any():
        _redo(head, hidden, rows, grad, kept, bad.nonzero()[:, 0])
    return rows, grad


def _redo(
    head: Head, hidden: Tensor, rows: DeviceRows, unit: Tensor | None, kept: Tensor | None, index: Tensor
) -> None:
    """The rows of `index` again by `streaming`, which takes their true maximum as the offset."""
    again = None if kept is None else streaming.Kept.empty(index.numel(), head)
    some, grad = streaming.forward(head, hidden[index], rows.targets[index], unit=unit is not None, keep=again)
    rows.z_y[index], rows.offset[index], rows.rest[index], rows.redone = some.z_y, some.offset, some.rest, index
    if rows.known is not None:
        rows.known[index] = some.logp()
    if rows.slope_y is not None and some.slope_y is not None:
        rows.slope_y[index] = some.slope_y
    if unit is not None and grad is not None:
        unit[index] = grad
    if kept is not None and again is not None:
        for start, stop, tile in again.tiles():
            kept[index, start:stop] = tile.to(kept.dtype)


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
) -> None:
    """dW = E^T (c h) and db = E^T c with c = -upstream / S, written or added: see `streaming.weight_grad`."""
    head, hidden = packed(head), hidden.detach().contiguous()
    apart = rows.redone if keep is None else None
    whole = grad_weight
    if apart is not None and whole is not None and whole.dtype != torch.float32:
        # Two sums that only together are dW: rounding each would round twice.
        grad_weight = torch.empty(whole.shape, dtype=torch.float32, device=whole.device)
    together = upstream if apart is None else upstream.index_fill(0, apart, 0)
    coef = -together.float() / dataclasses.replace(rows, epilogue=exp2_rowsum_).total
    weighted = (hidden.float() * (coef * head.logit_scale)[:, None]).to(head.weight.dtype)
    for start, stop, tile in _final_tiles(head, hidden, rows, keep):
        if grad_weight is not None:
            multiply(grad_weight[start:stop], tile.T, weighted, add=add)
        if grad_bias is not None:
            total = _column_sums(tile, coef)
            grad_bias[start:stop] = grad_bias[start:stop] + total if add else total
    if apart is not None:
        part = (hidden[apart], rows.of(apart), upstream[apart])
        plain = dataclasses.replace(part[1], epilogue=streaming.exp2_rowsum_)
        streaming.weight_grad(head, part[0], plain, part[2], grad_weight=grad_weight, grad_bias=grad_bias, add=True)
    if whole is not None and grad_weight is not None and grad_weight is not whole:
        whole.copy_(grad_weight)


def _column_sums(tile: Tensor, coef: Tensor) -> Tensor:
    """tile^T coef [c] float32; for bfloat16 a GEMM with coef as two bfloat16 columns, which together keep 16 bits."""
    if tile.dtype == torch.float32:
        return (tile * coef[:, None]).sum(0)
    high = coef.bfloat16()
    both = torch.empty(tile.shape[1], 2, dtype=torch.float32, device=tile.device)
    product(tile.T, torch.stack([high, (coef - high.float()).bfloat16()], 1), both)
    return both.sum(1)


def _final_tiles(head: Head, hidden: Tensor, rows: Rows, keep: Kept | None) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c] with its targets fixed): kept whole, or made again a block of columns at a time."""
    if keep is not None:
        yield 0, head.weight.shape[0], keep.matrix
        return
    fix = rows.target_fix()
    for start, stop, tile in tiles_again(head, hidden, rows):
        streaming._place(tile, rows.targets, start, fix.to(tile.dtype))
        yield start, stop, tile


def objective(o: Objective, logp: Tensor) -> tuple[FusedPreferenceOutput, Tensor]:
    """`Objective.__call__` and d loss / d logp [N], in one launch. `logp` [N] is float32; no result has a gradient."""
    sizes = 3 * (o.cu_seqlens.numel() - 1) + 2 * o.pairs.shape[0]
    scratch = torch.empty(sizes, dtype=torch.float64, device=logp.device)
    return _compiled.objective(device.preference_cuda, o, logp, scratch=scratch, stream=stream_of(logp))
