"""linear_logp as registered ops, for what traces instead of running: torch.compile, fake and meta tensors.

Eager code calls the autograd.Function of `linear_logp.py` and never comes here. Traced code gets two ops that a graph
holds whole: `mmrlhf::linear_logp`, the pass over the vocabulary with all that its gradients need, and
`mmrlhf::linear_logp_weight_grad`. Everything around them is plain PyTorch, which the compiler may fuse.
The backend is chosen when the code is traced, and stays in the graph. Not covered: double backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrlhf.ops import backend as backends
from mmrlhf.ops.streaming import Head, Rows

_HEAD = (
    "Tensor hidden, Tensor? low, Tensor weight, Tensor? bias, Tensor? up, Tensor targets, "
    "float logit_scale, float? softcap"
)


@backends.constant
def choose(op: str, requested: str | None, dtype: torch.dtype, device: torch.device, need: tuple[str, ...] = ()) -> str:
    """`backend.choose` by dtype and device: the name alone. On the meta device: torch, if nothing is asked for."""
    if device.type == "meta":
        return backends.requested(requested) or "torch"
    return backends.choose(op, torch.empty(0, dtype=dtype, device=device), requested=requested, need=need).name


def linear_logp(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
    low_rows: Callable[[Tensor], Tensor | None],  # an adapter's [N, r] of hidden, which goes with head.up
    ignore_index: int,
    unit: bool,
    keep: bool,
    backend: str,
) -> Tensor:
    """logp [N] float32. `unit`: hidden will ask for a gradient; `keep`: the exponentials are to be kept for the head's.

    Rows that do not count are blanked, not left out: how many there are is not known.
    """
    counts = targets != ignore_index
    hidden = torch.where(counts[:, None], hidden, 0)
    tensors = (hidden, low_rows(hidden), head.weight, head.bias, head.up, torch.where(counts, targets, 0))
    logp = _linear_logp(*tensors, head.logit_scale, head.softcap, unit, keep, backend)[0]
    return torch.where(counts, logp, 0)


@torch.library.custom_op(
    "mmrlhf::linear_logp",
    mutates_args=(),
    schema=f"({_HEAD}, bool unit, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logp(hidden, low, weight, bias, up, targets, logit_scale, softcap, unit, keep, backend):
    """logp [N], the unit gradients [N, H] and [N, r], the exponentials and the `Rows` as [5, N]; what is not asked for
    is empty."""
    engine, head, count = backends.engine(backend), Head(weight, bias, logit_scale, softcap, up), hidden.shape[0]
    nothing = hidden.new_empty(0, dtype=torch.float32)
    unit_low = nothing.clone() if low is None else torch.empty_like(low, memory_format=torch.contiguous_format)
    adapter = {} if low is None else {"low": low.contiguous(), "unit_low": unit_low}
    with torch.autocast(hidden.device.type, enabled=False):
        kept = engine.Kept.empty(count, head) if keep else None
        rows, grad = engine.forward(head, hidden.contiguous(), targets, unit=unit, keep=kept, **adapter)
    return (
        rows.logp(),
        nothing if grad is None else grad,
        unit_low,
        nothing.clone() if kept is None else kept.flat,
        _pack(rows),
    )


@_linear_logp.register_fake
def _(hidden, low, weight, bias, up, targets, logit_scale, softcap, unit, keep, backend):
    count = hidden.shape[0]
    flat = hidden.new_empty(0, dtype=torch.float32)
    if keep:
        flat = backends.engine(backend).Kept.empty(count, Head(weight, bias, logit_scale, softcap, up), 1).flat
    logp = hidden.new_empty(count, dtype=torch.float32)
    grad = hidden.new_empty(hidden.shape if unit else (0,), dtype=torch.float32)
    unit_low = hidden.new_empty((0,) if low is None else low.shape, dtype=torch.float32)
    return logp, grad, unit_low, flat, logp.new_empty(5, count)


@torch.library.custom_op(
    "mmrlhf::linear_logp_weight_grad",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor grad, Tensor flat, Tensor state, bool of_weight, bool of_bias, bool of_up, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def _weight_grad(
    hidden, low, weight, bias, up, targets, logit_scale, softcap, grad, flat, state, of_weight, of_bias, of_up, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight [V, H] in its dtype, bias [V] and up [V, r] float32; empty where not asked for."""
    engine, head, count = backends.engine(backend), Head(weight, bias, logit_scale, softcap, up), hidden.shape[0]
    grads = _empty_grads(weight, up, of_weight, of_bias, of_up)
    adapter = {} if low is None else {"low": low.contiguous(), "grad_up": grads[2] if of_up else None}
    with torch.autocast(hidden.device.type, enabled=False):
        engine.weight_grad(
            head,
            hidden.contiguous(),
            _unpack(state, targets, capped=softcap is not None, indices=backend not in ("triton", "cuda")),
            grad.contiguous(),
            grad_weight=grads[0] if of_weight else None,
            grad_bias=grads[1] if of_bias else None,
            keep=engine.Kept.over(flat.view(torch.uint8), count, head) if flat.numel() else None,
            **adapter,
        )
    return grads


