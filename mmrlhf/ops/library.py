"""linear_logp as registered ops, for what traces instead of running: torch.compile, fake and meta tensors.

Eager code calls the autograd.Function of `linear_logp.py` and never comes here. Traced code gets two ops that a graph
holds whole: `mmrlhf::linear_logp`, the pass over the vocabulary with all that its gradients need, and
`mmrlhf::linear_logp_weight_grad`. Everything around them is plain PyTorch, which the compiler may fuse.
The backend is chosen when the code is traced, and stays in the graph. Not covered: double backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmrlhf.ops import backend as backends
from mmrlhf.ops.streaming import Head, Rows

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float logit_scale, float? softcap"


@backends.constant
def choose(op: str, requested: str | None, dtype: torch.dtype, device: torch.device) -> str:
    """`backend.choose` by dtype and device: the name alone. On the meta device: torch, if nothing is asked for."""
    if device.type == "meta":
        return backends.requested(requested) or "torch"
    return backends.choose(op, torch.empty(0, dtype=dtype, device=device), requested=requested).name


def linear_logp(
    head: Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N]
    *,
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
    tensors = (hidden, head.weight, head.bias, torch.where(counts, targets, 0))
    logp = _linear_logp(*tensors, head.logit_scale, head.softcap, unit, keep, backend)[0]
    return torch.where(counts, logp, 0)


@torch.library.custom_op(
    "mmrlhf::linear_logp",
    mutates_args=(),
    schema=f"({_HEAD}, bool unit, bool keep, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logp(hidden, weight, bias, targets, logit_scale, softcap, unit, keep, backend):
    """logp [N], the unit gradient [N, H], the exponentials and the `Rows` as [5, N]; what is not asked for is empty."""
    engine, head, count = backends.engine(backend), Head(weight, bias, logit_scale, softcap), hidden.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        kept = engine.Kept.empty(count, head) if keep else None
        rows, grad = engine.forward(head, hidden.contiguous(), targets, unit=unit, keep=kept)
    nothing = hidden.new_empty(0, dtype=torch.float32)
    return (
        rows.logp(),
        nothing if grad is None else grad,
        nothing.clone() if kept is None else kept.flat,
        _pack(rows),
    )


@_linear_logp.register_fake
def _(hidden, weight, bias, targets, logit_scale, softcap, unit, keep, backend):
    count = hidden.shape[0]
    flat = hidden.new_empty(0, dtype=torch.float32)
    if keep:
        flat = backends.engine(backend).Kept.empty(count, Head(weight, bias, logit_scale, softcap), 1).flat
    logp = hidden.new_empty(count, dtype=torch.float32)
    grad = hidden.new_empty(hidden.shape if unit else (0,), dtype=torch.float32)
    return logp, grad, flat, logp.new_empty(5, count)


@torch.library.custom_op(
    "mmrlhf::linear_logp_weight_grad",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor grad, Tensor flat, Tensor state, bool of_weight, bool of_bias, str backend) "
    "-> (Tensor, Tensor)",
)
def _weight_grad(
    hidden, weight, bias, targets, logit_scale, softcap, grad, flat, state, of_weight, of_bias, backend
) -> tuple[Tensor, Tensor]:
    """Gradients of weight [V, H] and bias [V], float32; empty where not asked for."""
    engine, head, count = backends.engine(backend), Head(weight, bias, logit_scale, softcap), hidden.shape[0]
    grads = [weight.new_empty(s, dtype=torch.float32) for s in _grad_shapes(weight, of_weight, of_bias)]
    with torch.autocast(hidden.device.type, enabled=False):
        engine.weight_grad(
            head,
            hidden.contiguous(),
            _unpack(state, targets, capped=softcap is not None),
            grad.contiguous(),
            grad_weight=grads[0] if of_weight else None,
            grad_bias=grads[1] if of_bias else None,
            keep=engine.Kept.over(flat.view(torch.uint8), count, head) if flat.numel() else None,
        )
    return grads[0], grads[1]


@_weight_grad.register_fake
def _(hidden, weight, bias, targets, logit_scale, softcap, grad, flat, state, of_weight, of_bias, backend):
    shapes = _grad_shapes(weight, of_weight, of_bias)
    return tuple(weight.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _grad_shapes(weight: Tensor, of_weight: bool, of_bias: bool):
    return weight.shape if of_weight else (0,), weight.shape[:1] if of_bias else (0,)


def _pack(rows: Rows) -> Tensor:
    """The vectors of `Rows` besides the targets, [5, N] float32; the rows done again as 1s and 0s."""
    redone = torch.zeros_like(rows.z_y)
    if rows.redone is not None:
        redone[rows.redone] = 1
    slope_y = torch.ones_like(rows.z_y) if rows.slope_y is None else rows.slope_y
    return torch.stack([rows.z_y, slope_y, rows.offset, rows.rest, redone])


def _unpack(state: Tensor, targets: Tensor, *, capped: bool) -> Rows:
    z_y, slope_y, offset, rest, redone = state.contiguous()
    index = redone.nonzero()[:, 0]
    return Rows(targets.long(), z_y, slope_y if capped else None, offset, rest, index if index.numel() else None)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, *ctx.options, _, _, ctx.backend = inputs
    _, unit, flat, state = output
    ctx.dtypes = (hidden.dtype, weight.dtype)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(hidden, weight, bias, targets, unit, flat, state)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    hidden, weight, bias, targets, unit, flat, state = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * 9
    if grad is None:
        return tuple(grads)
    if ctx.needs_input_grad[0]:
        # Zero times a non-finite row is still zero: nothing depends on that row.
        grads[0] = torch.where(grad[:, None] == 0, 0, unit * grad[:, None]).to(ctx.dtypes[0])
    of_weight, of_bias = ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2]
    if of_weight or of_bias:
        of_head = _weight_grad(
            hidden, weight, bias, targets, *ctx.options, grad, flat, state, of_weight, of_bias, ctx.backend
        )
        grads[1] = of_head[0].to(ctx.dtypes[1]) if of_weight else None
        grads[2] = of_head[1].to(ctx.dtypes[1]) if of_bias else None
    return tuple(grads)


_linear_logp.register_autograd(_backward, setup_context=_setup_context)
