"""AdamW over float32 weights, whatever the model computes in, with warm-up, cosine and one gradient norm a step.

A bfloat16 weight of 1.0 cannot move by less than 0.0039; at a learning rate of 5e-7 nothing would ever change. So every
trained weight that is not float32 gets a float32 master copy: its gradients are added up in float32 (across
micro-batches too), AdamW steps the master, and the model's weight is the master rounded. 16 bytes a trained weight, as
with float32 weights under autocast, but the model runs in plain bfloat16 without casts. Of a sharded model (`shard`)
AdamW steps this process's rows, in float32 already: they are the masters, and FSDP2 gathers them rounded.

Not covered: float16, which would need loss scaling.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmrlhf.config import OptimConfig
from mmrlhf.ops.sharded import is_dtensor, local_rows

MASTER = "master"  # the name of a master copy beside AdamW's own state


class Optimizer:
    """AdamW with master copies where needed. `named` are the trained parameters, a tied one once.

    `rounded`: names of sharded parameters whose float32 rows are gathered as bfloat16.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        settings: OptimConfig,
        *,
        rounded: Collection[str] = (),
    ):
        self.named = {name: parameter for name, parameter in named if parameter.requires_grad}
        self.rounded = frozenset(rounded)
        self.sharded = any(map(is_dtensor, self.named.values()))
        if not self.named:
            raise ValueError("nothing to train: every parameter is frozen")
        for name, parameter in self.named.items():
            if parameter.dtype == torch.float16:
                raise ValueError(
                    f"{name} is float16, whose gradients underflow without loss scaling: "
                    "set model.dtype to bfloat16 or float32"
                )
        self.settings = settings
        self._hooks: list[RemovableHandle] = []
        self.stepped = {name: self._stepped(parameter) for name, parameter in self.named.items()}
        matrices = [p for p in self.stepped.values() if p.dim() >= 2]
        others = [p for p in self.stepped.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=(settings.betas[0], settings.betas[1]),
            eps=settings.eps,
            fused=True,  # one pass over the weights, without the foreach kind's temporaries (4 bytes a weight)
        )

    def _stepped(self, parameter: nn.Parameter) -> Tensor:
        """What AdamW steps: the parameter, or its float32 master, which takes over each gradient as it is made; of a
        sharded one this process's rows, the same storage as a plain tensor."""
        if is_dtensor(parameter):
            return local_rows(parameter).requires_grad_()
        if parameter.dtype != torch.bfloat16:
            return parameter
        master = parameter.detach().to(torch.float32).requires_grad_()

        def take_over(p: Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        self._hooks.append(parameter.register_post_accumulate_grad_hook(take_over))
        return master

    def close(self) -> None:
        """Give the model's parameters back as they were: without gradients and hooks."""
        self.zero_grad()
        for hook in self._hooks:
            hook.remove()

    def take_shards(self) -> None:
        """What FSDP2 left at sharded parameters becomes the gradients of the rows that are stepped."""
        for name, parameter in self.named.items():
            if is_dtensor(parameter) and parameter.grad is not None:
                self.stepped[name].grad, parameter.grad = local_rows(parameter.grad), None

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.stepped.values() if p.grad is not None]

    def grad_norm(self) -> Tensor:
        """The 2-norm of all gradients, a 0-d float tensor on their device; clips nothing."""
        gradients = self.gradients()
        if not gradients:
            return torch.zeros((), device=next(iter(self.stepped.values())).device)
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, *, lr: float, grad_norm: float, without: Collection[str] = ()) -> None:
        """One update at `lr`, with the gradients scaled to a norm of at most `clip`; parameters `without` one stay."""
        for name in without:
            self.stepped[name].grad = None
        if self.settings.clip and grad_norm > self.settings.clip:
            torch._foreach_mul_(self.gradients(), self.settings.clip / (grad_norm + 1e-6))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        with torch.no_grad():
            for name, parameter in self.named.items():
                if self._has_master(name):
                    parameter.copy_(self.stepped[name])

    def _has_master(self, name: str) -> bool:
        """Whether a float32 master stands beside the weight; of sharded ones the rows are all there is."""
        return not self.sharded and self.stepped[name] is not self.named[name]

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, and the masters, flat: "<parameter>/<what>"; if sharded the own rows."""
        flat: dict[str, Tensor] = {}
        for name, stepped in self.stepped.items():
            for key, value in self.adamw.state.get(stepped, {}).items():
                flat[f"{name}/{key}"] = value
            if self._has_master(name) or name in self.rounded:
                flat[f"{name}/{MASTER}"] = stepped.detach()
        return flat

    def load_state(self, flat: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave. Raises ValueError if it belongs to other parameters."""
        owners: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            name, _, what = key.rpartition("/")
            owners.setdefault(name, {})[what] = value
        foreign = sorted(set(owners) - set(self.named))
        if foreign:
            raise ValueError(
                f"the optimiser state has {len(foreign)} parameters that are not trained here: {foreign[0]}"
            )
        for name, values in owners.items():
            stepped = self.stepped[name]
            if MASTER in values:
                with torch.no_grad():
                    stepped.copy_(values.pop(MASTER))
            if values:
                self.adamw.state[stepped] = {key: value.to(stepped.device, copy=True) for key, value in values.items()}


def learning_rate(step: int, total: int, settings: OptimConfig) -> float:
    """The rate of step 0, 1, … total-1: linear warm-up from lr / warm-up steps, then a cosine to lr * final_lr."""
    warmup = math.ceil(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))
