"""linear_logp and fused_preference_loss on this GPU: backends, launch configurations and installed peers, interleaved.

    PYTHONPATH=tests python -m benchmarks.gpu_ops --write FILE [--seconds 170] [--head qwen2-7b] [--rows 2048]

Every time is also a multiple of U, the cuBLAS GEMM of the scored rows with the head, which runs as one more contestant
in every round. Nobody is timed whose gate is red. The file is written anew after every case, the most telling cases
first, so that running out of time loses only the rest. `--device cpu --head tiny` tries the harness without a GPU.
Exit status 1 where this library's gate was red; 2 without the device.
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
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_contestants import MODES, OPS, Case, Contestant, contestants
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
# The most telling first: a frozen head alone, a trained head fused, the other two, and the forward pass.
ORDER = (
    ("linear_logp", "frozen"),
    ("fused_preference_loss", "trained"),
    ("fused_preference_loss", "frozen"),
    ("linear_logp", "trained"),
    ("linear_logp", "forward"),
)
LEAD = ("qwen2-7b", "llama-3-8b")
PADDED = (1350, 400)  # prefix of a realistic pair, and its two responses' scored tokens together


def plan(heads: list[str], rows: list[int], *, ops: list[str] | None = None, modes: list[str] | None = None):
    """The cases in the order in which they run."""
    cases = []
    for group in (LEAD, tuple(h for h in heads if h not in LEAD)):
        for count in sorted(rows):
            for head in (h for h in group if h in heads):
                cases += [Case(op, head, count, mode) for op, mode in ORDER]
        if group == LEAD and "qwen2-7b" in heads:
            prefix, scored = PADDED
            padded = [Case("fused_preference_loss", "qwen2-7b", scored, m, prefix, 1) for m in ("trained", "frozen")]
            cases[len(ORDER) :] = padded + cases[len(ORDER) :]
    return [c for c in cases if (not ops or c.op in ops) and (not modes or c.mode in modes)]


def run_case(case: Case, problem: Problem, clock: Clock, *, seconds: float, race: bool) -> dict[str, Any]:
    """Gate, then time, everybody who takes the case; the returned record is what the file holds for it."""
    everybody, absent = contestants(case, problem, race=race)
    fused = case.op == "fused_preference_loss"
    truth, plain = Truth.exact(problem, fused=fused), Truth.plain(problem, fused=fused)
    records: dict[str, dict[str, Any]] = {name: {"status": "absent", "reason": why} for name, why in absent.items()}
    steps = {UNIT: unit_step(problem)}
    for who in everybody:
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
    chosen = parser().parse_args(words)
    device = torch.device(chosen.device)
    cases = plan(chosen.head, chosen.rows, ops=chosen.op, modes=chosen.mode)
    if chosen.plan:
        print("\n".join(case.name for case in cases))
        return 0
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    begin, clock = time.monotonic(), Clock(device)
    state: dict[str, Any] = {
        "command": "python -m benchmarks.gpu_ops " + " ".join(sys.argv[1:] if words is None else words),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cases": [],
        "not_reached": [case.name for case in cases],
    }
    problem, key = None, None
    for case in cases:
        left = chosen.seconds - (time.monotonic() - begin)
        if left < 2:
            break
        if key != (case.head, case.rows, case.pairs):
            problem, key = None, (case.head, case.rows, case.pairs)
            free()
            problem = Problem.random(HEADS[case.head], case.rows, device=device, pairs=case.pairs)
        assert problem is not None
        race = (case.op, case.mode) == ORDER[0]
        record = run_case(case, problem, clock, seconds=min(chosen.case_seconds * (1 + race), left / 2), race=race)
        state["cases"].append(record)
        state["not_reached"].remove(case.name)
        print(table(record), flush=True)
        if chosen.write:
            save(chosen.write, state)
    print(f"\n{len(state['cases'])} of {len(cases)} cases in {time.monotonic() - begin:.0f} s")
    bad = [f"{c['name']}: {n}" for c in state["cases"] for n, r in c["contestants"].items() if wrong(n, r)]
    for line in bad:
        print(f"WRONG {line}")
    return 1 if bad or not state["cases"] else 0


def wrong(name: str, record: dict[str, Any]) -> bool:
    """Ours with a red gate, or not running; a launch configuration that is a candidate may fail to compile."""
    must_run = name in ("torch", "triton", "triton epilogue")
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
    made.add_argument("--head", nargs="+", choices=HEADS, default=[name for name in HEADS if name != "tiny"])
    made.add_argument("--rows", nargs="+", type=int, default=[2048, 8192])
    made.add_argument("--op", nargs="+", choices=OPS)
    made.add_argument("--mode", nargs="+", choices=MODES)
    made.add_argument("--seconds", type=float, default=170.0, help="for everything")
    made.add_argument("--case-seconds", type=float, default=1.5, help="of timing a case; twice that where all race")
    made.add_argument("--plan", action="store_true", help="print the cases and stop")
    made.add_argument("--write", type=Path, help="JSON file")
    return made


if __name__ == "__main__":
    sys.exit(main())
