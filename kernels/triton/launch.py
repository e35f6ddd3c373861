"""Launchers: what is between tensors and the kernels. Each writes into tensors it is given, and waits for nothing.

    target_logit -> (exp2_gemm | library GEMM + exp2_epilogue, a block of columns at a time) -> finish -> unit_gradient_

Arguments were checked by `mmrlhf.ops`; an assert here holds what a kernel would read out of bounds without. With
TRITON_INTERPRET=1, set before the first import, all of it runs on CPU tensors in float32.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import triton
from mmrlhf.kernels.triton import configs
from mmrlhf.kernels.triton import linear_logp as device
from mmrlhf.kernels.triton import rows as by_row
from mmrlhf.kernels.triton.configs import EpilogueConfig, GemmConfig, Problem
from mmrlhf.kernels.triton.statistics import STATISTICS, Statistics, finish_arguments

LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Epilogue:
    """z = logit_scale * <h, W_v> + b, then softcap * tanh(z / softcap) with a cap."""

    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def factors(self) -> tuple[float, float, float]:
        """gain, bias_gain, cap: x = gain * raw + bias_gain * b, and z log2(e) is x, or cap * tanh(x)."""
        if self.softcap is None:
            return self.logit_scale * LOG2E, LOG2E, 1.0
        return self.logit_scale / self.softcap, 1.0 / self.softcap, self.softcap * LOG2E


@functools.cache
def multiprocessors(index: int) -> int:
    """Of CUDA device `index`."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(tensor: Tensor) -> int:
    """Multiprocessors of a CUDA tensor's device; for another, whose kernels are interpreted, a few."""
    return multiprocessors(tensor.device.index) if tensor.device.type == "cuda" else 4


def interpreted() -> bool:
    """Whether the kernels were decorated for the interpreter, which runs them on CPU tensors."""
    return not isinstance(by_row.finish_kernel, triton.JITFunction)


def arch(tensor: Tensor) -> int:
    """10 * major + minor of a CUDA tensor's device; 90 for another, whose kernels are interpreted."""
    if tensor.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def aligned(*tensors: Tensor) -> bool:
    """Whether the matrices have a 16-byte aligned base, columns side by side, and rows of a multiple of 16 entries.

    Triton specialises on such strides, and TMA, which asks for 16 bytes, is content with them.
    """
    return all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0 for t in tensors)


def problem(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    *,
    bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    statistics: bool = False,
) -> Problem:
    """The head as `configs.pick` sees it."""
    return Problem(
        arch=arch(hidden),
        rows=hidden.shape[0],
        width=hidden.shape[1],
        vocab=weight.shape[0],
        dtype=str(hidden.dtype).removeprefix("torch."),
        aligned=aligned(hidden, weight),
        bias=bias is not None,
        softcap=softcap is not None,
        statistics=statistics,
    )


