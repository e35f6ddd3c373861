"""benchmarks/gpu.sh as far as it goes without a GPU: the plan, how steps end, the facts, the page.

Its benchmarks are in test_gpu_benchmarks.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_facts, gpu_summary

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
CHECKERS = ["memcheck", "racecheck", "synccheck", "initcheck"]
STEPS = ["build", "launchers", "tests", "small", "ceilings", "ops", "step", *CHECKERS]
STEPS += ["counters", "liger", "long", "full", "tune", "more"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script for Linux")


def script(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHON": sys.executable, "OUT": str(folder / "out"), "WORK": str(folder / "work"), **environment}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **settings}
    )


def steps_of(folder: Path) -> dict[str, list[str]]:
    rows = (line.split("\t") for line in (folder / "work/parts/steps.tsv").read_text().splitlines())
    return {name: rest for name, *rest in rows}


# --- The script ---------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    result = script("--dry-run", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split(":")[0] for line in result.stdout.splitlines() if ": at most" in line]
    assert lines == ["facts", *STEPS]
    for words in ("--no-build-isolation", "--no-index --no-deps", "pytest -v --tb=short -m gpu", "--tool racecheck"):
        assert words in result.stdout
    assert "tests/kernels/test_device.py" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_some_steps(tmp_path):
    only = script("--dry-run", "--only", "ops,small", folder=tmp_path).stdout
    assert [s for s in STEPS if f"{s}: at most" in only] == ["build", "small", "ops"]
    without = script("--dry-run", "--skip", "build,more,racecheck", folder=tmp_path).stdout
    left = [step for step in STEPS if step not in ("build", "more", "racecheck")]
    assert [s for s in STEPS if f"{s}: at most" in without] == left


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--only", "opps"], {}, "no step is called opps; there are: build launchers"),
        (["--skip"], {}, "--skip needs names"),
        (["--fast"], {}, "unknown argument --fast"),
        (["--skip", "build"], {}, "is not there from an earlier run"),
        ([], {"BUDGET": "9m"}, "BUDGET must be whole seconds, got '9m'"),
    ],
)
def test_bad_arguments(tmp_path, arguments, environment, message):
    result = script(*arguments, folder=tmp_path, **environment)
    assert result.returncode == 64
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device(tmp_path):
    result = script(folder=tmp_path)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "no CUDA device"
    assert json.loads((tmp_path / "out/summary.json").read_text())["facts"]["device"] is None
    assert "no CUDA device" in (tmp_path / "out/log.txt").read_text()


PRETENDER = """#!/usr/bin/env bash
# Stands in for Python: says what it was asked, and ends as the module's name says.
case "$*" in *gpu_summary*) exec "$REAL" "$@" ;; esac
echo "$*"
cat >/dev/null  # must not find the rest of the plan there
case "$*" in
  *gpu_sanitize*) echo "RuntimeError: out of shared memory"; echo "1 launches checked"; exit 3 ;;
  *gpu_small*) echo '{"preference": [], "failed": [], "host_syncs": {}}' >"$PARTS/small.json"; sleep 60 ;;
  *gpu_ops*) echo '{}' >"$PARTS/ops.json" ;;
  *gpu_step*) echo "not installed: peft"; exit 77 ;;
