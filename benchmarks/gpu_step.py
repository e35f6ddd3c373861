"""The whole training step of a 7B-shaped Qwen2.5-VL with random weights and LoRA, on one GPU, beside TRL's.

    PYTHONPATH=tests python -m benchmarks.gpu_step --write FILE [--k 2 5] [--full] [--liger] [--profile FILE]

The sides are those of `benchmarks.train_step`: ours with a live reference, with cached reference scores, with the
prefix not shared; TRL's DPOTrainer where trl and datasets are installed, whose reference is the model without adapters,
and the same with mmrlhf dropped in. Weights are drawn on the device. The file is written anew after every side.
bfloat16 rounds both sides differently, so losses are told beside the times, and a ratio whose losses are further than
2e-2 from TRL's at any step (they start at log 2) is marked. `--model small --device cpu` tries it without a GPU.
Exit status 1 where a side failed or disagrees; 2 without the device; 77 where peft is missing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_ops import save, usable
from benchmarks.gpu_small import host_syncs
from benchmarks.step_case import PAIR
from benchmarks.step_models import SHAPES, build_model, build_processor, build_records
from benchmarks.step_sides import OPTIONS, builders
from benchmarks.step_worker import Meter

LOSS_TOLERANCE = 2e-2
MORE = ("separate rows", "trl + mmrlhf, cached")  # of the first K, when every K has its main sides
SIDES = (*OPTIONS, "trl", "trl + mmrlhf", "trl + mmrlhf, cached")
KERNELS = 30  # rows of the profile


def run_side(build: Callable[[], Any], steps: int, device: torch.device) -> tuple[dict[str, Any], Any]:
    """Seconds a step (median after the first), losses, tokens, images and peak memory of one side, and the side.

    "peak_bytes" is what the side took at most, its weights included, beyond what was there before it.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    made, meter = build(), Meter()
    with meter.watching(made.model, made.reference):
        run = made.run(steps + 1)
    found: dict[str, Any] = {
        "seconds": statistics.median(run.seconds[1:]),
        "all_seconds": run.seconds,
        "start_seconds": run.marks[0] - begin,
        "cpu_seconds": statistics.median(run.cpu_seconds[1:]),
        "losses": run.losses,
    }
    found |= meter.per_step(run.marks[1:])
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found, made


def waits(made: Any) -> dict[str, int]:
    """{place: times} at which a step of ours waits for the device; `run` itself waits at its marks and for its loss."""
    return dict(Counter(host_syncs(lambda: made.run(1))).most_common())


def profile(made: Any, path: Path) -> None:
    """A table of the kernels of one warm step, longest first."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if made.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch.profiler.profile(activities=activities) as found:
        made.run(1)
    text = found.key_averages().table(sort_by=key, row_limit=KERNELS, max_name_column_width=70)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def compare(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Add each side's difference from TRL's losses (ours with a live reference, without TRL), whether it `agrees`, and
    the ratio; returns the faults."""
    against = figures.get("trl", {})
    if "losses" not in against:
        against = figures.get("live reference", {})
    faults = []
    for name, figure in figures.items():
        if "error" in figure:
            faults.append(f"{name}: {figure['error']}")
        elif "losses" in against:
            apart = max(abs(a - b) for a, b in zip(figure["losses"], against["losses"], strict=False))
            figure["max_loss_difference"] = apart
            figure["agrees"] = apart <= LOSS_TOLERANCE
            if not figure["agrees"]:
                faults.append(f"{name}: losses {figure['losses']} against {against['losses']}")
            if "seconds" in figures.get("trl", {}):
                figure["ratio"] = figures["trl"]["seconds"] / figure["seconds"]
    return faults


