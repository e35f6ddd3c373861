"""The cuda backend of the head: the functions of `streaming`, on the compiled kernels of kernels/cuda.

Two ways to the exponentials E = 2^(z log2(e) - k). On Hopper, from bfloat16, one GEMM makes them and their sums
(`exp2_gemm_sm90_`, where the build had CUTLASS), whole rows at a time. Everywhere else, and with an adapter, a library
GEMM makes float32 logits a block of columns at a time, and one pass reads the block and writes E. Around them, one
launch each: the targets' logits, the sums' end, the unit gradient, and everything after the log-probabilities.
E is float32 for a float32 head and bfloat16 for a bfloat16 one, `Kept` one [n, V] matrix of it. Rows with S' above 2^64
are found and run again on the device: nothing here waits for it, and a CUDA graph can hold all of it (but for a
vocabulary on several ranks, whose reductions are the process group's). Not covered: float64, and float16, whose range
does not hold E, and whose GEMM takes no bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmrlhf import _C as device
from mmrlhf.ops import _compiled
from mmrlhf.ops._cuda_passes import (
    Statistics,
    Units,
    block_of,
    exp2_rowsum_,
    finish,
    finish_units,
    hopper_plan,
    packed,
    rows_of,
    stream_of,
    sweep_columns,
    sweep_rows,
    sweep_statistics,
    tiles_again,
)
from mmrlhf.ops._cuda_redo import exponentials_, redo, select
from mmrlhf.ops._gemm import Kept, row_bytes  # noqa: F401  (an engine has both)
from mmrlhf.ops._head_grad import sum_gradients
from mmrlhf.ops.head import place_
from mmrlhf.ops.reference import FusedPreferenceOutput, Objective
from mmrlhf.ops.streaming import Head, Rows


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
    low: Tensor | None = None,  # [N, r] float32, with head.up
    unit_low: Tensor | None = None,  # [N, r] float32 out: dlogp/dlow
) -> tuple[Rows, Tensor | None]:
    """One pass over the vocabulary, and the unit gradient dlogp/dh [N, H] float32: see `streaming.forward`."""
    head, hidden = packed(head), hidden.detach().contiguous()
    low = None if low is None else low.detach().contiguous()
    rows = rows_of(head, hidden, head.local(targets).contiguous(), low)
    grad = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if unit else None
    units, kept = Units(grad, unit_low), None if keep is None else keep.matrix
    plan = hopper_plan(head, hidden)
    if plan is None:
        sweep_columns(head, hidden, low, rows, units, kept)
    else:
        sweep_rows(head, hidden, rows, units, kept, plan)
    if head.shard is not None:
        head.sum_(rows.rest)
        finish(rows, slice(None), rows.rest[None])  # log-probabilities from the whole sum
    finish_units(head, rows, units)
    redo(head, hidden, rows, unit=grad, kept=kept, low=low, unit_low=unit_low)
    for part, _ in units.of(head):
        head.sum_(part)
    if kept is not None and kept.numel():
        place_(kept, rows.targets, 0, rows.target_fix().to(kept.dtype))
    return rows, grad


def statistics(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
) -> tuple[Statistics, Statistics]:
    """What has `logp()`, and the statistics, in one pass that stores no exponential."""
    found = sweep_statistics(packed(head), hidden.detach().contiguous(), targets.long().contiguous())
    return found, found


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
    head, hidden = packed(head), hidden.detach().contiguous()
    low = None if low is None else low.detach().contiguous()
    coef = -upstream.float() / dataclasses.replace(rows, epilogue=exp2_rowsum_).total
    sum_gradients(head, hidden, coef, _final_tiles(head, hidden, low, rows, keep), low=low, **grads)


def _final_tiles(
    head: Head, hidden: Tensor, low: Tensor | None, rows: Rows, keep: Kept | None
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, E [n, c] with its targets fixed) a block of columns at a time: kept, or made again."""
    if keep is not None:
        yield from keep.tiles(hidden.shape[1])
        return
    fix, redone = rows.target_fix(), select(rows, done=True)
    for start, stop, tile in tiles_again(head, hidden, low, rows):
        exponentials_(block_of(head, start, stop), hidden, rows, redone, tile, start=start, low=low)
        place_(tile, rows.targets, start, fix.to(tile.dtype))
        yield start, stop, tile


def objective(o: Objective, logp: Tensor) -> tuple[FusedPreferenceOutput, Tensor]:
    """`Objective.__call__` and d loss / d logp [N], in one launch. `logp` [N] is float32; no result has a gradient."""
    sizes = 3 * (o.cu_seqlens.numel() - 1) + 2 * o.pairs.shape[0]
    scratch = torch.empty(sizes, dtype=torch.float64, device=logp.device)
    return _compiled.objective(device.preference_cuda, o, logp, scratch=scratch, stream=stream_of(logp))
