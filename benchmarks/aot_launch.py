"""Rehearse the triton engine's launches for sm_90 without a GPU: everything up to the launch itself happens.

    python -m benchmarks.aot_launch

`forward`, `weight_grad`, `statistics` and `objective` run on bfloat16 tensors in host memory, with Triton's own binding
of arguments, specialisation and compilation; only the launch is left out, so no number means anything. It shows what
neither the interpreter nor benchmarks/aot.py can: that each argument has a type the binder takes, descriptors and None
among them, and which launches compile a kernel again. Exit status 1 where a step with another number of rows, at
another place in memory, compiles anything: in training that would be seconds in the middle of a run.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mmrlhf.ops import _gemm, _triton, reference
from mmrlhf.ops.head import Head

ARCH, WIDTH, VOCAB, RANK = 90, 64, 1000, 16


class Device:
    """What Triton asks of a driver before it launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


@dataclass
class Log:
    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    compiled: set[tuple[str, str]] = field(default_factory=set)  # kernel, hash of what was compiled


@contextmanager
def rehearsal() -> Iterator[Log]:
    """Launches are bound and compiled, and logged; the GEMMs that only CUDA has are left out."""
    log, run = Log(), JITFunction.run

    def warm(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        assert all(0 < size < 2**31 for size in grid), f"{self.__name__} has the grid {grid}"
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        log.launches[self.__name__] += 1
        log.compiled.add((self.__name__, kernel.hash))
        return kernel

    def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        assert left.dtype == right.dtype
        assert left.shape[1] == right.shape[0]
        shape = (left.shape[0], right.shape[1])
        assert out is None or (out.dtype, *out.shape) == (torch.float32, *shape)
        return torch.zeros(shape) if out is None else out

    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> None:
        assert total is out
        assert out.dtype == out_dtype == torch.float32
        product(left, right, out)

    driver.set_active(Device())  # for the rest of the process
    with (
        mock.patch.object(JITFunction, "run", warm),
        mock.patch.object(_gemm, "product", product),
        mock.patch.object(_triton, "product", product),
        mock.patch.object(torch, "addmm", addmm),
    ):
        yield log


def step(rows: int, *, keep: bool, adapter: bool = False, bias: bool = False, softcap: float | None = None) -> None:
    """Every function of the engine once, over `rows` rows that do not begin where an allocation does."""

    def after_one(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape[0] + 1, *shape[1:], dtype=dtype)[1:]

    hidden, weight = after_one(rows, WIDTH, dtype=torch.bfloat16), torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16)
    up, low = (torch.zeros(VOCAB, RANK), torch.zeros(rows, RANK)) if adapter else (None, None)
    head = Head(weight, torch.zeros(VOCAB, dtype=torch.bfloat16) if bias else None, 1.0, softcap, up)
    targets = after_one(rows, dtype=torch.int64)
    kept = _triton.Kept.empty(rows, head) if keep else None
    unit_low = None if low is None else torch.empty_like(low)
    found, _ = _triton.forward(head, hidden, targets, unit=True, keep=kept, low=low, unit_low=unit_low)
    found.logp()
    for dtype, add in ((torch.bfloat16, False), (torch.float32, True)):
        _triton.weight_grad(
            head,
            hidden,
            found,
            after_one(rows),
            grad_weight=torch.zeros(VOCAB, WIDTH, dtype=dtype),
            grad_bias=torch.zeros(VOCAB) if bias else None,
            keep=kept,
            add=add,
            low=low,
            grad_up=torch.zeros(VOCAB, RANK) if adapter else None,
        )
    if not adapter:
        _triton.statistics(head, hidden, targets)
    objective = reference.Objective(
        torch.tensor([0, rows // 2, rows]),
        torch.tensor([[0, 1]]),
        token_weight=after_one(rows),
        reference_scores=after_one(2),
        beta=torch.tensor([0.1]),
        sft_weight=0.5,
    )
    _triton.objective(objective, after_one(rows))


VARIANTS: tuple[dict[str, Any], ...] = (
    {"keep": False},
    {"keep": True, "bias": True},
    {"keep": False, "softcap": 30.0, "bias": True},
    {"keep": False, "adapter": True},
)


def main() -> int:
    again = []
    with rehearsal() as log:
        for options in VARIANTS:
            step(320, **options)  # a multiple of 16
            before = set(log.compiled)
            step(301, **options)
            again += [(name, options) for name, _ in log.compiled - before]
        step(1, keep=False)
        step(48, keep=False)
    for name, count in sorted(log.launches.items()):
        print(f"{name:<24} {count:3d} launches, {sum(kernel == name for kernel, _ in log.compiled)} compiled")
    for name, options in again:
        print(f"FAULT {name} is compiled again for another number of rows: {options}")
    print(f"{len(log.compiled)} kernels, {len(again)} at fault")
    return 1 if again else 0


if __name__ == "__main__":
    sys.exit(main())
