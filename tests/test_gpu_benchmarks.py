"""The benchmarks that benchmarks/gpu.sh runs, as far as they go without a GPU: timing, truth, gates, results files."""

from __future__ import annotations

import contextlib
import itertools
import json

import pytest
import torch

from benchmarks import gpu_ceilings, gpu_contestants, gpu_measure, gpu_ops, gpu_small, gpu_step
from benchmarks.gpu_contestants import Case, Contestant
from benchmarks.gpu_measure import HEADS, Clock, Problem, Truth
from benchmarks.step_case import PAIR
from benchmarks.step_sides import Run
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


def planned(*words: str) -> list[Case]:
    return gpu_ops.plan(gpu_ops.parser().parse_args(list(words)))


def test_plan_starts_with_the_cases_that_tell_most():
    """Every line that the project set out to reach has its case, and what compiles for long comes behind the rest."""
    cases = planned()
    assert cases[0] == Case("linear_logp", "qwen2-7b", 2048, "frozen")
    assert cases[1] == Case("fused_preference_loss", "qwen2-7b", 2048, "trained")
    assert {(c.head, c.mode) for c in cases[:4]} == {(h, m) for h in gpu_ops.LEAD for m in ("frozen", "trained")}
    assert Case("linear_logp", "qwen2-7b", 8192, "frozen") in cases[:5]
    assert [c.padded for c in cases if c.liger] == [1350, 0]
    assert not any(c.liger for c in cases[:5])
    assert len({c.name for c in cases}) == len(cases)


def test_the_rest_is_everything_else():
    rest = planned("--rest")
    assert not set(rest) & set(gpu_ops.TABLE)
    assert set(gpu_ops.everything(list(HEADS)[:4], [2048, 8192])) <= set(rest) | set(gpu_ops.TABLE)
    assert len(planned("--rest", "--race")) > len(rest)  # the first plan's frozen heads, with every configuration
    assert all(c.mode == "frozen" for c in planned("--head", "qwen2-7b", "--rows", "2048", "--mode", "frozen"))


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


def test_a_contestant_that_loses_the_device_is_left_out_by_the_next_process(monkeypatch, tmp_path, capsys):
    """After an illegal access every CUDA call of a process fails: what is measured is kept, and a new one goes on."""

    def everybody(case, problem, *, race):
        def late():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        def good():
            return gpu_contestants.mine(case, problem, "torch")()

        return [Contestant("torch", good), Contestant("wild", late)], {}

    class Replaced(Exception):
        pass

    def execv(program, arguments):
        raise Replaced(arguments)

    monkeypatch.setattr(gpu_ops, "contestants", everybody)
    monkeypatch.setattr(gpu_ops, "usable", lambda device: False)
    monkeypatch.setattr(gpu_ops.os, "execv", execv)
    path = tmp_path / "ops.json"
    words = ["--device", "cpu", "--head", "tiny", "--rows", "64", "--op", "linear_logp", "--case-seconds", "0"]
    words += ["--mode", "forward", "frozen", "--write", str(path)]
    with pytest.raises(Replaced) as replaced:
        gpu_ops.main(words)
    again = replaced.value.args[0]
    assert again[1:3] == ["-m", "benchmarks.gpu_ops"]
    state = json.loads(path.read_text())
    assert state["cases"] == []
    assert len(state["not_reached"]) == 2
    assert gpu_ops.main(again[3:]) == 0  # seconds that are left; "wild" is a candidate, which may fail
    state = json.loads(path.read_text())
    assert state["not_reached"] == []
    for case in state["cases"]:
        assert case["contestants"]["torch"]["status"] == "green"
        assert case["contestants"]["wild"]["reason"].startswith("took the device with it in linear_logp frozen")
    assert "WRONG wild took the device with it" in capsys.readouterr().out


