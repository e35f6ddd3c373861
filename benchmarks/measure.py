"""How it is measured: the gate, seconds in units of U, peak bytes, and the machine it was done on.

U, one matmul of the case's hidden and weight into memory that is there already, is timed before and after every round.
A round's figure is its time over the mean of those two, so that other load weighs on both; the median of the rounds is
given. (Not the fastest round over the fastest U: a step is longer than U, and meets fewer quiet moments of a shared
machine.) `cpu` is the same in seconds of this process's processors, which other processes do not lengthen: at one
thread the figure to trust on a busy machine.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Outcome, Problem
from benchmarks.memory import peak_bytes
from benchmarks.sides import Side, versions
from numerics import assert_no_worse


@dataclass(frozen=True)
class Figures:
    """One side on one case; the times are there only where the gate is green."""

    side: str
    errors: dict[str, float]  # values: rms, in nats; gradients: relative, of the sampled rows
    gate: str  # "green", or what is wrong
    floor: int  # U
    milliseconds: float | None = None
    units: float | None = None  # wall time / U
    cpu_units: float | None = None  # processor time / U; None on another device than the CPU
    extra_bytes: int | None = None  # peak above what was there before the step, gradients included


def errors_of(outcome: Outcome, truth: Outcome) -> dict[str, float]:
    found = {}
    for name, value in outcome.named().items():
        true = truth.named()[name]
        if value is None or true is None:
            continue
        difference = (value.double() - true).norm()
        found[name] = float(difference / (true.numel() ** 0.5 if name == "values" else true.norm()))
    return found


def gate(outcome: Outcome, baseline: Outcome, truth: Outcome) -> str:
    """ "green" where every value and gradient is at most twice as far from truth as PyTorch's; else the first fault."""
    for name, value in outcome.named().items():
        true, base = truth.named()[name], baseline.named()[name]
        if (value is None) != (true is None):
            return f"{name} is missing"
        if value is not None and true is not None and base is not None:
            try:
                assert_no_worse(value, base, true, name=name)
            except AssertionError as error:
                return str(error)
    return "green"


def measure(side: Side, problem: Problem, truth: Outcome, baseline: Outcome, *, rounds: int, seconds: float) -> Figures:
    outcome = side.step(problem)()
    verdict, errors = gate(outcome, baseline, truth), errors_of(outcome, truth)
    del outcome
    if verdict != "green":
        return Figures(side.name, errors, verdict, side.floor_of(problem))
    step = side.step(problem)  # new leaves: without gradients yet, so that the peak counts them
    extra = peak_bytes(step, problem.hidden.device)
    took = times(step, problem, rounds, seconds)
    return Figures(
        side.name,
        errors,
        verdict,
        side.floor_of(problem),
        milliseconds=round(1e3 * took.seconds, 3),
        units=round(took.units, 3),
        cpu_units=round(took.cpu_units, 3) if problem.hidden.device.type == "cpu" else None,
        extra_bytes=extra,
    )


@dataclass(frozen=True)
class Times:
    """Medians of the rounds."""

    seconds: float
    units: float
    cpu_units: float


def times(step: Callable[[], Any], problem: Problem, rounds: int, seconds: float) -> Times:
    """At least two rounds, and no more than `rounds` or than `seconds` hold."""
    one, start = unit(problem), time.perf_counter()
    one()
    steps: list[tuple[float, float]] = []
    units = [clocks(one, problem.hidden)]
    while len(steps) < rounds and (len(steps) < 2 or time.perf_counter() - start < seconds):
        steps.append(clocks(step, problem.hidden))
        units.append(clocks(one, problem.hidden))

    def ratio(clock: int) -> float:
        around = [(before[clock] + after[clock]) / 2 for before, after in itertools.pairwise(units)]
        return statistics.median(step[clock] / u for step, u in zip(steps, around, strict=True))

    return Times(statistics.median(step[0] for step in steps), ratio(0), ratio(1))


def unit(problem: Problem) -> Callable[[], Tensor]:
    """One U, in the dtype of the case."""
    hidden, weight = problem.hidden, problem.weight
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    return lambda: torch.mm(hidden, weight.T, out=out)


def clocks(function: Callable[[], Any], like: Tensor) -> tuple[float, float]:
    """(wall, processor) seconds of one call, the device waited for."""
    synchronise(like.device)
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronise(like.device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    from mmrlhf.doctor import describe

    lines = {line.strip() for line in describe().splitlines()}
    return {
        "platform": platform.platform(),
        "found": sorted(line for line in lines if line.startswith(("cpu:", "gpu", "isa:", "linear_logp on"))),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, **versions()},
    }
