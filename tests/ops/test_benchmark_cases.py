"""The benchmarks' own footing: their truth is the reference's, their gate lets nothing wrong through to a stopwatch."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.cases import (
    GRID_ROWS,
    HEADS,
    Case,
    HeadShape,
    Outcome,
    Problem,
    full_cases,
    grid_cases,
    small_cases,
    truth,
)
from benchmarks.measure import errors_of, gate, measure
from benchmarks.plot import curves
from benchmarks.sides import SIDES, Side
from mmrlhf.ops import reference
from numerics import assert_no_worse


@pytest.fixture(autouse=True)
def small_head(monkeypatch):
    monkeypatch.setitem(HEADS, "tiny", HeadShape("none", 16, 5003))


def exact(problem: Problem, dtype: torch.dtype) -> Outcome:
    """By ops.reference and autograd."""
    hidden, weight = (t.to(dtype).requires_grad_() for t in (problem.hidden, problem.weight))
    values, loss = problem.finish(reference.linear_logp(hidden, weight, problem.targets))
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Outcome(values.detach(), hidden.grad[problem.rows], weight.grad[problem.columns])


@pytest.mark.parametrize("task", list(SIDES))
def test_truth_is_the_reference(task):
    problem = Problem.of(Case(task, "tiny", 64, "float32", "trained"))
    found, expected, rough = truth(problem), exact(problem, torch.float64), exact(problem, torch.float32)
    for name, value in found.named().items():
        assert_no_worse(value.float(), rough.named()[name], expected.named()[name], name=name)
    assert all(error < 1e-12 for error in errors_of(expected, found).values())
    for grads in ("none", "frozen"):
        part = truth(Problem.of(Case(task, "tiny", 64, "float32", grads)))
        assert torch.equal(part.values, found.values)
        assert (part.hidden_grad is None, part.weight_grad is None) == (grads == "none", True)


def test_a_wrong_side_gets_no_time():
    """A gradient 1% off, and a gradient that is missing."""
    problem = Problem.of(Case("linear_logp", "tiny", 64, "float32", "frozen"))
    true, right = truth(problem), SIDES["linear_logp"][0]
    base = right.step(problem)()
    assert gate(base, base, true) == "green"

    def off(problem, hidden, weight):
        values, loss = right.run(problem, hidden, weight)
        return values, loss * 1.01

    figures = measure(Side("off", off, (1, 2, 3)), problem, true, base, rounds=1, seconds=0)
    assert figures.gate.startswith("grad of hidden: error")
    assert (figures.milliseconds, figures.units, figures.extra_bytes) == (None, None, None)
    assert abs(figures.errors["grad of hidden"] - 0.01) < 1e-4
    assert "gate: grad of hidden" in benchmarks.line(benchmarks.cells(figures))
    assert gate(Outcome(base.values), base, true) == "grad of hidden is missing"


def test_names_of_cases_are_their_own():
    names = [case.name for case in small_cases() + full_cases()]
    assert len(set(names)) == len(names)
    assert {case.task for case in small_cases()} == set(SIDES)
    assert {case.head for case in full_cases()} == set(HEADS) - {"tiny"}
    grid = [case.name for case in grid_cases()]
    assert len(set(grid)) == len(grid)
    assert {(case.head, case.rows) for case in grid_cases()} == {
        (h, n) for h in set(HEADS) - {"tiny"} for n in GRID_ROWS
    }


def test_curves_over_rows(tmp_path):
    """Two sides at two N, one of them without a figure at one; and nothing to draw where every N is its own case."""
    pytest.importorskip("matplotlib", reason="the picture needs it")

    def case(rows, *sides):
        names = {"name": f"linear_logp/tiny/{rows}/float32/frozen", "task": "linear_logp", "head": "tiny", "rows": rows}
        return names | {"dtype": "float32", "grads": "frozen", "sides": list(sides)}

    def side(name, milliseconds, extra):
        return {"side": name, "units": milliseconds, "milliseconds": milliseconds, "extra_bytes": extra}

    about = {"command": "the command", "machine": {"threads": 1}}
    sides = side("mmrlhf", 1.0, 1 << 20), side("trl", None, None)
    both = [case(64, *sides), case(128, side("mmrlhf", 2.0, 2 << 20), side("trl", 5.0, 9 << 20))]
    assert curves(about | {"cases": both}, tmp_path / "rows.svg")
    picture = (tmp_path / "rows.svg").read_text()
    assert "mmrlhf" in picture
    assert "scored tokens" in picture
    assert not curves(about | {"cases": both[:1]}, tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_command_line_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs it")
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    words = ["--case", "tiny/256/float32/none", "--rounds", "2", "--side", "mmrlhf", "--side", "pytorch"]
    words += ["--plot", "--write", "x"]
    assert benchmarks.main(words) == 0
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["command"].endswith(" ".join(words))
    assert set(written["machine"]["versions"]) >= {"python", "torch"}
    (case,) = written["cases"]
    assert [side["side"] for side in case["sides"]] == ["pytorch", "mmrlhf"]
    assert all(side["gate"] == "green" and side["units"] > 0 and side["cpu_units"] > 0 for side in case["sides"])
    assert case["name"] in (tmp_path / "x.svg").read_text()
    assert f"{case['sides'][1]['units']:.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case holds nothing-like-it"):
        benchmarks.main(["--case", "nothing-like-it"])
    with pytest.raises(SystemExit, match="--plot needs --write"):
        benchmarks.main(["--plot"])
    with pytest.raises(SystemExit, match="takes a name, not a path"):
        benchmarks.main([*words[:-1], "../x"])
