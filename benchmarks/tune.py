"""Which launch configuration is fastest on this machine, and the data file that `pick()` reads.

    PYTHONPATH=tests python -m benchmarks.tune --write            CUDA: writes kernels/triton/tuned.py
    PYTHONPATH=tests python -m benchmarks.tune --device cpu       CPU: prints the tiles of `streaming`, fastest first

CUDA: the forward pass of every row of the tables that fits, over the known heads and N = 64 ... 8192, interleaved, each
behind the numeric gate. For each N the winner is the smallest geometric mean of its times in U over the heads; it is
written only where it beats what `pick()` takes now by more than MARGIN, since a difference below that is noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_contestants import Case, launch_configs, mine
from benchmarks.gpu_measure import HEADS, Clock, Problem, Step, Truth, gate, interleaved, median

ROOT = Path(__file__).resolve().parents[1]
TUNED = ROOT / "kernels" / "triton" / "tuned.py"
MARGIN = 0.02
ROWS = (64, 256, 1024, 2048, 8192)
UNIT = "U"
PICKED = "triton"  # the name of what `pick()` takes, in `launch_configs`
Times = dict[int, dict[str, dict[str, float]]]  # N -> configuration -> head -> time in U


def winners(times: Times, *, margin: float = MARGIN) -> dict[int, str]:
    """For each N the configuration to take; PICKED where none of the others is faster by more than `margin`.

    A configuration counts only where it was measured on every head that the picked one was.
    """
    found = {}
    for rows, by_name in sorted(times.items()):
        heads = set(by_name[PICKED])
        means = {name: geometric(list(by_head.values())) for name, by_head in by_name.items() if set(by_head) == heads}
        best = min(means, key=means.__getitem__)
        found[rows] = best if means[best] < means[PICKED] * (1 - margin) else PICKED
    return found


def geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(found: dict[int, str], configurations: dict[int, dict[str, Any]], arch: int) -> list[dict[str, Any]]:
    """Rows for tuned.py, fewest N first: each holds up to its N, the last without an end; neighbours alike are one.

    `configurations` [N][name] is a GemmConfig; for PICKED what `pick()` returns for that N.
    """
    rows: list[dict[str, Any]] = []
    for count, name in sorted(found.items()):
        config = dataclasses.asdict(configurations[count][name])
        if rows and rows[-1]["config"] == config:
            rows[-1]["max_rows"] = count
        else:
            rows.append({"arch": (arch, arch + 1), "max_rows": count, "heavy": 0, "config": config})
    if rows:
        rows[-1]["max_rows"] = None
    return rows


def render(rows: list[dict[str, Any]], about: str) -> str:
    """The text of tuned.py. `about`: the device and versions, in one line."""
    head = TUNED.read_text().split("ROWS:")[0].rstrip()
    body = "".join(f"    {row!r},\n" for row in rows)
    values = f"(\n{body})" if rows else "()"
    return f"{head}\n\n# {about}\nROWS: tuple[dict[str, Any], ...] = {values}\n"


def measure(
    device: torch.device, *, seconds: float, rows: Sequence[int], heads: Sequence[str]
) -> tuple[Times, dict[int, dict[str, Any]]]:
    """Times in U of every configuration, and the configurations by the same names."""
    clock, share = Clock(device), seconds / max(len(rows) * len(heads), 1)
    times: Times = {}
    configurations: dict[int, dict[str, Any]] = {}
    for head in heads:
        for count in rows:
            problem = Problem.random(HEADS[head], count, device=device)
            ways = launch_configs(problem)
            configurations.setdefault(count, {}).update(resolved(ways, problem))
            case = Case("linear_logp", head, count, "forward")
            taken = interleaved(gated(case, problem, ways), clock, seconds=share)
            base = median(taken.pop(UNIT))
            for name, found in taken.items():
                times.setdefault(count, {}).setdefault(name, {})[head] = median(found) / base
            print(f"{case.name}: " + ", ".join(f"{n} {median(t) / base:.3f} U" for n, t in taken.items()), flush=True)
    return times, configurations


def resolved(ways: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """`ways` with what `pick()` returns in the place of None."""
    from mmrlhf.kernels.triton import configs, launch

    picked = configs.pick(launch.problem(problem.hidden.detach(), problem.weight.detach()))
    return {name: picked if config is None else config for name, config in ways.items()}


def gated(case: Case, problem: Problem, ways: dict[str, Any]) -> dict[str, Step]:
    """U and the configurations whose values are right; who is not is said on stderr."""
    truth, plain = Truth.exact(problem, fused=False), Truth.plain(problem, fused=False)
    steps: dict[str, Step] = {UNIT: unit(problem)}
    for name, config in ways.items():
        step = mine(case, problem, "triton", config)
        verdict = gate(problem, step, truth, plain, backward=False, head=False, ours=True)
        if verdict.passed:
            steps[name] = step
        else:
            print(f"{case.name} {name}: {verdict.reason}", file=sys.stderr)
    return steps


def unit(problem: Problem) -> Step:
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    return lambda: torch.mm(hidden, weight.T, out=out)


def tune_cpu(seconds: float) -> Iterator[str]:
    """Lines: the frozen head of Qwen2-0.5B at N = 512 by tiles of `streaming`, fastest first."""
    from benchmarks import cases
    from benchmarks.measure import times
    from benchmarks.sides import OURS
    from mmrlhf.ops import streaming

    problem = cases.Problem.of(cases.Case("linear_logp", "qwen2-0.5b", 512, "float32", "frozen"))
    picked, found = streaming.pick, []
    now = picked(512, problem.weight.shape[0])
    grid = [(rows, columns) for rows in (128, 256, 512) for columns in (512, 1024, 2048, 4096)]
    for tiles in dict.fromkeys([(now.rows, now.columns), *grid]):
        streaming.pick = lambda *_, tiles=tiles: streaming.Tiles(*tiles)  # type: ignore[assignment]
        try:
            took = times(OURS.step(problem), problem, 5, seconds / (len(grid) + 1))
        finally:
            streaming.pick = picked
        found.append((took.units, tiles))
    for units, tiles in sorted(found):
        mark = "  <- pick() takes it" if tiles == (now.rows, now.columns) else ""
        yield f"{units:6.3f} U  {tiles[0]:4} rows x {tiles[1]:4} columns{mark}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=90.0, help="in all, about")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument(
        "--write", type=Path, nargs="?", const=TUNED, help="CUDA: write tuned.py, there or to this path"
    )
    arguments = parser.parse_args(words)
    if arguments.device == "cpu":
        for text in tune_cpu(arguments.seconds):
            print(text)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device here; --device cpu tunes the CPU's tiles", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    heads = [name for name in HEADS if name != "tiny"]
    times, configurations = measure(device, seconds=arguments.seconds, rows=arguments.rows, heads=heads)
    best = winners(times)
    print(json.dumps({str(rows): name for rows, name in best.items()}, indent=1))
    if arguments.write:
        major, minor = torch.cuda.get_device_capability()
        import triton

        rows = table(best, configurations, 10 * major + minor)
        versions = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
        arguments.write.write_text(render(rows if set(best.values()) != {PICKED} else [], versions))
        print(f"wrote {arguments.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
