"""Several processes (torchrun), each with the whole model and its share of every step's groups.

A step's groups are dealt to the processes by length; the loss is normalised by the totals of the whole step, so the sum
of the gradients is the gradient one process would have had, and every process takes the same AdamW step. The first
process alone writes: run folder, checkpoints, metrics, samples, model. A process may have nothing to do in a step, and
micro-batches need not be alike: the processes meet once a step, at the gradients. With `shard: full` none of them
keeps the whole model, and they meet at every layer: `shard`.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrlhf.train.optim import Optimizer
from mmrlhf.train.preempt import Preempted

BUCKET_BYTES = 128 << 20  # gradients that are sent together: large enough for the bandwidth, small beside the weights
# One process may score a shard of the reference, or write the model, while the others wait.
PATIENCE = datetime.timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process and how many there are; alone, every method does nothing."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def add_gradients(self, optimizer: Optimizer) -> None:
        """Every gradient becomes its sum over the processes; one that no process has stays None."""
        if optimizer.sharded:
            optimizer.take_shards()  # FSDP2 has summed them in the backward
            return
        if self.size == 1:
            return
        stepped = list(optimizer.stepped.values())
        mine = [p.grad is not None for p in stepped]
        flags = torch.tensor(mine, dtype=torch.int32, device=stepped[0].device)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        gradients = []
        for parameter, anywhere in zip(stepped, flags.tolist(), strict=True):
            if anywhere:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in buckets(gradients, BUCKET_BYTES):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def grad_norm(self, optimizer: Optimizer) -> Tensor:
        """The norm of all gradients of the step, a 0-d float tensor; the same on every process."""
        norm = optimizer.grad_norm()
        return self.sum(norm.double().square()).sqrt() if optimizer.sharded else norm

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def minimum(self, values: Tensor) -> Tensor:
        """The smallest of each of `values` over the processes."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def largest(self, number: int, device: torch.device) -> int:
        """The largest `number` of any process."""
        if self.size == 1:
            return number
        value = torch.tensor(number, device=device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def spread_weights(self, model: nn.Module) -> None:
        """The first process's trained weights everywhere: adapters start at random."""
        if self.size > 1:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    dist.broadcast(parameter.detach(), 0)


def buckets(tensors: list[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to `most` bytes together; a larger tensor goes alone."""
    held: list[Tensor] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        alike = not held or (held[0].dtype, held[0].device) == (tensor.dtype, tensor.device)
        if held and (not alike or filled + size > most):
            yield held
            held, filled = [], 0
        held.append(tensor)
        filled += size
    if held:
        yield held


@contextlib.contextmanager
def join(device: torch.device) -> Iterator[World]:
    """The processes that torchrun started (WORLD_SIZE, RANK, …), or this one alone.

    A process group that is there already is used and left. Raises ValueError where WORLD_SIZE speaks of several
    processes and there is no way to meet them.
    """
    if dist.is_available() and dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    if processes() == 1:
        yield World()
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several processes "
            "with torchrun, or unset WORLD_SIZE"
        )
    if not dist.is_available():
        raise ValueError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but this PyTorch has no torch.distributed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    importlib.import_module("torch.distributed.nn")  # before the group is there: see `leave`
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    except Preempted as stop:
        if stop.saved:  # then all of them stop here; after an error the others may be waiting, and torchrun ends them
            leave()
        raise
    leave()


def leave() -> None:
    """End the process group, and with it gloo's threads.

    One that still frees the last collective's tensor while the interpreter goes down aborts the process: exit code 134
    after a run that went well, rare but seen. Destroying the group ends them only if nobody else holds it. The
    functions of torch.distributed.nn, which transformers imports, hold the group there is when they are defined, as a
    default argument, so `join` imports them before. DTensor's caches hold a sharded model's mesh and with it the group:
    those threads get a moment to drop what they have.
    """
    dist.destroy_process_group()
    time.sleep(0.1)


def processes() -> int:
    """How many processes this one belongs to: those of the process group, or of WORLD_SIZE; 1 alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1") or "1")


def local_device(kind: str) -> torch.device:
    """The CUDA device of this process on its machine (LOCAL_RANK), or the CPU."""
    if kind != "cuda":
        return torch.device(kind)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0") or "0"))
