"""Which implementation runs an op, and why.

`choose(op, *tensors)` is a pure function of the op, its tensors and what was asked for: an argument (`backend=`), else
`with use_backend(name)`, else the environment variable MMRLHF_BACKEND, else the first usable row of `BACKENDS`.
What is asked for and cannot run is a RuntimeError with the reason; what is chosen automatically is logged once.

A backend is one row: its name, the ops it has, and a probe that says why it cannot take these tensors (None: it can).
The reason of an automatic choice also says why each better row of that device could not be had.
`reference` is never chosen automatically: it makes the whole [N, V] matrix.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

ENVIRONMENT = "MMRLHF_BACKEND"
HEAD_OPS = ("linear_logp", "fused_preference_loss")
STATISTICS = "token_statistics"
HEAD_KINDS = ("adapter", "shard")  # what a head may carry: a LoRA on it, a vocabulary that lies on several ranks
KNOWN = ("cuda", "triton", "cpu", "torch", "reference")  # every name the project uses, built here or not

Function = TypeVar("Function", bound=Callable)

_logger = logging.getLogger("mmrlhf.ops")
_asked: contextvars.ContextVar[str | None] = contextvars.ContextVar("mmrlhf_backend", default=None)
_logged: set[tuple[str, Choice]] = set()


def constant(function: Function) -> Function:
    """Tracing runs `function` and keeps its result: torch.compiler.assume_constant_result, which cannot be asked here,
    since it imports the compiler, a second for everybody who compiles nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str


@dataclass(frozen=True)
class Backend:
    name: str
    ops: tuple[str, ...]
    why: Callable[[], str]  # the reason given when it is chosen automatically
    refuse: Callable[[tuple[Tensor, ...]], str | None]  # why it cannot take these tensors
    automatic: tuple[str, ...] | None = None  # types of device for which it may be chosen unasked; None: all
    module: str = ""  # what runs it: the functions of `streaming`
    takes: tuple[str, ...] = ()  # of HEAD_KINDS

    def refusal(self, tensors: tuple[Tensor, ...], need: tuple[str, ...]) -> str | None:
        """Why it cannot run these tensors with the kinds of head that they need; None if it can."""
        missing = [kind for kind in need if kind not in self.takes]
        return f"it takes no {' and no '.join(missing)}" if missing else self.refuse(tensors)


def _refuse_double(tensors: tuple[Tensor, ...]) -> str | None:
    if any(t.dtype == torch.float64 for t in tensors):
        return "it computes in float32, not float64; mmrlhf.ops.reference is exact in float64"
    return None


def _refuse_triton(tensors: tuple[Tensor, ...]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if tensors[0].device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"its tensors must be on a CUDA device, not {tensors[0].device}"
    return engine("triton").refuse(tensors)


def _refuse_cpu(tensors: tuple[Tensor, ...]) -> str | None:
    if tensors[0].device.type != "cpu":
        return f"its tensors must be on the CPU, not {tensors[0].device}"
    return _refuse_double(tensors) or _missing_extension()


def _refuse_cuda(tensors: tuple[Tensor, ...]) -> str | None:
    if tensors[0].device.type != "cuda":
        return f"its tensors must be on a CUDA device, not {tensors[0].device}"
    return _missing_extension() or engine("cuda").refuse(tensors)


@functools.cache
def _missing_extension() -> str | None:
    """Why mmrlhf._C cannot be imported; None if it can."""
    try:
        engine("cpu")
    except ImportError as error:
        return f"the compiled extension mmrlhf._C cannot be imported ({error})"
    return None


# In the order of preference: the first row that has the op and does not refuse the tensors is chosen.
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "triton",
        (*HEAD_OPS, STATISTICS),
        lambda: "Triton kernels, on a CUDA device",
        _refuse_triton,
        ("cuda",),
        "mmrlhf.ops._triton",
        takes=HEAD_KINDS,
    ),
    # Never unasked: it has not been measured against triton, and what is not measured faster is not chosen. Its
    # arithmetic is tested on the host (tests/csrc), where the same formulas and the same kernels' code run.
    Backend("cuda", (*HEAD_OPS, STATISTICS), lambda: "", _refuse_cuda, (), "mmrlhf.ops._cuda", takes=HEAD_KINDS),
    Backend(
        "cpu",
        (*HEAD_OPS, STATISTICS),
        lambda: f"streams over vocabulary blocks, each block's pass compiled ({engine('cpu').isa()})",
        _refuse_cpu,
        ("cpu",),
        "mmrlhf.ops._cpu",
        takes=HEAD_KINDS,
    ),
    Backend(
        "torch",
        (*HEAD_OPS, STATISTICS),
        lambda: "streams over vocabulary blocks in PyTorch, on any device",
        _refuse_double,
        module="mmrlhf.ops.streaming",
        takes=HEAD_KINDS,
    ),
    Backend("reference", (*HEAD_OPS, STATISTICS), lambda: "", lambda tensors: None, automatic=(), takes=HEAD_KINDS),
)


