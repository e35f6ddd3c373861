"""linear_logp and fused_preference_loss on this GPU: backends, launch configurations and installed peers, interleaved.

    PYTHONPATH=tests python -m benchmarks.gpu_ops --write FILE [--seconds 170]     what the project set out to reach
    PYTHONPATH=tests python -m benchmarks.gpu_ops --rest --race --write FILE       every other head, mode and launch

Every time is also a multiple of U, the cuBLAS GEMM of the scored rows with the head, which runs as one more contestant
in every round. Nobody is timed whose gate is red. The file is written anew after every case, the most telling cases
first, so that running out of time loses only the rest; a contestant that takes the device's context with it is noted,
and a new process goes on without it. `--device cpu --head tiny` tries the harness without a GPU. Exit status 1 where
this library's gate was red; 2 without the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch

from benchmarks.gpu_contestants import MODES, OPS, Case, Contestant, contestants, mine
from benchmarks.gpu_measure import (
    HEADS,
    Clock,
    Problem,
    Truth,
    gate,
    interleaved,
    median,
    peak_bytes,
    spread,
)

UNIT = "U"
ORDER = (
    ("linear_logp", "frozen"),
    ("fused_preference_loss", "trained"),
    ("fused_preference_loss", "frozen"),
    ("linear_logp", "trained"),
    ("linear_logp", "forward"),
)
LEAD = ("qwen2-7b", "llama-3-8b")
PADDED = (1350, 400)  # prefix of a realistic pair, and its two responses' scored tokens together
# What the project set out to reach, each line as soon as it can be had; Liger's compiler last of those with 2048 rows.
TABLE = (
    *(Case(op, head, 2048, mode) for head in LEAD for op, mode in ORDER[:2]),
    Case("linear_logp", "qwen2-7b", 8192, "frozen"),
    Case("fused_preference_loss", "qwen2-7b", PADDED[1], "trained", PADDED[0], 1, liger=True),
    Case("fused_preference_loss", "qwen2-7b", 2048, "trained", liger=True),
    Case("fused_preference_loss", "qwen2-7b", PADDED[1], "frozen", PADDED[0], 1),
    *(Case(op, "qwen2-7b", 2048, mode) for op, mode in ORDER[2:]),
    Case("linear_logp", "llama-3-8b", 8192, "frozen"),
    *(Case("fused_preference_loss", head, 8192, "trained") for head in LEAD),
)


class DeviceLost(RuntimeError):
    """A contestant left the CUDA context unusable; nothing in this process can run on the device any more."""


def everything(heads: list[str], rows: list[int]) -> list[Case]:
    """Every op and mode of some heads, the most telling first."""
    cases = []
    for group in (LEAD, tuple(h for h in heads if h not in LEAD)):
        for count in sorted(rows):
            for head in (h for h in group if h in heads):
                cases += [Case(op, head, count, mode) for op, mode in ORDER]
    return cases


def plan(chosen: argparse.Namespace) -> list[Case]:
    """The cases in the order in which they run: TABLE, or those of --head and --rows, or (--rest) all but TABLE."""
    heads = chosen.head or [name for name in HEADS if name != "tiny"]
    cases: list[Case] = list(TABLE)
    if chosen.rest or chosen.head or chosen.rows:
        cases = everything(heads, chosen.rows or [2048, 8192])
    if chosen.rest and not chosen.race:
        cases = [case for case in cases if case not in TABLE]
    return [c for c in cases if (not chosen.op or c.op in chosen.op) and (not chosen.mode or c.mode in chosen.mode)]


def run_case(
    case: Case,
    problem: Problem,
    clock: Clock,
    *,
    seconds: float,
    race: bool,
    lost: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Gate, then time, everybody who takes the case; the returned record is what the file holds for it.

    `lost`: contestants that are left out because they took the device with them, and how. Raises DeviceLost for one
    more such.
    """
    everybody, absent = contestants(case, problem, race=race)
    fused = case.op == "fused_preference_loss"
    truth, plain = Truth.exact(problem, fused=fused), Truth.plain(problem, fused=fused)
    records: dict[str, dict[str, Any]] = {name: {"status": "absent", "reason": why} for name, why in absent.items()}
    steps = {UNIT: unit_step(problem)}
    for who in everybody:
        if who.name in lost:
            records[who.name] = {"status": "failed", "reason": lost[who.name], "ours": who.ours}
            continue
        record = judge(who, case, problem, truth, plain)
        records[who.name] = record
        if record["status"] == "green":
            steps[who.name] = who.step
            problem.trained(case.mode == "trained")  # gradients of the gate's call would count as there before
            record["peak_bytes"] = peak_bytes(who.step, problem.hidden.device)
    problem.trained(False)
    times = interleaved(steps, clock, seconds=seconds)
    unit = median(times[UNIT])
    for name, record in records.items():
        if name in times:
            record |= {
                "ms": median(times[name]),
                "units": median(times[name]) / unit,
                "spread": spread(times[name]),
                "rounds": len(times[name]),
            }
    flops = 2.0 * case.rows * HEADS[case.head].width * HEADS[case.head].vocab
    return {
        "case": dataclasses.asdict(case),
        "name": case.name,
        "floor_units": case.floor,
        "unit_ms": unit,
        "unit_tflops": flops / unit / 1e9,
        "contestants": records,
    }


