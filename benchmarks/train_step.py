"""The whole training step, from pictures and text to the updated weights, against TRL's DPOTrainer in one run.

    python -m benchmarks.train_step --prefix 320 --response 100 --k 2 --groups 2 --steps 3 --write NAME
    python -m benchmarks.train_step --causes --drop-in        the ratio split into its causes; TRL with mmrlhf in it
    python -m benchmarks.train_step --sweep cpu               a list of cases into benchmarks/results/step_cpu.json

All sides start from the same weights, see the same pictures and answers, score all pairs of the K answers, clip to norm
1 and step fused AdamW; each runs in a process of its own, one after another. A ratio is given only where a side's loss
agrees with TRL's at every step. `--sweep` goes on where it stopped: cases that the file has from the same commit and
machine are left out (`--again` measures them anew). Exit status 1 where a side failed or disagrees.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import commit
from benchmarks.step_case import LADDER, SWEEPS, WITH_CAUSES, WITH_DROP_IN, Case
from benchmarks.step_flops import ceilings, seconds, work
from benchmarks.step_models import SHAPES

RESULTS = Path(__file__).parent / "results"
# Both sides start at log 2 and move by 1e-2 or more in a step; bfloat16 rounds them differently.
LOSS_TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}
Figures = dict[str, dict[str, Any]]


def compare(case: Case, figures: Figures, *, triton: bool = False) -> list[str]:
    """Add to each side its difference from TRL's losses, its ratio and its ceilings; returns what is wrong."""
    trl = figures.get("trl", {})
    faults = []
    for name, figure in figures.items():
        if "error" in figure:
            faults.append(f"{name}: {figure['error']}")
            continue
        figure["flops"] = work(case, name, triton=triton).total
        if "losses" not in trl:
            continue
        apart = max(abs(a - b) for a, b in zip(figure["losses"], trl["losses"], strict=False))  # as far as both go
        figure["max_loss_difference"] = apart
        if not apart <= LOSS_TOLERANCE[case.dtype]:
            faults.append(f"{name}: losses {figure['losses']} differ from TRL's {trl['losses']}")
            continue
        figure["ratio"] = trl["seconds"] / figure["seconds"]
        if name != "trl":
            figure["ceiling"] = ceilings(case, name, triton=triton)
    return faults


def causes(case: Case, figures: Figures) -> dict[str, float] | None:
    """{cause: factor}, whose product is TRL's seconds over ours with a cached reference; None if a side is missing.

    "trainer" is what is left between TRL and our own step taken TRL's way: padding, metrics, data loader, logging.
    """
    rungs = [("trl", ""), (LADDER[0][0], "trainer"), *LADDER[1:]]
    if case.k == 2:
        rungs = [rung for rung in rungs if rung[0] != "answers once"]
    if any("ratio" not in figures.get(name, {}) for name, _ in rungs):
        return None
    spent = [figures[name]["seconds"] for name, _ in rungs]
    return {cause: before / after for (_, cause), before, after in zip(rungs[1:], spent, spent[1:], strict=False)}


def run_case(case: Case, device: str, measure: Callable[..., dict[str, Any]] | None = None) -> dict[str, Any]:
    """All sides of a case; a record for the results file, its faults in "faults"."""
    if measure is None:
        from benchmarks.step_worker import measure_apart as measure
    begin = time.perf_counter()
    figures: Figures = {}
    for side in case.sides:
        figures[side] = measure(case, side, device)
        print(f"  {side:22} {figures[side].get('seconds', figures[side].get('error'))}", flush=True)
    triton = device.startswith("cuda")
    return {
        "name": case.name,
        "case": case.as_dict(),
        "device": device,
        "faults": compare(case, figures, triton=triton),
        "figures": figures,
        "causes": causes(case, figures),
        "took": round(time.perf_counter() - begin, 1),
    }


def table(record: dict[str, Any]) -> str:
    """A case's figures as text."""
    head = ("s / step", "TRL / it", "ceiling", "tokens", "reference", "images", "MiB", "|loss diff|")
    lines = [record["name"], "  ".join([" " * 22, *(f"{word:>11}" for word in head)])]
    for name, figure in record["figures"].items():
        if "seconds" not in figure:
            continue
        ratio = f"{figure['ratio']:.2f}x" if "ratio" in figure else "-"
        ceiling = f"{figure['ceiling']['flops']:.2f}x" if "ceiling" in figure else "-"
        peak = "-" if figure.get("peak_bytes") is None else f"{figure['peak_bytes'] / 2**20:.0f}"
        apart = f"{figure['max_loss_difference']:.1e}" if "max_loss_difference" in figure else "-"
        counts = [f"{figure[key]:.0f}" for key in ("policy_tokens", "reference_tokens", "images")]
        words = (f"{figure['seconds']:.3f}", ratio, ceiling, *counts, peak, apart)
        lines.append("  ".join([f"{name:22}", *(f"{word:>11}" for word in words)]))
    if record["causes"]:
        product = 1.0
        lines.append("the ratio to the cached reference, split:")
        for cause, factor in record["causes"].items():
            product *= factor
            lines.append(f"  {cause:12} x {factor:5.2f}   = {product:6.2f}")
    return "\n".join([*lines, *(f"FAULT {fault}" for fault in record["faults"])])