def available(op: str) -> tuple[str, ...]:
    """Names of the backends of this build that have `op`, best first."""
    return tuple(b.name for b in BACKENDS if op in b.ops)


def engine(name: str) -> ModuleType:
    """The module that runs backend `name`: forward, weight_grad, objective, row_bytes and Kept, as in `streaming`."""
    return importlib.import_module(next(b.module for b in BACKENDS if b.name == name))


def choose(op: str, *tensors: Tensor, requested: str | None = None, need: tuple[str, ...] = ()) -> Choice:
    """The backend that runs `op` on `tensors`, and the reason. `need`: which `HEAD_KINDS` the head is of.

    Raises ValueError for a name nobody knows, RuntimeError where what was asked for, or anything at all, cannot run.
    """
    name, by = _requested(requested)
    if name is not None:
        choice = _take(op, tensors, need, name, by)
        _log_once(op, choice)
        return choice
    refusals: list[str] = []
    for row in BACKENDS:
        if op in row.ops and (row.automatic is None or tensors[0].device.type in row.automatic):
            refusal = row.refusal(tensors, need)
            if refusal is None:
                choice = Choice(row.name, "; not ".join([row.why(), *refusals]))
                _log_once(op, choice, fell_back=bool(refusals))
                return choice
            refusals.append(f"{row.name}: {refusal}")
    raise RuntimeError(f"no backend of this build runs {op}: " + ("; ".join(refusals) or "none has it"))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ask for a backend inside a `with` block, in this thread or task."""
    _check_name(name, "use_backend")
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


@constant
def requested(argument: str | None = None) -> str | None:
    """The name asked for, by the argument, `use_backend` or the environment; None where the choice is free."""
    return _requested(argument)[0]


def _requested(argument: str | None) -> tuple[str | None, str]:
    for name, by in (
        (argument, "backend="),
        (_asked.get(), "use_backend"),
        (os.environ.get(ENVIRONMENT) or None, ENVIRONMENT),
    ):
        if name is not None:
            _check_name(name, by)
            return name, by
    return None, ""


def _check_name(name: str, by: str) -> None:
    if name not in KNOWN:
        raise ValueError(f"{by} must be one of {', '.join(KNOWN)}, got {name!r}")


def _take(op: str, tensors: tuple[Tensor, ...], need: tuple[str, ...], name: str, by: str) -> Choice:
    have = available(op)
    if name not in have:
        raise RuntimeError(
            f"backend {name!r} was asked for ({by}), but this build has no {name} backend for {op}; "
            f"it has: {', '.join(have) or 'none'}"
        )
    row = next(b for b in BACKENDS if b.name == name)
    refusal = row.refusal(tensors, need)
    if refusal is not None:
        raise RuntimeError(f"backend {name!r} was asked for ({by}), but cannot run {op} on these tensors: {refusal}")
    return Choice(name, f"asked for by {by}")


def _log_once(op: str, choice: Choice, *, fell_back: bool = False) -> None:
    """Once for each op, backend and reason; a warning where a faster backend of this device cannot run the tensors."""
    if (op, choice) not in _logged:
        _logged.add((op, choice))
        level = logging.WARNING if fell_back else logging.INFO
        _logger.log(level, "%s runs on backend %s: %s", op, choice.name, choice.reason)