def test_a_case_that_fails_outside_the_gates_costs_that_case(monkeypatch, tmp_path, capsys):
    """Memory for the truth, say."""
    real = gpu_ops.run_case

    def run_case(case, *arguments, **options):
        if case.mode == "frozen":
            raise RuntimeError("out of memory")
        return real(case, *arguments, **options)

    monkeypatch.setattr(gpu_ops, "run_case", run_case)
    path = tmp_path / "ops.json"
    words = ["--device", "cpu", "--head", "tiny", "--rows", "64", "--op", "linear_logp", "--case-seconds", "0"]
    assert gpu_ops.main([*words, "--mode", "forward", "frozen", "--write", str(path)]) == 1
    state = json.loads(path.read_text())
    assert [case["case"]["mode"] for case in state["cases"]] == ["forward"]
    assert state["faults"] == ["linear_logp frozen tiny N=64: RuntimeError: out of memory"]
    assert "WRONG linear_logp frozen tiny N=64: RuntimeError" in capsys.readouterr().out


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
    assert "10 launches checked, 0 failed" in said


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
    assert [figures[name]["agrees"] for name in ("trl", "live reference", "cached reference")] == [True, True, False]
    assert [fault.split(":")[0] for fault in faults] == ["cached reference", "separate rows"]
    nan = {"trl": side(1.0, [0.69]), "live reference": side(1.0, [float("nan")])}
    assert len(gpu_step.compare(nan)) == 1


class Pretended:
    """A side without a model."""

    model = reference = None

    def __init__(self, name, workers):
        self.name, self.workers, self.device = name, workers, CPU

    def run(self, steps):
        if self.name == "cached reference":
            raise RuntimeError("out of memory")
        made, _ = Run(), torch.ones(3).sum()  # something to profile
        for mark in range(steps + 1):
            made.marks.append(float(mark))
            made.cpu_marks.append(float(mark))
        made.losses = [0.69] * steps
        return made


def test_a_side_that_fails_costs_that_side_and_each_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_step, "build_model", lambda *a, **k: None)
    monkeypatch.setattr(gpu_step, "build_processor", lambda: None)
    monkeypatch.setattr(gpu_step, "build_records", lambda *a, **k: [])
    monkeypatch.setattr(gpu_step, "plan", lambda chosen: [(k, s) for k in chosen.k for s in PAIR])
    monkeypatch.setattr(gpu_step.Meter, "watching", lambda self, *models: contextlib.nullcontext())

    def builders(model, processor, records, names, *, lora, workers):
        return {name: lambda name=name: Pretended(name, workers) for name in names}

    monkeypatch.setattr(gpu_step, "builders", builders)
    written = []
    monkeypatch.setattr(gpu_step, "save", lambda path, state: written.append(json.loads(json.dumps(state))))
    profile = tmp_path / "profile.txt"
    words = ["--device", "cpu", "--steps", "2", "--write", str(tmp_path / "x.json"), "--profile", str(profile)]
    assert gpu_step.main(words) == 1
    assert len(written) == 6
    assert [list(case["sides"]) for case in written[3]["cases"]] == [list(PAIR), ["trl"]]
    sides = written[-1]["cases"][1]["sides"]
    assert sides["cached reference"] == {"error": "RuntimeError: out of memory"}
    assert sides["live reference"]["ratio"] == 1.0
    assert sides["live reference"]["seconds"] == 1.0
    assert "CPU" in profile.read_text()
    said = capsys.readouterr().out
    assert "FAULT K=5 cached reference: RuntimeError: out of memory" in said
    assert gpu_step.main([*words, "--seconds", "5"]) == 1
    assert "not reached: K=2 trl" in capsys.readouterr().out


def test_the_plan_of_the_step_has_the_wanted_figures_first():
    chosen = gpu_step.parser().parse_args(["--k", "2", "5"])
    found = [(k, side) for k, side in gpu_step.plan(chosen) if side in PAIR]
    assert found[-2:] == [(5, "live reference"), (5, "cached reference")]
    assert gpu_step.plan(gpu_step.parser().parse_args(["--k", "2", "--side", "live reference"])) == [
        (2, "live reference")
    ]
