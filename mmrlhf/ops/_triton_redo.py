"""The triton backend's rows, and those among them that are run again; nothing here waits for the device.

Which rows have S' above 2^64 is known on the device alone, so all that running them again takes is launched always, and
ends at once where there are none: 5 launches up to 1,700 rows at V = 152k, 4 more for each 1,700 after. The cost of a
bad row is in `mmrlhf.kernels.triton.redo`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrlhf.kernels.triton import launch, launch_redo
from mmrlhf.kernels.triton.launch import Epilogue
from mmrlhf.ops.streaming import Head, Rows


@dataclass
class DeviceRows(Rows):
    """`Rows` without the indices of those run again: their offset says it, on the device."""

    def logp(self) -> Tensor:
        return launch.log_probability(self.rest, z_y=self.z_y, offset=self.offset)[0]


def stored(head: Head) -> torch.dtype:
    """The dtype of the exponentials: bfloat16 holds 2^64, and multiplies a bfloat16 weight."""
    return torch.float32 if head.weight.dtype == torch.float32 else torch.bfloat16


def epilogue_of(head: Head) -> Epilogue:
    return Epilogue(head.logit_scale, head.softcap)


def redo(
    head: Head,
    hidden: Tensor,  # [N, H]
    rows: Rows,
    size: int,
    *,
    unit: Tensor | None = None,  # [N, H]
    kept: Tensor | None = None,  # [N, V]
    low: Tensor | None = None,  # [N, r] float32, with head.up
    unit_low: Tensor | None = None,  # [N, r]
    statistics: launch.Statistics | None = None,
) -> None:
    """The rows with S' above 2^64 again, `size` of them at a time, with their true maximum as the offset: their entries
    of `rows` and of what else is given are written over."""
    count, vocab = hidden.shape[0], head.weight.shape[0]
    if count == 0:
        return
    chosen = launch_redo.select(rows.rest, z_y=rows.z_y, offset=rows.offset)
    by_row, out = kept is not None, kept
    if kept is None and not (unit is None and unit_low is None):
        out = torch.empty(size, launch.padded(vocab), dtype=stored(head), device=hidden.device)[:, :vocab]
    vectors = {"z_y": rows.z_y, "offset": rows.offset, "rest": rows.rest}
    common: dict[str, Any] = {"target": rows.targets, "bias": head.bias, "epilogue": epilogue_of(head)}
    common |= {"low": low, "up": head.up}
    for first in range(0, count, size):
        part = chosen.part(first, size)
        launch_redo.maximum_(hidden, head.weight, part, offset=rows.offset, **common)
        partial = launch_redo.partial_sums(part, head.weight, statistics=statistics is not None)
        launch_redo.exponentials(
            hidden, head.weight, out, part, offset=rows.offset, partial=partial, by_row=by_row, **common
        )
        logp = torch.empty_like(rows.rest)
        launch_redo.finish(partial, part, vocab=vocab, logp=logp, statistics=statistics, **vectors)
        for grad, matrix in ((unit, head.weight), (unit_low, head.up)):
            if grad is not None and out is not None and matrix is not None:
                launch_redo.unit_gradient_(
                    grad,
                    out,
                    matrix,
                    part,
                    target=rows.targets,
                    slope_y=rows.slope_y,
                    logit_scale=head.logit_scale,
                    by_row=by_row,
                    **vectors,
                )
