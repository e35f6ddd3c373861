"""The benchmarks that benchmarks/gpu.sh runs, as far as they go without a GPU: timing, truth, gates, results files."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from benchmarks import gpu_ceilings, gpu_contestants, gpu_measure, gpu_ops, gpu_small, gpu_step
from benchmarks.gpu_contestants import Case, Contestant
from benchmarks.gpu_measure import HEADS, Clock, Problem, Truth
from mmrlhf.ops import streaming

CPU = torch.device("cpu")


# --- Timing and the gate ------------------------------------------------------------------------------------------


def test_interleaved_turns_the_order_and_counts_alike():
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    times = gpu_measure.interleaved(steps, Clock(CPU), seconds=0.0, least=3)
    assert {name: len(spent) for name, spent in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_spread_is_that_of_the_quartiles():
    assert gpu_measure.spread([1.0, 2.0]) == 0.0
    assert gpu_measure.spread([9.0, 10.0, 10.0, 11.0, 10.0]) == pytest.approx(0.05)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.random(HEADS["tiny"], 64, device=CPU)


def test_problem_needs_rows_for_its_pairs():
    with pytest.raises(ValueError, match=r"rows must be at least 2 a pair \(8\), got 7"):
        Problem.random(HEADS["tiny"], 7, device=CPU)


CASES = [Case(op, "tiny", 64, mode) for op, mode in itertools.product(gpu_contestants.OPS, gpu_contestants.MODES)]
CASES = [case for case in CASES if (case.op, case.mode) != ("fused_preference_loss", "forward")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_truth_is_what_autograd_gives(problem, case):
    """The blockwise float64 truth of the sampled rows, against PyTorch's own path in float32 on the whole problem."""
    fused = case.op == "fused_preference_loss"
    truth, plain = Truth.exact(problem, fused=fused), Truth.plain(problem, fused=fused)
    for name in ("logp", "grad_hidden", "grad_weight"):
        exact, near = getattr(truth, name), getattr(plain, name).double()
        assert exact.dtype == torch.float64
        assert (exact - near).norm() < 1e-5 * exact.norm()
        assert exact.norm() > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_gate_tells_right_from_wrong(problem, case):
    fused = case.op == "fused_preference_loss"
    truth, plain = Truth.exact(problem, fused=fused), Truth.plain(problem, fused=fused)
    right = gpu_contestants.mine(case, problem, "torch")

    def wrong():
        logp = right()
        for leaf in (problem.hidden, problem.weight):
            if leaf.grad is not None:
                leaf.grad *= 1.001
        return logp if case.mode != "forward" else logp + 1e-3

    verdicts = [gpu_ops.judge(Contestant("x", step), case, problem, truth, plain) for step in (right, wrong)]
    assert [v["status"] for v in verdicts] == ["green", "red"]
    assert verdicts[0]["rms_logp"] < 1e-5
    assert "PyTorch's" in verdicts[1]["reason"]
    if case.mode != "forward":
        assert verdicts[1]["grad_hidden_error"] == pytest.approx(1e-3, rel=0.1)
    assert not problem.gating


def test_a_contestant_without_gradients_is_red(problem):
    case = Case("linear_logp", "tiny", 64, "trained")
    truth = Truth.exact(problem, fused=False)

    def values_only():
        problem.trained(True)
        return torch.zeros(64)

    verdict = gpu_ops.judge(Contestant("x", values_only), case, problem, truth, truth)
    assert verdict["status"] == "red"
    assert "only ['logp'] came out" in verdict["reason"]


# --- The ops benchmark --------------------------------------------------------------------------------------------


def test_plan_starts_with_the_cases_that_tell_most():
    cases = gpu_ops.plan([name for name in HEADS if name != "tiny"], [8192, 2048])
    assert cases[0] == Case("linear_logp", "qwen2-7b", 2048, "frozen")
    assert cases[1] == Case("fused_preference_loss", "qwen2-7b", 2048, "trained")
    assert len(cases) == len(set(cases)) == 4 * 2 * 5 + 2
    assert [c.padded for c in cases[5:7]] == [1350, 1350]
    small = [i for i, c in enumerate(cases) if c.head not in gpu_ops.LEAD]
    assert min(small) == len(cases) - len(small)
    assert all(c.mode == "frozen" for c in gpu_ops.plan(["qwen2-7b"], [2048], modes=["frozen"]))


def test_ops_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "ops.json"
    words = ["--device", "cpu", "--head", "tiny", "--rows", "64", "--case-seconds", "0", "--mode", "trained"]
    assert gpu_ops.main([*words, "--write", str(path)]) == 0
    state = json.loads(path.read_text())
    assert [c["case"]["op"] for c in state["cases"]] == ["fused_preference_loss", "linear_logp"]
    assert state["not_reached"] == []
    for case in state["cases"]:
        ours = case["contestants"]["torch"]
        assert ours["status"] == "green"
        assert ours["units"] == pytest.approx(ours["ms"] / case["unit_ms"])
        assert ours["rounds"] >= 5
        assert case["floor_units"] == 3
    assert "rms logp" in capsys.readouterr().out