esac
"""


@pytest.fixture
def pretender(tmp_path, monkeypatch) -> str:
    """An interpreter, and the script's own environment of it, that only pretend; the page is made by the real one."""
    monkeypatch.setenv("REAL", sys.executable)
    for place in (tmp_path / "python", tmp_path / "work/venv/bin/python"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(PRETENDER)
        place.chmod(0o755)
    return str(tmp_path / "python")


def test_a_failing_step_does_not_stop_the_others(tmp_path, pretender):
    result = script("--only", "launchers,ops,step", "--skip", "build", folder=tmp_path, PYTHON=pretender)
    assert result.returncode == 1, result.stdout + result.stderr
    found = steps_of(tmp_path)
    assert found["launchers"][:2] == ["failed", "3"]
    assert found["ops"][0] == "ok"
    assert found["step"] == ["skipped", "77", found["step"][2], "not installed: peft"]
    assert found["tests"][0] == "left out"
    assert "FAILED: launchers" in result.stdout.splitlines()[-1]
    kept = tmp_path / "out"
    assert "gpu_ops --seconds" in (kept / "log.txt").read_text()
    assert sorted(path.name for path in kept.iterdir()) == ["log.txt", "steps.tsv", "summary.json", "summary.md"]
    # A reader of the last lines alone learns why.
    assert found["launchers"][3] == "exit status 3: RuntimeError: out of shared memory"
    assert "failed: launchers (exit status 3: RuntimeError: out of shared memory)" in result.stdout
    assert len(result.stdout) < 12000


def test_steps_side_by_side(tmp_path, pretender):
    """The checkers time nothing, so they share the device: each has its own log, status and row.

    The pretended tool ends well only when all four have begun.
    """
    place = tmp_path / "bin/compute-sanitizer"
    place.parent.mkdir()
    place.write_text(
        '#!/usr/bin/env bash\ntouch "$PARTS/$2.begun"\n'
        'for _ in {1..60}; do (( $(ls "$PARTS"/*.begun | wc -l) == 4 )) && break; sleep 0.2; done || exit 9\n'
        'echo "$*"\n[[ $2 != racecheck ]]\n'
    )
    place.chmod(0o755)
    path = f"{place.parent}:{os.environ['PATH']}"
    result = script("--only", ",".join(CHECKERS), "--skip", "build", folder=tmp_path, PYTHON=pretender, PATH=path)
    found = steps_of(tmp_path)
    assert {name: found[name][0] for name in CHECKERS} == {
        **dict.fromkeys(CHECKERS, "ok"),
        "racecheck": "failed",
    }, result.stdout
    assert found["racecheck"][1] == "1"
    assert "--tool initcheck" in (tmp_path / "work/parts/logs/initcheck.log").read_text()
    targets = json.loads((tmp_path / "out/summary.json").read_text())["targets"]
    assert (targets[0]["measured"], targets[0]["reached"]) == (1.0, False)


@pytest.mark.slow
def test_a_step_over_its_time_is_stopped_and_the_budget_is_kept(tmp_path, pretender):
    """15 of 36 s are kept for the summary; the small step, which takes a minute, is cut, and nothing else starts."""
    result = script("--only", "small,ops", "--skip", "build", folder=tmp_path, PYTHON=pretender, BUDGET="36")
    found = steps_of(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert found["small"][:2] == ["timeout", "124"]
    assert found["ops"][0] == "skipped"
    assert "left of the budget" in found["ops"][3]
    assert "small" in json.loads((tmp_path / "out/summary.json").read_text()), "what it wrote before it was stopped"


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_had(tmp_path, pretender):
    """OUT is brought up to date while a step runs: here the whole script is killed in the middle of one."""
    settings = {"PYTHON": pretender, "OUT": str(tmp_path / "out"), "WORK": str(tmp_path / "work")}
    words = ["bash", str(SCRIPT), "--only", "small", "--skip", "build"]
    process = subprocess.Popen(
        words, env={**os.environ, **settings, "BUDGET": "240"}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            path = tmp_path / "out/summary.json"
            if path.is_file() and "small" in json.loads(path.read_text()):
                break
            time.sleep(0.5)
        else:
            raise AssertionError("nothing of the running step after 30 s")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    result = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# --- Facts --------------------------------------------------------------------------------------------------------


def test_facts_name_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_facts, "OPTIONAL", (("no_such_module", "no-such-wheel", "nothing"),))
    monkeypatch.setattr(gpu_facts, "said_by", lambda *command: None)
    monkeypatch.setenv("COMMIT", "abc1234")
    found = gpu_facts.facts()
    assert found["missing"] == {"no-such-wheel": "nothing"}
    assert found["commit"] == "abc1234"
    assert found["changed"] is None
    assert len(found["sources"]) == 16
    assert found["versions"]["torch"] == torch.__version__


# --- The page -----------------------------------------------------------------------------------------------------


def ops_case(name, op, mode, head="qwen2-7b", rows=2048, padded=0, **times):
    everybody = {
        who: {"status": "green", "reason": "", "ours": who.startswith("triton"), "ms": ms, "units": ms / 10}
        | {"spread": 0.01, "rounds": 9, "peak_bytes": 1 << 29, "rms_logp": 4e-6}
        for who, ms in times.items()
    }
    everybody["cce"] = {"status": "absent", "reason": "cut_cross_entropy is not installed"}
    record = {"op": op, "mode": mode, "head": head, "rows": rows, "padded": padded, "pairs": 4}
    shared = {"floor_units": 2, "unit_ms": 10.0, "unit_tflops": 700.0}
    return {"name": name, "case": record, "contestants": everybody, **shared}


def test_targets_take_the_worst_case():
    parts = {
        "ops": {
            "cases": [
                ops_case("a", "linear_logp", "frozen", triton=22.0, trl=40.0),
                ops_case("b", "linear_logp", "frozen", head="llama-3-8b", triton=24.0, trl=45.0),
                ops_case("c", "linear_logp", "frozen", rows=8192, triton=21.0, trl=40.0),
                ops_case(
                    "d", "fused_preference_loss", "trained", rows=400, padded=1350, triton=30.0, **{"liger dpo": 300}
                ),
            ]
        },
        "small": {"preference": [{"microseconds": 9.0}, {"microseconds": 20.0}]},
        "step": {"cases": [{"k": 2, "sides": {"live reference": {"ratio": 1.9}}}]},
    }
    found = {row["name"]: (row["measured"], row["reached"]) for row in gpu_summary.targets(parts)}
    assert found["frozen head, N >= 2048, Qwen2-7B and Llama-3"] == (2.4, False)
    assert found["frozen head against TRL"] == (pytest.approx(40 / 22), True)
    assert found["frozen head against cce_exact"] == (None, None)
    assert found["padded pair against Liger DPO"] == (10.0, True)
    assert found["peak extra memory, frozen, N = 8192, V = 152k"] == (0.5, True)
    assert found["score, loss and gradient in one launch, R <= 64"] == (20.0, False)
    assert found["step, K = 2, live reference, against TRL"] == (1.9, True)
    assert found["step, K = 5, live reference, against TRL"] == (None, None)


def test_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPU_COMMAND", "BUDGET=540 bash benchmarks/gpu.sh")
    (tmp_path / "steps.tsv").write_text("build\tok\t0\t40\t\ntests\tfailed\t1\t60\texit status 1, see logs/tests.log\n")
    case = ops_case("linear_logp frozen", "linear_logp", "frozen", triton=22.0, **{"triton epilogue": 20.0})
    facts = gpu_facts.facts() | {"device": {"name": "Some GPU", "capability": "9.0"}}
    parts = {
        "facts": facts,
        "ops": {"cases": [case], "not_reached": ["the last one"]},
        "small": {
            "preference": [],
            "failed": ["preference R=2: wrong"],
            "graphs": {},
            "host_syncs": {"linear_logp frozen": ["x.py:97"]},
        },
        "ceilings": {"bandwidth_gb_s": {"copy": 4300.0}, "gemm": []},
        "step": {
            "model": "m",
            "lora": True,
            "cases": [{"k": 2, "prefix": 9, "sides": {"trl": {"error": "no | memory"}}}],
        },
    }
    for name, part in parts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    assert gpu_summary.main(["--folder", str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    for words in (
        "Some GPU",
        "`BUDGET=540 bash benchmarks/gpu.sh`",
        "| tests | failed | 60 |",
        "| frozen head, N >= 2048, Qwen2-7B and Llama-3 | <= 2.3 U | 2.2 | reached |",
        "- linear_logp frozen: triton epilogue, 2.00 U against 2.20 U",
        "| cce | absent: cut_cross_entropy is not installed |",
        "copy 4300 GB/s",
        "- linear_logp frozen: 1 waits: `x.py:97`",
        "FAILED preference R=2",
        "no / memory",
        "Not reached in the time: the last one.",
        f"sources {facts['sources']}",
    ):
        assert words in page, words
    whole = json.loads((tmp_path / "summary.json").read_text())
    assert whole["command"].startswith("BUDGET=540")
    assert whole["steps"][1]["status"] == "failed"
    assert "failed: tests" in capsys.readouterr().out


def test_page_of_nothing(tmp_path):
    assert gpu_summary.main(["--folder", str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page.count("not measured") == len(gpu_summary.TARGETS) + 1  # and the checkers
