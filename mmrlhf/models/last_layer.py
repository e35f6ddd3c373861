"""The last layer's MLP on the rows that are read, and on no others.

Of the last decoder layer only the rows that predict a response token are read; the prefix's other rows give their keys
and values to its attention and are done. So its MLP, 7/8 of a layer's weights, runs on the N' read rows: 1/L of the
prefix's cost, 2 to 3 % of a 7B model's step. The values are the same, the other rows' gradients were zero anyway.

Hooks on the last layer do it: its attention, which is given the `Packing`, notes the rows for its MLP. All of them lie
inside what gradient checkpointing runs again. A layer whose parts have other names runs every row, and so does a
forward without noted rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import Layout, on_device
from mmrlhf.models import attention
from mmrlhf.models.parts import decoder

_BOX = "_mmrlhf_read_rows"  # of both modules: one dict, so that a deepcopy of the model has one of its own
_MOST = 0.8  # of all rows: above it, gathering and scattering them costs what it saves


def read_rows(layout: Layout, device: torch.device) -> Tensor | None:
    """[N'] int64: the rows that are read, each once, ascending; None where they are nearly all."""
    pieces: list[Tensor] = []
    for start, prefix, responses in zip(layout.group_start, layout.prefix_len, layout.response_len, strict=True):
        at = start + prefix
        pieces.append(torch.tensor([at - 1]))
        for length in responses:
            pieces.append(torch.arange(at, at + length - 1))
            at += length
    rows = torch.cat(pieces)
    few = rows.numel() <= _MOST * sum(layout.group_len)
    return on_device(rows, device) if few else None


def install(model: nn.Module) -> bool:
    """Put the hooks on the decoder's last layer, once; whether it has them. Mixtures of experts run every row."""
    layers = getattr(decoder(model), "layers", None)
    last = layers[-1] if layers else None
    attends, mlp = getattr(last, "self_attn", None), getattr(last, "mlp", None)
    if not isinstance(attends, nn.Module) or not isinstance(mlp, nn.Module) or hasattr(mlp, "experts"):
        return False
    if not hasattr(mlp, _BOX):
        noted: dict[str, Any] = {"rows": None}
        for module in (attends, mlp):
            setattr(module, _BOX, noted)
        attends.register_forward_pre_hook(_note, with_kwargs=True)
        mlp.register_forward_pre_hook(_gather)
        mlp.register_forward_hook(_scatter)
    return True


def _note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    packing = kwargs.get(attention.KEYWORD)
    getattr(module, _BOX)["rows"] = None if packing is None else packing.rows


def _gather(module: nn.Module, args: tuple) -> tuple | None:
    noted = getattr(module, _BOX)
    if noted["rows"] is None:
        return None
    noted["length"] = args[0].shape[1]
    return (args[0].index_select(1, noted["rows"]), *args[1:])  # [1, T, H] to [1, N', H]


def _scatter(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    noted = getattr(module, _BOX)
    rows, noted["rows"] = noted["rows"], None  # a call without attention before it runs every row
    if rows is None:
        return None
    whole = output.new_zeros(output.shape[0], noted["length"], output.shape[2])
    return whole.index_copy_(1, rows, output)
