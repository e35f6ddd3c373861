"""Log-probability of each target token, from the hidden rows and the lm_head, without the [N, V] logits.

public function (checks, shapes) -> autograd.Function -> a backend's engine, such as `streaming` (torch).
Traced code (torch.compile) takes the registered ops of `library` in the place of the autograd.Function.

The forward makes the unit gradient dlogp/dh, which depends on nothing that comes later, so the backward of a frozen
head only scales rows: 2U in all (U = 2 N H V flops), exact for any upstream gradient. A trained head adds 1U where the
exponentials fit `memory_budget` and are kept, 2U where they are made again. A LoRA on the head (`adapter`) and a head
that lies on several ranks (`sharded`) go the same way.
Not covered: float64 (`ops.reference`), double backward (a RuntimeError).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops import adapter as lora
from mmrlhf.ops import backend as backends
from mmrlhf.ops import checks, library, reference, sharded, streaming
from mmrlhf.ops.adapter import Adapters, LoraAdapter
from mmrlhf.ops.sharded import VocabShard

# Bytes of exponentials kept between forward and backward. A chunk more reads W and writes dW once more: on 2 cores at
# N = 2048, V = 151936 (1.2 GiB) one chunk takes 3.3 U, two take 3.6, four 3.6; medians of 3 interleaved rounds.
MEMORY_BUDGET = 2 << 30


def linear_logp(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    logit_scale: float = 1.0,
    softcap: float | None = None,
    adapter: Adapters = None,
    shard: VocabShard | None = None,
    ignore_index: int = -100,
    memory_budget: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """log p(targets[t] | hidden[t]) in nats, [...] float32; 0, with zero gradient, where targets is `ignore_index`.

    z = softcap * tanh((logit_scale * hidden weight^T + bias) / softcap), or without the cap; logp = z_y - logsumexp z.
    Row t scores targets[t]: nothing is shifted inside. float32, bfloat16 or float16, one dtype for hidden and weight
    (autocast casts them, as for a linear layer); targets int32 or int64. Arithmetic is float32. Differentiable in
    hidden, weight, bias and adapter; only the gradients asked for are computed. `memory_budget` (bytes, default 2 GiB)
    bounds the exponentials kept for the gradient of weight, bias and adapter.b. No input is written to.
    `adapter`: a `LoraAdapter` on the head, or several: hidden weight^T gains scale * (hidden a^T) b^T of each.
    `shard`: weight, bias and adapter.b are this rank's rows of the vocabulary, targets global ids; every rank calls
    with the same rows and gets the same result. A DTensor weight needs no `shard`: see `ops.sharded`.

    Raises TypeError for a dtype (float64 is for `ops.reference`), ValueError for a shape, a device, or a target out of
    range (seen on the CPU; elsewhere with MMRLHF_CHECK_VALUES=1), RuntimeError for a backend that cannot run or a
    double backward.
    """
    head = prepare(hidden, weight, targets, bias, logit_scale, softcap, adapter, shard, ignore_index, backend)
    hidden, budget = head.hidden, check_budget(memory_budget)
    name = choose_backend("linear_logp", head, backend)
    if name == "reference":
        return reference.linear_logp(hidden, head.weight, targets, **head.options(), ignore_index=ignore_index)
    if checks.traced(hidden):
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).long()
        return library.linear_logp(
            head.engine_head(),
            rows,
            flat,
            low_rows=head.low_rows,
            ignore_index=ignore_index,
            unit=wants_grad(hidden),
            keep=head.trained and 4 * flat.shape[0] * head.weight.shape[0] <= budget,
            backend=name,
        ).reshape(targets.shape)
    return _without_ignored(backends.engine(name), head, hidden, targets.long(), ignore_index, budget)


@dataclass(frozen=True)
class Given:
    """The head's arguments, checked: plain tensors, in the autocast dtype under autocast."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]; with a shard, this rank's rows, as of bias and of an adapter's b
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None
    adapters: tuple[LoraAdapter, ...]
    shard: VocabShard | None

    def options(self) -> dict[str, Any]:
        """What `reference.linear_logp` takes besides tensors."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "adapter": self.adapters,
            "shard": self.shard,
        }

    def engine_head(self) -> streaming.Head:
        up = lora.up_rows(self.adapters)
        return streaming.Head(self.weight, self.bias, self.logit_scale, self.softcap, up, self.shard)

    def low_rows(self, hidden: Tensor) -> Tensor | None:
        """The adapters' [n, r] rows of hidden [n, H]."""
        return lora.low_rows(self.adapters, hidden)

    @property
    def trained(self) -> bool:
        """Whether a gradient that is made from the exponentials is wanted."""
        return wants_grad(self.weight, self.bias, *(each.b for each in self.adapters))