@_weight_grad.register_fake
def _(
    hidden, low, weight, bias, up, targets, logit_scale, softcap, grad, flat, state, of_weight, of_bias, of_up, backend
):
    return _empty_grads(weight, up, of_weight, of_bias, of_up)


def _empty_grads(weight, up, of_weight: bool, of_bias: bool, of_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (
        weight.new_empty(weight.shape if of_weight else (0,)),
        weight.new_empty(weight.shape[:1] if of_bias else (0,), dtype=torch.float32),
        weight.new_empty(up.shape if of_up else (0,), dtype=torch.float32),
    )


def _pack(rows: Rows) -> Tensor:
    """The vectors of `Rows` besides the targets, [5, N] float32; the rows done again as 1s and 0s."""
    redone = torch.zeros_like(rows.z_y)
    if rows.redone is not None:
        redone[rows.redone] = 1
    slope_y = torch.ones_like(rows.z_y) if rows.slope_y is None else rows.slope_y
    return torch.stack([rows.z_y, slope_y, rows.offset, rows.rest, redone])


def _unpack(state: Tensor, targets: Tensor, *, capped: bool, indices: bool) -> Rows:
    """`indices`: of the rows done again, which only a host that waits can know; triton and cuda do without."""
    z_y, slope_y, offset, rest, redone = state.contiguous()
    index = redone.nonzero()[:, 0] if indices else redone.new_empty(0)
    return Rows(targets.long(), z_y, slope_y if capped else None, offset, rest, index if index.numel() else None)


def _setup_context(ctx, inputs, output):
    hidden, low, weight, bias, up, targets, *ctx.options, _, _, ctx.backend = inputs
    _, unit, unit_low, flat, state = output
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, low, weight, bias, up)]
    ctx.save_for_backward(hidden, low, weight, bias, up, targets, unit, unit_low, flat, state)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    *inputs, unit, unit_low, flat, state = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 11
    if grad is None:
        return tuple(grads)
    wants = [bool(dtype) and wanted for dtype, wanted in zip(ctx.dtypes, ctx.needs_input_grad, strict=False)]
    for which, each in enumerate((unit, unit_low)):
        if wants[which]:
            # Zero times a non-finite row is still zero: nothing depends on that row.
            grads[which] = torch.where(grad[:, None] == 0, 0, each * grad[:, None])
    if any(wants[2:]):
        grads[2:5] = _weight_grad(*inputs, *ctx.options, grad, flat, state, *wants[2:], ctx.backend)
    for which, wanted in enumerate(wants):
        each = grads[which]
        grads[which] = each.to(ctx.dtypes[which]) if wanted and each is not None else None
    return tuple(grads)


_linear_logp.register_autograd(_backward, setup_context=_setup_context)