def test_who_is_wrong_is_named_and_not_timed(monkeypatch, tmp_path, capsys):
    def broken(case, problem, *, race):
        def late():
            raise RuntimeError("out of shared memory")

        def off():
            return torch.zeros(case.rows)

        return [Contestant("torch", late), Contestant("candidate", late), Contestant("other", off)], {"peer": "absent"}

    monkeypatch.setattr(gpu_ops, "contestants", broken)
    path = tmp_path / "ops.json"
    words = ["--device", "cpu", "--head", "tiny", "--rows", "64", "--op", "linear_logp", "--mode", "forward"]
    assert gpu_ops.main([*words, "--case-seconds", "0", "--write", str(path)]) == 1
    said = capsys.readouterr().out
    assert "WRONG linear_logp forward tiny N=64: torch" in said
    assert "WRONG linear_logp forward tiny N=64: other" in said
    assert "WRONG linear_logp forward tiny N=64: candidate" not in said
    found = json.loads(path.read_text())["cases"][0]["contestants"]
    assert {name: record["status"] for name, record in found.items()} == {
        "peer": "absent",
        "torch": "failed",
        "candidate": "failed",
        "other": "red",
    }
    assert not any("ms" in record for record in found.values())
    assert found["torch"]["reason"] == "RuntimeError: out of shared memory"


def test_launch_configuration_is_put_back():
    from mmrlhf.kernels.triton import configs

    before, chosen = configs.pick, configs.CANDIDATES[0].config
    problem = configs.Problem(90, 2048, 4096, 128256)
    with gpu_contestants.launched_with(chosen):
        assert configs.pick(problem) is chosen
    assert configs.pick is before
    names = [gpu_contestants.describe(rule.config) for rule in (*configs.GEMM_RULES, *configs.CANDIDATES)]
    assert len(names) == len(set(names))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("module", [gpu_ops, gpu_ceilings, gpu_small, gpu_step], ids=lambda m: m.__name__)
def test_helpers_without_a_device(module, capsys):
    assert module.main([]) == 2
    assert capsys.readouterr().out.strip() == "no CUDA device"


def test_ceilings(tmp_path):
    path = tmp_path / "ceilings.json"
    words = ["--device", "cpu", "--head", "tiny", "--rows", "16", "--copy-bytes", "4096", "--write", str(path)]
    assert gpu_ceilings.main(words) == 0
    found = json.loads(path.read_text())
    assert [g["gemm"] for g in found["gemm"]] == ["logits", "dX", "dW"]
    assert set(found["bandwidth_gb_s"]) == {"copy", "scale in place"}


# --- Small kernel, launchers, whole step --------------------------------------------------------------------------


@pytest.mark.parametrize("responses", gpu_small.SIZES)
def test_small_gate(responses):
    made, logp = gpu_small.objective(responses, CPU)
    assert made.pairs.max() == responses - 1
    gpu_small.check(made, logp, streaming.objective)

    def off(o, values):
        result, coef = streaming.objective(o, values)
        return result, coef * 1.001

    with pytest.raises(AssertionError, match="d loss / d logp: error"):
        gpu_small.check(made, logp, off)


@pytest.mark.slow
def test_launchers_in_the_interpreter(subprocess_python):
    said = subprocess_python(
        "import sys; sys.path.insert(0, 'tests')\n"
        "from benchmarks.gpu_sanitize import main\n"
        "assert main(['--only', '[5, 80, 1003]']) == 0\n"
        "assert main(['--only', 'preference R=2']) == 0\n"
        "assert main(['--only', 'nothing bears this name']) == 1\n",
        env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "8 launches checked, 0 failed" in said


def test_step_figures_need_agreement():
    def side(seconds, losses):
        return {"seconds": seconds, "losses": losses}

    figures = {
        "trl": side(2.0, [0.69, 0.60]),
        "live reference": side(1.0, [0.69, 0.61]),
        "cached reference": side(0.5, [0.69, 0.70]),
        "separate rows": {"error": "OutOfMemoryError"},
    }
    faults = gpu_step.compare(figures)
    assert figures["live reference"]["ratio"] == 2.0
    assert "ratio" not in figures["cached reference"]
    assert [fault.split(":")[0] for fault in faults] == ["cached reference", "separate rows"]
    nan = {"trl": side(1.0, [0.69]), "live reference": side(1.0, [float("nan")])}
    assert len(gpu_step.compare(nan)) == 1