def unit_step(problem: Problem):
    """One U: the GEMM in the dtype of the inputs, into memory that is there already."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    return lambda: torch.mm(hidden, weight.T, out=out)


def judge(who: Contestant, case: Case, problem: Problem, truth: Truth, plain: Truth) -> dict[str, Any]:
    """One contestant's gate; `status` green, red (it ran, and was wrong) or failed (it did not run)."""
    backward, head = case.mode != "forward", case.mode == "trained"
    begin = time.perf_counter()
    try:
        verdict = gate(problem, who.step, truth, plain, backward=backward, head=head, ours=who.ours)
        synchronize(problem)
    except Exception as error:  # a peer may raise anything, and so may a compiler: the record says what
        traceback.print_exc()
        if not usable(problem.hidden.device):
            raise DeviceLost(who.name, f"{type(error).__name__}: {str(error)[:300]}") from error
        free()
        return {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}", "ours": who.ours}
    return {
        "status": "green" if verdict.passed else "red",
        "reason": verdict.reason,
        "ours": who.ours,
        "rms_logp": verdict.rms_logp,
        "grad_hidden_error": verdict.grad_hidden,
        "grad_weight_error": verdict.grad_weight,
        "first_call_seconds": time.perf_counter() - begin,
    }


def usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access every call of the process fails."""
    try:
        return bool((torch.ones(2, device=device).sum() == 2).item())
    except RuntimeError:
        return False


def synchronize(problem: Problem) -> None:
    if problem.hidden.device.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(record: dict[str, Any]) -> str:
    """One case as text."""
    lines = [f"\n{record['name']}: U = {record['unit_ms']:.3f} ms ({record['unit_tflops']:.0f} TFLOP/s)"]
    lines.append(f"  {'':44} {'ms':>9} {'U':>6} {'+-':>5} {'peak MiB':>9} {'rms logp':>9}")
    for name, found in record["contestants"].items():
        if "ms" not in found:
            lines.append(f"  {name:44} {found['status']}: {found['reason'][:110]}")
            continue
        peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:9.0f}"
        rms = "" if found["rms_logp"] is None else f"{found['rms_logp']:9.1e}"
        lines.append(f"  {name:44} {found['ms']:9.3f} {found['units']:6.2f} {found['spread']:5.1%} {peak:>9} {rms:>9}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    chosen = parser().parse_args(words)
    device, cases = torch.device(chosen.device), plan(chosen)
    if chosen.plan:
        print("\n".join(case.name for case in cases))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    if chosen.once:
        once(device)
        return 0
    begin, clock = time.monotonic(), Clock(device)
    state: dict[str, Any] = {
        "command": "python -m benchmarks.gpu_ops " + " ".join(words),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cases": [],
        "not_reached": [case.name for case in cases],
        "lost": {},  # contestant -> how it left the device unusable
        "faults": [],
    }
    if chosen.resume:
        state = json.loads(chosen.write.read_text())
    problem, key = None, None
    for case in cases:
        left = chosen.seconds - (time.monotonic() - begin)
        if left < 2:
            break
        if case.name not in state["not_reached"]:
            continue
        if key != (case.head, case.rows, case.pairs):
            problem, key = None, (case.head, case.rows, case.pairs)
            free()
            problem = Problem.random(HEADS[case.head], case.rows, device=device, pairs=case.pairs)
        assert problem is not None
        race = chosen.race and (case.op, case.mode) == ORDER[0]
        seconds = min(chosen.case_seconds * (1 + race), left / 2)
        try:
            record = run_case(case, problem, clock, seconds=seconds, race=race, lost=state["lost"])
        except DeviceLost as error:
            name, why = error.args
            state["lost"][name] = f"took the device with it in {case.name}: {why}"
            print(f"WRONG {name} {state['lost'][name]}", flush=True)
            if chosen.write is None:
                return 1
            save(chosen.write, state)  # with this case among those not reached
            go_on(words, chosen.seconds - (time.monotonic() - begin) - 8)  # a new process and its imports
        except Exception as error:  # outside anybody's gate, memory say: the other cases still run
            traceback.print_exc()
            state["faults"].append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
            problem, key = None, None
            if not usable(device):
                break
            continue
        finally:
            state["not_reached"].remove(case.name)
        state["cases"].append(record)
        print(table(record), flush=True)
        if chosen.write:
            save(chosen.write, state)
    print(f"\n{len(state['cases'])} of {len(cases)} cases in {time.monotonic() - begin:.0f} s")
    bad = [f"{c['name']}: {n}" for c in state["cases"] for n, r in c["contestants"].items() if wrong(n, r)]
    for line in (*bad, *state["faults"]):
        print(f"WRONG {line}")
    return 1 if bad or state["faults"] or not state["cases"] else 0


def go_on(words: list[str], seconds: float) -> NoReturn:
    """This program anew, from where the file stands."""
    again = [*words, "--resume", "--seconds", f"{max(seconds, 0):.0f}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_ops", *again])


def once(device: torch.device) -> None:
    """One warm call of the first case, between the marks that a profiler waits for."""
    problem = Problem.random(HEADS["qwen2-7b"], 2048, device=device)
    step = mine(TABLE[0], problem, "triton")
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def wrong(name: str, record: dict[str, Any]) -> bool:
    """Ours with a red gate, or not running; a launch configuration that is a candidate may fail to compile."""
    must_run = name in ("torch", "triton", "triton epilogue", "cuda")
    return bool(record.get("ours")) and (record["status"] == "red" or (must_run and record["status"] == "failed"))


def save(path: Path, state: dict[str, Any]) -> None:
    """Whole or not at all: a timeout may come at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_suffix(".tmp")
    spare.write_text(json.dumps(state, indent=1) + "\n")
    os.replace(spare, path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ops", description=__doc__.splitlines()[0])
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try the harness")
    made.add_argument("--head", nargs="+", choices=HEADS)
    made.add_argument("--rows", nargs="+", type=int)
    made.add_argument("--rest", action="store_true", help="every head, op and mode but those of the first plan")
    made.add_argument("--race", action="store_true", help="every launch configuration, where a frozen head is alone")
    made.add_argument("--once", action="store_true", help="one call between profiler marks, for ncu; writes nothing")
    made.add_argument("--resume", action="store_true", help="go on with the file of --write")
    made.add_argument("--op", nargs="+", choices=OPS)
    made.add_argument("--mode", nargs="+", choices=MODES)
    made.add_argument("--seconds", type=float, default=170.0, help="for everything")
    made.add_argument("--case-seconds", type=float, default=1.5, help="of timing a case; twice that where all race")
    made.add_argument("--plan", action="store_true", help="print the cases and stop")
    made.add_argument("--write", type=Path, help="JSON file")
    return made


if __name__ == "__main__":
    sys.exit(main())
