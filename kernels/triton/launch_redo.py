"""Launchers of `redo`: some rows again, which ones and how many being known on the device alone.

    select -> maximum_ -> exponentials -> finish -> unit_gradient_, each of the chosen rows [first, first + capacity)

All of them are launched whatever was selected, and wait for nothing. A buffer with a place for each chosen row has
`capacity` rows; everything else is indexed by the row itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
from mmrlhf.kernels.triton import configs
from mmrlhf.kernels.triton import redo as device
from mmrlhf.kernels.triton.configs import GemmConfig
from mmrlhf.kernels.triton.launch import Epilogue, by_columns, on_device, processors
from mmrlhf.kernels.triton.statistics import STATISTICS, Statistics, finish_arguments


@dataclass(frozen=True)
class Chosen:
    """Rows in ascending order, and how many they are; and the part of them that a launch takes."""

    index: Tensor  # [N] int32, of which `count` are written
    count: Tensor  # [1] int32
    first: int = 0
    capacity: int = 0

    def part(self, first: int, capacity: int) -> Chosen:
        return Chosen(self.index, self.count, first, min(capacity, self.index.shape[0] - first))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """As the kernels take them."""
        return self.index, self.count, self.first, self.capacity


def select(
    rest: Tensor,  # [N]
    *,
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
    done: bool = False,
) -> Chosen:
    """The rows to do again: S' above 2^64, or not a number. `done`: those that were, seen by their offset alone."""
    rows = rest.shape[0]
    index = torch.empty(rows, dtype=torch.int32, device=rest.device)
    count = torch.empty(1, dtype=torch.int32, device=rest.device)
    config = configs.SELECT
    with on_device(rest):
        device.select_kernel[(1,)](
            rest, z_y, offset, index, count, rows, DONE=done, BLOCK=config.block_m, num_warps=config.num_warps
        )
    return Chosen(index, count, 0, rows)


def _programs(tiles: int, like: Tensor) -> int:
    return min(tiles, processors(like))


def exponentials(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [c, H]: the vocabulary, or a block of it
    out: Tensor | None,  # [capacity, c] or, by_row, [N, c] out
    chosen: Chosen,
    *,
    target: Tensor,  # [N], counted from the block's first row
    offset: Tensor,  # [N]
    bias: Tensor | None,  # [c]
    epilogue: Epilogue,
    partial: Tensor | None,  # [statistics, tiles, capacity] out
    by_row: bool = False,
    low: Tensor | None = None,  # [N, r] float32
    up: Tensor | None = None,  # [c, r] float32
) -> None:
    """E of the chosen rows, 0 at the targets, and its partial sums. With low and up, logits gain low up^T."""
    _launch("exponentials", hidden, weight, out, chosen, target, offset, bias, epilogue, partial, by_row, low, up)


def maximum_(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    chosen: Chosen,
    *,
    target: Tensor,  # [N]
    offset: Tensor,  # [N] in and out
    bias: Tensor | None,  # [V]
    epilogue: Epilogue,
    low: Tensor | None = None,  # [N, r] float32
    up: Tensor | None = None,  # [V, r] float32
) -> None:
    """offset <- the larger of it and rint(z log2(e)) of the largest logit, of the chosen rows."""
    _launch("maximum", hidden, weight, None, chosen, target, offset, bias, epilogue, None, False, low, up)


