"""pytest-benchmark over the same cases and sides as `python -m benchmarks`: nothing is timed before its gate is green.

    pytest benchmarks/test_linear_logp.py                       a small head, seconds
    MMRLHF_BENCH=full pytest benchmarks/test_linear_logp.py     the heads of known models, 512 rows

`units` in the extra information is the median round over the median U, both on the wall; `floor_units` what the
side's design has to multiply.
"""

from __future__ import annotations

import functools
import os
import statistics

import pytest
import torch

from benchmarks.cases import Case, Outcome, Problem, full_cases, small_cases, truth
from benchmarks.measure import clocks, gate, unit
from benchmarks.sides import SIDES, Side

FULL = os.environ.get("MMRLHF_BENCH") == "full"
ROUNDS = 5


@functools.lru_cache(maxsize=1)
def prepared(case: Case) -> tuple[Problem, Outcome, Outcome]:
    """The problem, its truth, and what PyTorch's full logits give."""
    problem = Problem.of(case)
    return problem, truth(problem), SIDES[case.task][0].step(problem)()


def grid(task: str) -> list:
    """(case, side) of a task as pytest parameters, a case's sides together."""
    cases = [case for case in (full_cases() if FULL else small_cases()) if case.task == task]
    return [
        pytest.param(case, side, id=f"{case.name}-{side.name}")
        for case in cases
        for side in SIDES[task]
        if (FULL or not side.slow) and (case.grads == "trained" or not side.trained_only)
    ]


def run(benchmark, case: Case, side: Side) -> None:
    reason = side.missing()
    if reason is not None:
        pytest.skip(reason)
    problem, true, baseline = prepared(case)
    step = side.step(problem)
    assert gate(step(), baseline, true) == "green"
    spent: list[float] = []
    one = unit(problem)
    one()

    def before() -> None:
        spent.append(clocks(one, problem.hidden)[0])

    benchmark.pedantic(step, setup=before, rounds=ROUNDS, iterations=1)
    if benchmark.disabled:
        return  # --benchmark-disable: the gate alone
    benchmark.extra_info.update(
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        unit_ms=round(statistics.median(spent) * 1e3, 2),
        units=round(benchmark.stats.stats.median / statistics.median(spent), 3),
        floor_units=side.floor_of(problem),
    )