def prepare(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    logit_scale: float,
    softcap: float | None,
    adapter: Adapters,
    shard: VocabShard | None,
    ignore_index: int | None,
    backend: str | None,
) -> Given:
    """Every check of the head's arguments; DTensors made plain."""
    hidden, weight, bias = cast_for_autocast(hidden, weight, bias)
    adapters = lora.several(adapter)
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard must be a VocabShard, got {type(shard).__name__}")
    if shard is not None or any(map(sharded.is_dtensor, (hidden, weight, bias, *lora.tensors(adapters)))):
        weight, bias, adapters, shard = _on_this_rank(hidden, weight, bias, adapters, shard)
    double = backends.requested(backend) == "reference"
    checks.head(hidden, weight, bias, logit_scale, softcap, double=double, empty=shard is not None)
    lora.check(adapters, hidden, weight)
    checks.targets(targets, hidden, weight.shape[0] if shard is None else shard.total, ignore_index)
    if shard is not None:
        shard.check(weight, targets)
    return Given(hidden, weight, bias, logit_scale, softcap, adapters, shard)


def _on_this_rank(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: tuple[LoraAdapter, ...],
    shard: VocabShard | None,
) -> tuple[Tensor, Tensor | None, tuple[LoraAdapter, ...], VocabShard | None]:
    if checks.traced(hidden):
        raise ValueError(
            "a sharded vocabulary or a DTensor is not for traced code (torch.compile): call the op eagerly"
        )
    if sharded.is_dtensor(hidden):
        raise TypeError("hidden must be a plain tensor, got a DTensor: pass hidden.to_local() of replicated rows")
    cut = None
    if sharded.is_dtensor(weight):
        cut, shard = sharded.shard_of(weight, shard)
    local = [dataclasses.replace(each, a=sharded.plain(each.a), b=sharded.plain(each.b, cut)) for each in adapters]
    return sharded.plain(weight, cut), sharded.plain(bias, cut), tuple(local), shard


def choose_backend(op: str, head: Given, backend: str | None) -> str:
    """The name of the backend that runs `op`; in traced code a constant of the graph."""
    hidden = head.hidden
    need = ("adapter",) * (len(head.adapters) > 0) + ("shard",) * (head.shard is not None)
    if checks.traced(hidden):
        return library.choose(op, backend, hidden.dtype, hidden.device, need)
    return backends.choose(op, hidden, head.weight, requested=backend, need=need).name


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
    head: Given,
    hidden: Tensor,  # [..., H]
    targets: Tensor,  # [...] int64
    ignore_index: int,
    budget: int,
) -> Tensor:
    """[...]: the rows that count. On the CPU the others are left out, elsewhere (counting would wait) they are blanked.

    Blanked, and not only their results: a gradient of the head would hold 0 times a row that is not finite, and a row
    that gives token 0 less than e^-44 would be run again. Rows are made flat last: of a view with gaps, as
    hidden[:, :-1] is, what leaves out or blanks rows is the one copy.
    """

    def run(rows: Tensor, tokens: Tensor) -> Tensor:
        logp = _apply(engine, head, rows.reshape(-1, rows.shape[-1]), tokens.reshape(-1), budget)
        return logp.reshape(tokens.shape)

    keep = targets != ignore_index
    if targets.device.type != "cpu":
        return torch.where(keep, run(torch.where(keep[..., None], hidden, 0), torch.where(keep, targets, 0)), 0)
    if bool(keep.all()):
        return run(hidden, targets)
    logp = run(hidden[keep], targets[keep])
    return torch.zeros(targets.shape, dtype=torch.float32).masked_scatter(keep, logp)