def _launch(
    mode: str,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [c, H]
    out: Tensor | None,  # [capacity, c] or, by_row, [N, c]
    chosen: Chosen,
    target: Tensor,  # [N]
    offset: Tensor,  # [N]
    bias: Tensor | None,  # [c]
    epilogue: Epilogue,
    partial: Tensor | None,  # [statistics, tiles, capacity]
    by_row: bool,
    low: Tensor | None,  # [N, r]
    up: Tensor | None,  # [c, r]
) -> None:
    by_columns(hidden, weight, out, low, up)
    vocab, width = weight.shape
    if chosen.capacity == 0 or vocab == 0:
        return
    config = configs.pick_redo(hidden.dtype == torch.float32)
    tiles = triton.cdiv(chosen.capacity, config.block_m) * triton.cdiv(vocab, config.block_v)
    with on_device(hidden):
        device.redo_kernel[(_programs(tiles, hidden),)](
            hidden,
            weight,
            out,
            bias,
            low,
            up,
            offset,
            target.contiguous(),
            partial,
            *chosen.arguments,
            vocab,
            width,
            0 if low is None else low.shape[1],
            hidden.stride(0),
            weight.stride(0),
            0 if out is None else out.stride(0),
            0 if low is None else low.stride(0),
            0 if up is None else up.stride(0),
            0 if partial is None else partial.stride(0),
            0 if partial is None else partial.stride(1),
            *epilogue.factors,
            MODE=mode,
            SOFTCAP=epilogue.softcap is not None,
            BY_ROW=by_row,
            STATS=partial is not None and partial.shape[0] == STATISTICS,
            **_blocks(config),
        )


def _blocks(config: GemmConfig) -> dict[str, int]:
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_V": config.block_v,
        "BLOCK_H": config.block_h,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def partial_sums(chosen: Chosen, weight: Tensor, *, statistics: bool = False) -> Tensor:
    """Where `exponentials` leaves its sums. [statistics, tiles, capacity]"""
    config = configs.pick_redo(weight.dtype == torch.float32)
    shape = (STATISTICS if statistics else 1, triton.cdiv(weight.shape[0], config.block_v), chosen.capacity)
    return torch.empty(shape, dtype=torch.float32, device=weight.device)


def finish(
    partial: Tensor,  # [statistics, tiles, capacity]
    chosen: Chosen,
    *,
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
    vocab: int,
    rest: Tensor,  # [N] out
    logp: Tensor,  # [N] out
    statistics: Statistics | None = None,  # out
) -> None:
    """`launch.finish` of the chosen rows."""
    if chosen.capacity == 0:
        return
    outputs, constants = finish_arguments(partial, statistics)
    with on_device(partial):
        device.redo_finish_kernel[(triton.cdiv(chosen.capacity, constants["BLOCK_M"]),)](
            partial,
            z_y,
            offset,
            rest,
            logp,
            *outputs,
            *chosen.arguments,
            partial.shape[1],
            vocab,
            partial.stride(0),
            partial.stride(1),
            **constants,
        )


def unit_gradient_(
    unit: Tensor,  # [N, H] out, float32
    exponentials: Tensor,  # [capacity, V] or, by_row, [N, V]
    weight: Tensor,  # [V, H], in the dtype of the exponentials or float32
    chosen: Chosen,
    *,
    target: Tensor,  # [N]
    z_y: Tensor,  # [N]
    offset: Tensor,  # [N]
    rest: Tensor,  # [N]
    slope_y: Tensor | None,  # [N]
    logit_scale: float,
    by_row: bool,
) -> None:
    """dlogp/dh of the chosen rows, from their exponentials."""
    vocab, width = weight.shape
    if chosen.capacity == 0 or width == 0:
        return
    config = configs.pick_redo(weight.dtype == torch.float32)
    tiles = triton.cdiv(chosen.capacity, config.block_m) * triton.cdiv(width, config.block_v)
    blocks = _blocks(config) | {"BLOCK_H": config.block_v, "BLOCK_V": config.block_h}  # the loop is over the vocabulary
    with on_device(unit):
        device.redo_unit_kernel[(_programs(tiles, unit),)](
            exponentials,
            weight,
            unit,
            target.contiguous(),
            z_y,
            offset,
            rest,
            slope_y,
            *chosen.arguments,
            vocab,
            width,
            exponentials.stride(0),
            weight.stride(0),
            unit.stride(0),
            float(logit_scale),
            BY_ROW=by_row,
            **blocks,
        )