def partial_tiles(columns: int, config: GemmConfig | EpilogueConfig) -> int:
    """How many partial sums a row of `columns` leaves."""
    if isinstance(config, GemmConfig):
        return -(-columns // config.block_v) * config.split
    return -(-columns // config.tile_columns)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def by_columns(*tensors: Tensor | None) -> None:
    """An invariant of every kernel: a matrix has its columns side by side (of one column, or none, any stride is)."""
    for tensor in tensors:
        if tensor is not None and tensor.dim() > 1 and tensor.numel() and tensor.shape[1] > 1:
            assert tensor.stride(1) == 1, "the last dimension must be contiguous"


def _check_partial(partial: Tensor, tiles: int, rows: int) -> None:
    wanted = (tiles, rows)
    assert partial.shape[1:] == wanted, f"partial must be [1 or 5, tiles, N] with {wanted}, got {list(partial.shape)}"
    assert partial.stride(2) == 1, "partial must have its rows side by side"


def target_logit(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    *,
    bias: Tensor | None,  # [V]
    epilogue: Epilogue,
    z_y: Tensor,  # [N] out, float32, nats
    slope_y: Tensor | None,  # [N] out, float32, with a softcap
    offset: Tensor,  # [N] out, float32
) -> None:
    """The target's logit z_y, the slope of the cap there, and the row's offset k = rint(z_y log2(e))."""
    by_columns(hidden, weight)
    rows, width = hidden.shape
    assert (epilogue.softcap is None) == (slope_y is None)
    if rows == 0:
        return
    config = configs.TARGET_LOGIT
    with on_device(hidden):
        by_row.target_logit_kernel[(triton.cdiv(rows, config.block_m),)](
            hidden,
            weight,
            bias,
            target.contiguous(),
            z_y,
            slope_y,
            offset,
            rows,
            weight.shape[0],
            width,
            hidden.stride(0),
            weight.stride(0),
            float(epilogue.logit_scale),
            float(epilogue.softcap or 1.0),
            SOFTCAP=epilogue.softcap is not None,
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_other,
            num_warps=config.num_warps,
        )


def exp2_epilogue(
    tile: Tensor,  # [N, c] float32, <h, W_v> for v in [start, start + c)
    out: Tensor | None,  # [N, c] out, float32 or bfloat16; may be `tile`
    *,
    start: int,
    target: Tensor,  # [N]
    offset: Tensor,  # [N]
    bias: Tensor | None,  # [c]: the block's part
    epilogue: Epilogue,
    partial: Tensor,  # [statistics, tiles, N] out, float32
    config: EpilogueConfig,
) -> None:
    """E of one block of columns, 0 at the targets, and its partial sums."""
    by_columns(tile, out)
    rows, columns = tile.shape
    tiles = partial_tiles(columns, config)
    _check_partial(partial, tiles, rows)
    if rows == 0:
        return
    with on_device(tile):
        device.exp2_epilogue_kernel[(triton.cdiv(rows, config.block_m), tiles)](
            tile,
            out,
            bias,
            offset,
            target.contiguous(),
            partial,
            rows,
            columns,
            start,
            tile.stride(0),
            0 if out is None else out.stride(0),
            partial.stride(0),
            partial.stride(1),
            *epilogue.factors,
            SOFTCAP=epilogue.softcap is not None,
            STATS=partial.shape[0] == STATISTICS,
            BLOCK_M=config.block_m,
            BLOCK_V=config.block_v,
            num_warps=config.num_warps,
        )


def exp2_gemm(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    out: Tensor | None,  # [N, V] out, float32 or bfloat16, an `aligned` leading dimension
    *,
    target: Tensor,  # [N]
    offset: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    epilogue: Epilogue,
    partial: Tensor,  # [statistics, tiles, N] out, float32
    config: GemmConfig,
) -> None:
    """E = 2^(z log2(e) - k) of the whole vocabulary, 0 at the targets, and its partial sums; out=None: sums alone."""
    by_columns(hidden, weight, out)
    rows, vocab, width = hidden.shape[0], weight.shape[0], hidden.shape[1]
    tiles = partial_tiles(vocab, config)
    _check_partial(partial, tiles, rows)
    if rows == 0 or vocab == 0:
        return
    matrices = [m for m in (hidden, weight, out) if m is not None]
    assert config.loads == "pointer" or aligned(*matrices), "descriptors need aligned matrices"
    row_tiles = triton.cdiv(rows, config.block_m)
    total = row_tiles * triton.cdiv(vocab, config.block_v)
    programs = min(total, processors(hidden) * config.programs)
    operands: tuple = (hidden, weight, out)
    if config.loads == "descriptor":
        operands = _descriptors(hidden, weight, out, config)
    arguments = (
        *operands,
        bias,
        offset,
        target.contiguous(),
        partial,
        rows,
        vocab,
        width,
        hidden.stride(0),
        weight.stride(0),
        0 if out is None else out.stride(0),
        partial.stride(0),
        partial.stride(1),
        group(row_tiles, config.group_m),
        *epilogue.factors,
    )
    options = gemm_constants(config, epilogue.softcap is not None, partial.shape[0] == STATISTICS, width) | {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }

    def run() -> None:
        if config.loads == "device_descriptor":
            # The allocator is a context variable: set inside a copy of the context, it stays there.
            triton.set_allocator(
                lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=hidden.device)
            )
        device.exp2_gemm_kernel[(programs,)](*arguments, **options)

    with on_device(hidden):
        contextvars.copy_context().run(run)


def group(row_tiles: int, most: int) -> int:
    """Tiles of rows in a group: at most `most`, and all groups about as large. A last group of one would read the whole
    weight for it. 16 tiles of 128 rows by the 8 of 256 columns that 132 multiprocessors then have is about square."""
    return triton.cdiv(row_tiles, triton.cdiv(row_tiles, most))


def gemm_constants(config: GemmConfig, softcap: bool, statistics: bool, width: int) -> dict[str, int | bool | str]:
    """The compile-time arguments of `exp2_gemm_kernel`."""
    return {
        "SOFTCAP": softcap,
        "STATS": statistics,
        "BLOCK_M": config.block_m,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "SPLIT": config.split,
        "LOADS": config.loads,
        "EVEN": width % config.block_h == 0,
        "WARP_SPECIALIZE": config.warp_specialize,
    }


def _descriptors(hidden: Tensor, weight: Tensor, out: Tensor | None, config: GemmConfig) -> tuple:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return (
        TensorDescriptor.from_tensor(hidden, [config.block_m, config.block_h]),
        TensorDescriptor.from_tensor(weight, [config.block_v, config.block_h]),
        None if out is None else TensorDescriptor.from_tensor(out, [config.block_m, config.tile_columns]),
    )


def finish(
    partial: Tensor,  # [statistics, tiles, N]
    *,
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
    vocab: int,
    rest: Tensor,  # [N] out: S'
    logp: Tensor,  # [N] out, nats
    statistics: Statistics | None = None,  # out
) -> None:
    """Partial sums to S' and log-probabilities. A row with S' above 2^64 is for `launch_redo`."""
    rows = z_y.shape[0]
    _check_partial(partial, partial.shape[1], rows)
    if rows == 0:
        return
    outputs, constants = finish_arguments(partial, statistics)
    with on_device(partial):
        by_row.finish_kernel[(triton.cdiv(rows, constants["BLOCK_M"]),)](
            partial,
            z_y,
            offset,
            rest,
            logp,
            *outputs,
            rows,
            partial.shape[1],
            vocab,
            partial.stride(0),
            partial.stride(1),
            **constants,
        )


def log_probability(
    rest: Tensor,  # [N] S'
    *,
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
) -> tuple[Tensor, Tensor]:
    """logp [N] in nats and S [N], float32, from S'."""
    logp, total = torch.empty_like(rest), torch.empty_like(rest)
    rows = rest.shape[0]
    if rows:
        config = configs.FINISH
        with on_device(rest):
            by_row.logp_kernel[(triton.cdiv(rows, 128),)](
                rest, z_y, offset, logp, total, rows, BLOCK_M=128, num_warps=config.num_warps
            )
    return logp, total


def unit_gradient_(
    product: Tensor,  # [N, H] float32: E W
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    *,
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
    rest: Tensor,  # [N]
    slope_y: Tensor | None,  # [N]
    logit_scale: float,
    out: Tensor | None = None,  # [N, H] out; `product` itself by default
) -> Tensor:
    """dlogp/dh [N, H] from E W, whose target column was 0."""
    out = product if out is None else out
    by_columns(product, out, weight)
    rows, width = product.shape
    if product.numel() == 0:
        return out
    config = configs.UNIT_GRADIENT
    with on_device(product):
        by_row.unit_gradient_kernel[(triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_other))](
            product,
            out,
            weight,
            target.contiguous(),
            z_y,
            offset,
            rest,
            slope_y,
            rows,
            weight.shape[0],
            width,
            product.stride(0),
            out.stride(0),
            weight.stride(0),
            float(logit_scale),
            BLOCK_M=config.block_m,
            BLOCK_H=config.block_other,
            num_warps=config.num_warps,
        )
    return out