def about(device: str) -> dict[str, Any]:
    """The machine and the versions that figures depend on."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate")
    return {
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "processor": _processor(),
            "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        },
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(info) if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


class Results:
    """benchmarks/results/NAME.json: {"cases": [record, …]}, written after every case."""

    def __init__(self, path: Path, command: str, device: str, *, fresh: bool = False):
        self.path, self.command, self.stamp = path, command, {**about(device), "commit": commit()}
        known = json.loads(path.read_text()).get("cases", []) if path.is_file() and not fresh else []
        self.cases: list[dict[str, Any]] = known if isinstance(known, list) else []

    def has(self, case: Case) -> bool:
        """Whether the case is there without faults, from this commit and this machine."""
        return any(
            record["case"] == case.as_dict() and not record["faults"] and self._same(record) for record in self.cases
        )

    def _same(self, record: dict[str, Any]) -> bool:
        return all(record.get(key) == value for key, value in self.stamp.items())

    def add(self, record: dict[str, Any]) -> None:
        """Take the place of an earlier record of the same case."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"command": self.command, "date": now, **self.stamp, **record}
        self.cases = [old for old in self.cases if old["case"] != record["case"]] + [record]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"cases": self.cases}, indent=1) + "\n")
        new.replace(self.path)


def sweep(cases: tuple[Case, ...], results: Results, device: str, limit: float, again: bool, **options: Any) -> bool:
    """Run what the file lacks; a case that would end after `limit` seconds is not begun. Whether all went well."""
    begin, good = time.monotonic(), True
    for case in cases:
        if results.has(case) and not again:
            print(f"{case.name}: there already")
            continue
        if time.monotonic() - begin + (seconds(case) if device == "cpu" else 0) > limit:
            print(f"{case.name}: not reached, it takes about {seconds(case):.0f} s")
            continue
        print(f"{case.name}: about {seconds(case):.0f} s", flush=True)
        record = run_case(case, device, **options)
        results.add(record)
        print(table(record), flush=True)
        good = good and not record["faults"]
    return good


def main(words: list[str] | None = None, **options: Any) -> int:
    """`options` go to `run_case`."""
    chosen = parser().parse_args(words)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    cases = picked(chosen)
    if chosen.list:
        for case in cases:
            print(f"{seconds(case):6.0f} s  {case.name}: {', '.join(case.sides)}")
        print(f"{sum(map(seconds, cases)) / 60:6.1f} min on two server cores, about")
        return 0
    command = shlex.join(["python", "-m", "benchmarks.train_step", *(sys.argv[1:] if words is None else words)])
    name = chosen.write or (f"step_{chosen.sweep}" if chosen.sweep else None)
    if name is not None:
        path = Path(name) if name.endswith(".json") else RESULTS / f"{name}.json"
        fresh = chosen.sweep is None
        results = Results(path, command, chosen.device, fresh=fresh)
        return 0 if sweep(cases, results, chosen.device, chosen.limit, chosen.again, **options) else 1
    record = run_case(cases[0], chosen.device, **options)
    print(table(record))
    return 1 if record["faults"] else 0


def picked(chosen: argparse.Namespace) -> tuple[Case, ...]:
    """The cases that the command line asks for."""
    if chosen.sweep:
        found = tuple(case for case in SWEEPS[chosen.sweep] if all(word in case.name for word in chosen.only))
        if not found:
            raise SystemExit(f"no case of {chosen.sweep} holds {' and '.join(chosen.only)}; see --list")
        return found
    names = ("model", "dtype", "lora", "prefix", "response", "k", "groups", "steps", "peer_steps")
    case = Case(**{name: getattr(chosen, name) for name in names})
    if chosen.causes or chosen.drop_in:
        sides = WITH_CAUSES if chosen.causes else WITH_DROP_IN
        case = replace(case, sides=tuple(s for s in sides if chosen.drop_in or "+ mmrlhf" not in s))
    return (replace(case, sides=tuple(chosen.side)),) if chosen.side else (case,)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    made.add_argument("--model", default="small", choices=SHAPES)
    made.add_argument("--dtype", default="float32", choices=LOSS_TOLERANCE)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--lora", action="store_true", help="adapters on the decoder instead of training it whole")
    made.add_argument("--prefix", type=int, default=320, help="prompt tokens, image tokens included (about)")
    made.add_argument("--response", type=int, default=100, help="tokens of a response (about)")
    made.add_argument("--k", type=int, default=2, help="responses a prompt; all their pairs are trained on")
    made.add_argument("--groups", type=int, default=2, help="prompts an optimiser step")
    made.add_argument("--steps", type=int, default=3, help="timed optimiser steps, after one that warms up")
    made.add_argument("--peer-steps", type=int, help="the same for TRL and what runs rows apart (default: --steps)")
    made.add_argument("--causes", action="store_true", help="also our step with one thing after another off")
    made.add_argument("--drop-in", action="store_true", help="also TRL's trainer with mmrlhf in it")
    made.add_argument("--side", action="append", help="these sides only; may be given again")
    made.add_argument("--write", help="write benchmarks/results/NAME.json, or to a path that ends in .json")
    made.add_argument("--sweep", choices=SWEEPS, help="a list of cases instead of one")
    made.add_argument("--only", action="append", default=[], help="cases of the sweep whose name holds this")
    made.add_argument("--limit", type=float, default=float("inf"), help="seconds: begin no case that would end later")
    made.add_argument("--again", action="store_true", help="measure cases that the file has already")
    made.add_argument("--list", action="store_true", help="print the cases and about how long they take")
    return made


if __name__ == "__main__":
    sys.exit(main())
