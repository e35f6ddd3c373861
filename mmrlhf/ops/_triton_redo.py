"""The triton backend's rows, and those among them that are run again, without a wait for the device.

Which rows have S' above 2^64 is known on the device alone, so all that running them again takes is launched always, and
ends at once where there are none: 5 launches a chunk of rows (`_gemm.wave_chunk`). The cost of a bad row is in
`mmrlhf.kernels.triton.redo`. Only where the vocabulary lies on several ranks does the host ask which rows these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrlhf.kernels.triton import launch, launch_redo
from mmrlhf.kernels.triton.launch import Epilogue
from mmrlhf.kernels.triton.launch_redo import Chosen
from mmrlhf.ops._gemm import padded, stored
from mmrlhf.ops.streaming import REDO_ABOVE, Head, Rows


@dataclass
class DeviceRows(Rows):
    """`Rows` without the indices of those run again: their offset says it, on the device."""

    def logp(self) -> Tensor:
        return launch.log_probability(self.rest, z_y=self.z_y, offset=self.offset)[0]


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
    parts = list(_parts(head, rows, size))
    by_row, out = kept is not None, kept
    if kept is None and parts and not (unit is None and unit_low is None):
        out = torch.empty(size, padded(vocab), dtype=stored(head), device=hidden.device)[:, :vocab]
    vectors = {"z_y": rows.z_y, "offset": rows.offset, "rest": rows.rest}
    common: dict[str, Any] = {"target": rows.targets, "bias": head.bias, "epilogue": epilogue_of(head)}
    common |= {"low": low, "up": head.up}
    for part, _ in parts:
        launch_redo.maximum_(hidden, head.weight, part, offset=rows.offset, **common)
    if head.shard is not None and parts:
        head.shard.max_(rows.offset)  # of a row that is not run again every rank has the same
    for part, index in parts:
        partial = launch_redo.partial_sums(part, head.weight, statistics=statistics is not None)
        launch_redo.exponentials(
            hidden, head.weight, out, part, offset=rows.offset, partial=partial, by_row=by_row, **common
        )
        logp = torch.empty_like(rows.rest)
        launch_redo.finish(partial, part, vocab=vocab, logp=logp, statistics=statistics, **vectors)
        _sum(head, rows.rest, index)
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
                _sum(head, grad, index)


def _parts(head: Head, rows: Rows, size: int) -> Iterator[tuple[Chosen, Tensor | None]]:
    """The rows to run again, `size` at a time, and with a shard their indices [n].

    With a shard the host reads which rows they are, since it must not sum what nobody changed: most often none.
    """
    if head.shard is None:
        chosen, count, index = launch_redo.select(rows.rest, z_y=rows.z_y, offset=rows.offset), rows.rest.shape[0], None
    else:
        index = head.shard.any(~(rows.rest <= REDO_ABOVE)).nonzero()[:, 0]
        count = index.shape[0]
        chosen = Chosen(index.int(), torch.full((1,), count, dtype=torch.int32, device=index.device))
    for first in range(0, count, size):
        yield chosen.part(first, size), None if index is None else index[first : first + size]


def _sum(head: Head, tensor: Tensor, index: Tensor | None) -> None:
    """Entries [n, ...] of `tensor` <- their sum over the ranks that share the vocabulary."""
    if index is not None:
        some = tensor[index]
        head.sum_(some)
        tensor[index] = some
