"""Log-probability of each target token, from the hidden rows and the lm_head, without the [N, V] logits.

public function (checks, shapes) -> autograd.Function -> a backend's engine: `streaming` (torch), `_cpu` or `_triton`.
Traced code (torch.compile) takes the registered ops of `library` in the place of the autograd.Function.

The forward makes the unit gradient dlogp/dh, which depends on nothing that comes later, so the backward of a frozen
head only scales rows: 2U in all (U = 2 N H V flops), exact for any upstream gradient. A trained head adds 1U where the
exponentials fit `memory_budget` and are kept, 2U where they are made again.
Not covered: float64 (`ops.reference`), double backward (a RuntimeError), a weight sharded over devices.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmrlhf.ops import backend as backends
from mmrlhf.ops import checks, library, reference, streaming

MEMORY_BUDGET = 1 << 30  # bytes of exponentials kept between forward and backward


def linear_logp(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """log p(targets[t] | hidden[t]) in nats, [...] float32; 0, with zero gradient, where targets is `ignore_index`.

    z = softcap * tanh((logit_scale * hidden weight^T + bias) / softcap), or without the cap; logp = z_y - logsumexp z.
    Row t scores targets[t]: nothing is shifted inside. float32, bfloat16 or float16, one dtype for hidden and weight
    (autocast casts them, as for a linear layer); targets int32 or int64. Arithmetic is float32. Differentiable in
    hidden, weight and bias; only the gradients asked for are computed. `memory_budget` (bytes, default 1 GiB) bounds
    the exponentials kept for the gradient of weight and bias. No input is written to.

    Raises TypeError for a dtype (float64 is for `ops.reference`), ValueError for a shape, a device, or a target out of
    range (seen on the CPU; elsewhere with MMRLHF_CHECK_VALUES=1), RuntimeError for a backend that cannot run or a
    double backward.
    """
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    double = backends.requested(backend) == "reference"
    checks.head(hidden, weight, bias, logit_scale, softcap, double=double)
    checks.targets(targets, hidden, weight.shape[0], ignore_index)
    budget = check_budget(memory_budget)
    name = choose_backend("linear_logp", hidden, weight, backend)
    if name == "reference":
        return reference.linear_logp(
            hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index
        )
    head = streaming.Head(weight, bias, logit_scale, softcap)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
    if checks.traced(hidden):
        keep = wants_grad(weight, bias) and 4 * flat.shape[0] * weight.shape[0] <= budget
        unit = wants_grad(hidden)
        logp = library.linear_logp(head, rows, flat, ignore_index=ignore_index, unit=unit, keep=keep, backend=name)
        return logp.reshape(targets.shape)
    engine = backends.engine(name)
    return _without_ignored(engine, head, rows, flat, ignore_index, budget).reshape(targets.shape)


def choose_backend(op: str, hidden: Tensor, weight: Tensor, backend: str | None) -> str:
    """The name of the backend that runs `op`; in traced code a constant of the graph."""
    if checks.traced(hidden):
        return library.choose(op, backend, hidden.dtype, hidden.device)
    return backends.choose(op, hidden, weight, requested=backend).name


def cast_for_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to a linear layer: its operands in the autocast dtype. Outside autocast, nothing."""
    if not isinstance(hidden, Tensor) or hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def cast(value):
        fits = isinstance(value, Tensor) and value.dtype in checks.HEAD_DTYPES
        return value.to(dtype) if fits else value

    return cast(hidden), cast(weight), cast(bias)


def check_budget(memory_budget: int | None) -> int:
    if memory_budget is None:
        return MEMORY_BUDGET
    checks.not_negative("memory_budget", memory_budget)
    return int(memory_budget)


def wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_double_backward(op: str) -> None:
    """Called in a backward: gradients are being recorded there only under create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no double backward (it was differentiated with create_graph=True); backend='reference' has one"
        )


def _without_ignored(
    engine: ModuleType,
    head: streaming.Head,
    hidden: Tensor,  # [N, H]
    targets: Tensor,  # [N] int64
    ignore_index: int,
    budget: int,
) -> Tensor:
    """The rows that count: on the CPU the others are left out, elsewhere (counting would wait) they are blanked."""
    keep = targets != ignore_index
    if targets.device.type != "cpu":
        blank = torch.where(keep[:, None], hidden, 0)
        return torch.where(keep, _apply(engine, head, blank, torch.where(keep, targets, 0), budget), 0)
    if bool(keep.all()):
        return _apply(engine, head, hidden, targets, budget)
    index = keep.nonzero()[:, 0]
    logp = _apply(engine, head, hidden[index], targets[index], budget)
    return torch.zeros(targets.shape, dtype=torch.float32).index_put((index,), logp)


def _apply(engine: ModuleType, head: streaming.Head, hidden: Tensor, targets: Tensor, budget: int) -> Tensor:
    return _LinearLogp.apply(
        engine,
        hidden,
        head.weight,
        head.bias,
        targets,
        head.logit_scale,
        head.softcap,
        (wants_grad(hidden), wants_grad(head.weight, head.bias)),
        budget,
    )


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, engine, hidden, weight, bias, targets, logit_scale, softcap, wants, budget):
        head, hidden = streaming.Head(weight, bias, logit_scale, softcap), hidden.contiguous()
        wants_hidden, wants_head = wants
        with torch.autocast(hidden.device.type, enabled=False):
            keep = None
            if wants_head and hidden.shape[0] * engine.row_bytes(head) <= budget:
                keep = engine.Kept.empty(hidden.shape[0], head)
            rows, unit = engine.forward(head, hidden, targets, unit=wants_hidden, keep=keep)
        ctx.engine, ctx.options, ctx.dtype = engine, (logit_scale, softcap), hidden.dtype
        ctx.columns = None if keep is None else keep.columns
        if wants_head:
            vectors = (rows.targets, rows.z_y, rows.slope_y, rows.offset, rows.rest, rows.redone)
            ctx.save_for_backward(unit, None if keep is None else keep.flat, hidden, weight, bias, *vectors)
        else:
            ctx.save_for_backward(unit)
        return rows.logp()

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("linear_logp")
        unit, *saved = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[1:4]
        grad_hidden = grad_weight = grad_bias = None
        if wants_hidden:
            # Zero times a non-finite row is still zero: nothing depends on that row.
            grad_hidden = torch.where(grad[:, None] == 0, 0, unit * grad[:, None]).to(ctx.dtype)
        if wants_weight or wants_bias:
            flat, hidden, weight, bias, *vectors = saved
            head = streaming.Head(weight, bias, *ctx.options)
            keep = None if flat is None else ctx.engine.Kept(flat, hidden.shape[0], weight.shape[0], ctx.columns)
            grad_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
            grad_bias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device) if wants_bias else None
            with torch.autocast(hidden.device.type, enabled=False):
                ctx.engine.weight_grad(
                    head,
                    hidden,
                    streaming.Rows(*vectors),
                    grad,
                    grad_weight=grad_weight,
                    grad_bias=grad_bias,
                    keep=keep,
                )
            grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return None, grad_hidden, grad_weight, grad_bias, None, None, None, None, None
