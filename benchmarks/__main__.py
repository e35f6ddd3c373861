"""python -m benchmarks: one table of what the head costs, ours and the peers', each line behind a correctness gate.

    python -m benchmarks                                  a small head, half a minute
    python -m benchmarks --full --write cpu --threads 2   the heads of known models; also benchmarks/results/cpu.json
    python -m benchmarks --case qwen2-0.5b/512/float32    the cases whose names hold this, of all of them: every head,
                                                          N = 256 ... 16384, float32 and bfloat16 (--list --case /)

U = 2 N H V flops: one matmul of N hidden rows and the lm_head in the case's dtype, measured beside every round. A side
that is more than twice as far from float64 truth as PyTorch's full logits in the same dtype gets no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("side", "U", "U cpu", "floor", "ms", "extra MiB", "rms nats", "dX rel", "dW rel")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n\n")[0])
    found.add_argument("--full", action="store_true", help="the heads of known models; hours on a CPU, see --case")
    found.add_argument("--case", action="append", default=[], help="only cases whose names hold this; repeatable")
    found.add_argument("--side", action="append", default=[], help="only these sides; repeatable")
    found.add_argument("--rounds", type=int, default=5, help="at most; their median counts")
    found.add_argument("--seconds", type=float, default=30, help="of a side, then no further round; two at least")
    found.add_argument("--threads", type=int, help="of PyTorch and of the compiled pass")
    found.add_argument("--device", default="cpu")
    found.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    found.add_argument(
        "--plot",
        action="store_true",
        help="with --write: also NAME.svg, and NAME_rows.svg where there are curves over N",
    )
    found.add_argument("--write", metavar="NAME", help="also write benchmarks/results/NAME.json")
    return found


def main(words: list[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.write and Path(arguments.write).name != arguments.write:
        raise SystemExit(f"--write takes a name, not a path: {arguments.write!r}")
    if arguments.plot and not arguments.write:
        raise SystemExit("--plot needs --write NAME, which names the picture")
    cases = chosen(arguments)
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    from benchmarks.checkout import commit
    from benchmarks.measure import machine

    about: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if words is None else words)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "cases": [],
    }
    print(json.dumps(about["machine"], indent=1))
    for case in cases:
        print(f"\n{case.name}")
        print(line(COLUMNS))
        figures = []
        for one in measured(case, arguments):
            print(line(cells(one)), flush=True)
            figures.append(dataclasses.asdict(one))
        about["cases"].append({"name": case.name, **dataclasses.asdict(case), "sides": figures})
        if arguments.write:  # after every case: hours of figures survive whatever stops the next one
            write(arguments.write, about, arguments.plot)
    return 0


def chosen(arguments: argparse.Namespace) -> list[Any]:
    from benchmarks.cases import full_cases, grid_cases, small_cases

    everything = list(dict.fromkeys(small_cases() + full_cases() + grid_cases()))
    if arguments.case:
        found = [case for case in everything if any(word in case.name for word in arguments.case)]
        if not found:
            raise SystemExit(f"no case holds {' or '.join(arguments.case)}; see --list --full")
        return found
    return full_cases() if arguments.full else small_cases()


def measured(case: Any, arguments: argparse.Namespace) -> Iterator[Any]:
    """The figures of every side that can run the case; what cannot is said, with the reason."""
    from benchmarks.cases import Problem, truth
    from benchmarks.measure import measure
    from benchmarks.sides import SIDES

    problem = Problem.of(case, arguments.device)
    true, (baseline, *_) = truth(problem), SIDES[case.task]
    base = baseline.step(problem)()
    for side in SIDES[case.task]:
        wanted = side.name in arguments.side if arguments.side else arguments.full or not side.slow
        if not wanted or (side.trained_only and case.grads != "trained"):
            continue
        reason = side.missing()
        if reason is not None:
            print(f"  {side.name}: {reason}")
            continue
        yield measure(side, problem, true, base, rounds=arguments.rounds, seconds=arguments.seconds)


def cells(one: Any) -> tuple[str, ...]:
    errors = [f"{one.errors[name]:.1e}" if name in one.errors else "" for name in ("values", "grad of hidden")]
    errors.append(f"{one.errors['grad of weight']:.1e}" if "grad of weight" in one.errors else "")
    if one.units is None:
        return (one.side, "", "", str(one.floor), "", "", *errors, f"gate: {one.gate}")
    extra = "" if one.extra_bytes is None else f"{one.extra_bytes / 2**20:.0f}"
    cpu = "" if one.cpu_units is None else f"{one.cpu_units:.2f}"
    return (one.side, f"{one.units:.2f}", cpu, str(one.floor), f"{one.milliseconds:.1f}", extra, *errors)


def line(words: tuple[str, ...]) -> str:
    name, *rest = words
    return "  ".join(["", name.ljust(17), *(word.rjust(9) for word in rest)])


def write(name: str, about: dict[str, Any], picture: bool) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    if picture:
        from benchmarks.plot import curves, plot

        plot(about, RESULTS / f"{name}.svg")
        curves(about, RESULTS / f"{name}_rows.svg")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the numeric gate is the tests'
    raise SystemExit(main())