class Bench:
    """The model, and the record that grows by a side at a time."""

    def __init__(self, chosen: argparse.Namespace):
        self.chosen, self.begin = chosen, time.monotonic()
        self.device = torch.device(chosen.device)
        self.processor = build_processor()
        self.base = self.build()
        self.state: dict[str, Any] = {
            "model": chosen.model,
            "lora": not chosen.full,
            "liger": chosen.liger,
            "cases": [],
        }
        self.extra = bool(chosen.profile)  # a profile is still to be made

    def build(self) -> Any:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with self.device:
            base = build_model(self.chosen.model, self.processor, dtype=dtype)
        if self.chosen.liger:
            from mmrlhf.models import liger

            print(f"Liger's layers: {', '.join(liger.apply(base))}")
        print(f"{self.chosen.model} built in {time.monotonic() - self.begin:.1f} s", flush=True)
        return base

    @property
    def left(self) -> float:
        """Seconds."""
        return self.chosen.seconds - (time.monotonic() - self.begin)

    def case(self, k: int) -> dict[str, Any]:
        """The record of one K, there from its first side on."""
        for record in self.state["cases"]:
            if record["k"] == k:
                return record
        chosen = self.chosen
        record = {"k": k, "prefix": chosen.prefix, "response": chosen.response, "groups": chosen.groups, "sides": {}}
        self.state["cases"].append(record)
        return record

    def side(self, k: int, name: str) -> bool:
        """Run one side, as far as the time goes; False where nothing more can run."""
        record, chosen = self.case(k), self.chosen
        if self.left < 8 + (k * (k - 1) if "trl" in name else 0):
            print(f"not reached: K={k} {name}")
            return True
        records = build_records(
            chosen.groups, image_tokens=chosen.prefix - 30, response_tokens=chosen.response, k=k, seed=0
        )
        ways = builders(self.base, self.processor, records, (name,), lora=not chosen.full, workers=chosen.workers)
        steps = max(1, chosen.steps - (k > 2 and "trl" in name))
        made = None
        try:
            figure, made = run_side(ways[name], steps, self.device)
            record["sides"][name] = figure
            self.look_inside(name, made, figure)
        except Exception as error:  # a trainer may raise anything: the other sides still run, the status says so
            traceback.print_exc()
            record["sides"].setdefault(name, {})["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        del made, ways
        gc.collect()
        if self.device.type == "cuda" and not usable(self.device):
            print("FAULT the device is unusable from here on")
            return False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        compare(record["sides"])
        print(line(k, name, record["sides"][name]), flush=True)
        if chosen.write:
            save(chosen.write, self.state)
        return True

    def look_inside(self, name: str, made: Any, figure: dict[str, Any]) -> None:
        """Of the first live reference: where it waits, and its profile."""
        if name != "live reference" or not self.extra:
            return
        self.extra = False
        if self.device.type == "cuda":
            figure["waits"] = waits(made)
        profile(made, self.chosen.profile)

    def faults(self) -> list[str]:
        return [f"K={record['k']} {fault}" for record in self.state["cases"] for fault in compare(record["sides"])]


def line(k: int, name: str, figure: dict[str, Any]) -> str:
    if "error" in figure:
        return f"K={k} {name}: {figure['error']}"
    ratio = f", {figure['ratio']:.2f}x TRL" if "ratio" in figure else ""
    ratio += "" if figure.get("agrees", True) else ", LOSSES DIFFER"
    peak = f", peak {figure['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in figure else ""
    return f"K={k} {name}: {figure['seconds']:.3f} s a step{ratio}{peak}, loss {figure['losses'][0]:.4f}"


def plan(chosen: argparse.Namespace) -> list[tuple[int, str]]:
    """(K, side) in the order in which they run."""
    have_trl = all(importlib.util.find_spec(name) for name in ("trl", "datasets"))
    if not have_trl:
        print("left out: trl (trl and datasets have to be installed)")
    main_sides = tuple(chosen.side or PAIR)
    more = () if chosen.side else MORE
    wanted = [(k, name) for k in chosen.k for name in main_sides] + [(chosen.k[0], name) for name in more]
    return [(k, name) for k, name in wanted if have_trl or "trl" not in name]


def main(words: list[str] | None = None) -> int:
    chosen = parser().parse_args(words)
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    needed = ("transformers", *([] if chosen.full else ["peft"]), *(["liger_kernel"] if chosen.liger else []))
    missing = [name for name in needed if not importlib.util.find_spec(name)]
    if missing:
        print(f"not installed: {', '.join(missing)}")
        return 77
    bench = Bench(chosen)
    for k, name in plan(chosen):
        if not bench.side(k, name):
            break
    faults = bench.faults()
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults or not any(record["sides"] for record in bench.state["cases"]) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__.splitlines()[0])
    made.add_argument("--model", default="qwen2_5_vl_7b", choices=SHAPES)
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try it")
    made.add_argument("--prefix", type=int, default=1350, help="prompt tokens, image tokens included (about)")
    made.add_argument("--response", type=int, default=200, help="tokens of a response (about)")
    made.add_argument("--k", type=int, nargs="+", default=[2, 5], help="responses a prompt; all their pairs count")
    made.add_argument("--side", action="append", choices=SIDES, help="these sides only; may be given again")
    made.add_argument("--groups", type=int, default=1, help="prompts an optimiser step")
    made.add_argument("--steps", type=int, default=3, help="timed optimiser steps, after one that warms up")
    made.add_argument("--workers", type=int, default=1, help="processes that read and tokenise ahead, on every side")
    made.add_argument("--full", action="store_true", help="train every weight of the decoder: no LoRA")
    made.add_argument("--liger", action="store_true", help="Liger's layer kernels in the decoder")
    made.add_argument("--profile", type=Path, help="text file: the kernels of one step with a live reference")
    made.add_argument("--seconds", type=float, default=300.0, help="for everything")
    made.add_argument("--write", type=Path, help="JSON file")
    return made


if __name__ == "__main__":
    sys.exit(main())