def _apply(engine: ModuleType, given: Given, hidden: Tensor, targets: Tensor, budget: int) -> Tensor:
    head, low = given.engine_head(), given.low_rows(hidden)
    wants = (wants_grad(hidden), wants_grad(low), given.trained)
    tensors = (hidden, low, head.weight, head.bias, head.up)
    return _LinearLogp.apply(engine, head.settings, wants, budget, targets, *tensors)


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, engine, settings, wants, budget, targets, hidden, low, weight, bias, up):
        head, hidden = streaming.Head(weight, bias, up=up, **settings), hidden.contiguous()
        wants_hidden, wants_low, wants_head = wants
        with torch.autocast(hidden.device.type, enabled=False):
            keep = None
            if wants_head and hidden.shape[0] * engine.row_bytes(head) <= budget:
                keep = engine.Kept.empty(hidden.shape[0], head)
            unit_low = torch.empty_like(low) if wants_low else None
            adapter = {} if low is None else {"low": low, "unit_low": unit_low}
            rows, unit = engine.forward(head, hidden, targets, unit=wants_hidden, keep=keep, **adapter)
        ctx.engine, ctx.settings, ctx.dtype = engine, settings, hidden.dtype
        ctx.columns = None if keep is None else keep.columns
        if wants_head:
            vectors = (rows.targets, rows.z_y, rows.slope_y, rows.offset, rows.rest, rows.redone)
            tensors = (None if keep is None else keep.flat, hidden, low, weight, bias, up, *vectors)
            ctx.save_for_backward(unit, unit_low, *tensors)
        else:
            ctx.save_for_backward(unit, unit_low)
        return rows.logp()

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("linear_logp")
        unit, unit_low, *saved = ctx.saved_tensors
        wants = ctx.needs_input_grad[5:]
        # Zero times a non-finite row is still zero: nothing depends on that row.
        rows = (
            torch.where(grad[:, None] == 0, 0, each * grad[:, None]) if wanted else None
            for each, wanted in zip((unit, unit_low), wants, strict=False)
        )
        grad_hidden, grad_low = rows
        grads = (None, None, None)
        if any(wants[2:]):
            grads = _head_gradients(ctx, grad, *saved)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(ctx.dtype)
        return None, None, None, None, None, grad_hidden, grad_low, *grads


def _head_gradients(
    ctx: Any,
    grad: Tensor,  # [N]
    flat: Tensor | None,  # the kept exponentials
    hidden: Tensor,  # [N, H]
    low: Tensor | None,  # [N, r]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    up: Tensor | None,  # [V, r]
    *vectors: Any,  # the fields of `Rows`, [N] each
) -> tuple[Tensor | None, ...]:
    """Gradients of weight, bias and up, each None if not wanted."""
    head = streaming.Head(weight, bias, up=up, **ctx.settings)
    keep = None if flat is None else ctx.engine.Kept(flat, hidden.shape[0], weight.shape[0], ctx.columns)
    wants = ctx.needs_input_grad[7:]
    dtypes = (weight.dtype, torch.float32, torch.float32)  # a block of dW is whole when it is written: rounded there
    of_weight, of_bias, of_up = (
        torch.empty(tensor.shape, dtype=dtype, device=tensor.device) if tensor is not None and wanted else None
        for tensor, dtype, wanted in zip((weight, bias, up), dtypes, wants, strict=True)
    )
    adapter = {} if low is None else {"low": low, "grad_up": of_up}
    with torch.autocast(hidden.device.type, enabled=False):
        ctx.engine.weight_grad(
            head,
            hidden,
            streaming.Rows(*vectors),
            grad,
            grad_weight=of_weight,
            grad_bias=of_bias,
            keep=keep,
            **adapter,
        )
    return (
        of_weight,
        None if of_bias is None or bias is None else of_bias.to(bias.dtype),
        None if of_up is None or up is None else of_up.to(up.dtype),
    )
