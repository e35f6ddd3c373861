"""The whole training step of a 7B-shaped Qwen2.5-VL with random weights and LoRA, on one GPU, beside TRL's.

    PYTHONPATH=tests python -m benchmarks.gpu_step --write FILE [--k 2 5] [--full] [--seconds 300]

The sides are those of `benchmarks.train_step`: ours with a live reference, with cached reference scores, and with the
prefix not shared; TRL's DPOTrainer where trl and datasets are installed, whose reference is the model without adapters.
bfloat16 rounds both sides differently, so losses are told beside the times, and a ratio is printed only where every
step's are within 2e-2 of TRL's (they start at log 2). `--model small --device cpu` tries it without a GPU.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_ops import save
from benchmarks.step_models import SHAPES, build_model, build_processor, build_records

LOSS_TOLERANCE = 2e-2


def sides(base: Any, processor: Any, records: list[dict], *, lora: bool):
    """The contestants by name; each has its own adapters, or its own copy of the weights."""
    from benchmarks.step_case import DEFAULT_SIDES
    from benchmarks.step_sides import builders

    names = DEFAULT_SIDES
    if not all(importlib.util.find_spec(name) for name in ("trl", "datasets")):
        print("left out: trl (trl and datasets have to be installed)")
        names = tuple(name for name in names if name != "trl")
    return builders(base, processor, records, names, lora=lora)


def run_side(build: Callable[[], Any], steps: int, device: torch.device) -> dict[str, Any]:
    """Seconds a step (median after the first), losses, tokens, images and peak memory of one side."""
    from benchmarks.step_worker import Meter

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    made, meter = build(), Meter()
    with meter.watching(made.model, made.reference):
        run = made.run(steps + 1)
    found: dict[str, Any] = {"seconds": statistics.median(run.seconds[1:]), "losses": run.losses}
    found |= meter.per_step(run.marks[1:])
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def compare(figures: dict[str, dict[str, Any]]) -> list[str]:
    """Add each side's difference from TRL's losses (ours with a live reference, without TRL) and the ratio; faults."""
    against = figures.get("trl", figures.get("live reference", {}))
    faults = []
    for name, figure in figures.items():
        if "error" in figure:
            faults.append(f"{name}: {figure['error']}")
        elif "losses" in against:
            apart = max(abs(a - b) for a, b in zip(figure["losses"], against["losses"], strict=True))
            figure["max_loss_difference"] = apart
            if not apart <= LOSS_TOLERANCE:
                faults.append(f"{name}: losses {figure['losses']} against {against['losses']}")
            elif "trl" in figures and "seconds" in figures["trl"]:
                figure["ratio"] = figures["trl"]["seconds"] / figure["seconds"]
    return faults


def case(base: Any, processor: Any, k: int, chosen: argparse.Namespace, left: Callable[[], float]) -> dict[str, Any]:
    """All sides of one K, as far as the time goes."""
    device = torch.device(chosen.device)
    records = build_records(
        chosen.groups, image_tokens=chosen.prefix - 30, response_tokens=chosen.response, k=k, seed=0
    )
    figures: dict[str, dict[str, Any]] = {}
    for name, build in sides(base, processor, records, lora=not chosen.full).items():
        if left() < 15:
            print(f"not reached: K={k} {name}")
            continue
        try:
            figures[name] = run_side(build, chosen.steps, device)
        except Exception as error:  # a trainer may raise anything: the other sides still run, the status says so
            traceback.print_exc()
            figures[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"K={k} {name}: {figures[name].get('seconds', figures[name].get('error'))}", flush=True)
    return {"k": k, "prefix": chosen.prefix, "response": chosen.response, "groups": chosen.groups, "sides": figures}


def main(words: list[str] | None = None) -> int:
    chosen = parser().parse_args(words)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    missing = [
        name for name in ("transformers", *([] if chosen.full else ["peft"])) if not importlib.util.find_spec(name)
    ]
    if missing:
        print(f"not installed: {', '.join(missing)}")
        return 77
    begin = time.monotonic()

    def left() -> float:
        return chosen.seconds - (time.monotonic() - begin)

    processor = build_processor()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        base = build_model(chosen.model, processor, dtype=dtype)
    print(f"{chosen.model} built in {time.monotonic() - begin:.0f} s", flush=True)
    state: dict[str, Any] = {"model": chosen.model, "lora": not chosen.full, "cases": []}
    faults: list[str] = []
    for k in chosen.k:
        record = case(base, processor, k, chosen, left)
        faults += [f"K={k} {fault}" for fault in compare(record["sides"])]
        state["cases"].append(record)
        print(table(record))
        if chosen.write:
            save(chosen.write, state)
    for fault in faults:
        print(f"FAULT {fault}")
    return 1 if faults else 0


def table(record: dict[str, Any]) -> str:
    lines = [f"K = {record['k']}, prefix {record['prefix']}, responses of {record['response']}"]
    for name, figure in record["sides"].items():
        if "error" not in figure:
            ratio = f"{figure['ratio']:6.2f}x TRL" if "ratio" in figure else ""
            lines.append(f"  {name:18} {figure['seconds']:8.3f} s a step {ratio}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_step", description=__doc__.splitlines()[0])
    made.add_argument("--model", default="qwen2_5_vl_7b", choices=SHAPES)
    made.add_argument("--device", default="cuda", help="cuda, or cpu to try it")
    made.add_argument("--prefix", type=int, default=1350, help="prompt tokens, image tokens included (about)")
    made.add_argument("--response", type=int, default=200, help="tokens of a response (about)")
    made.add_argument("--k", type=int, nargs="+", default=[2, 5], help="responses a prompt; all their pairs count")
    made.add_argument("--groups", type=int, default=1, help="prompts an optimiser step")
    made.add_argument("--steps", type=int, default=3, help="timed optimiser steps, after one that warms up")
    made.add_argument("--full", action="store_true", help="train every weight of the decoder: no LoRA")
    made.add_argument("--seconds", type=float, default=300.0, help="for everything")
    made.add_argument("--write", type=Path, help="JSON file")
    return made


if __name__ == "__main__":
    sys.exit(main())
