"""One side of one case, in a process of its own: seconds, losses, peak memory, and what went through the model.

A process a side, so that the peak of memory is that side's own. Processes are forked from a server that has imported
the libraries and computed nothing (`multiprocessing`'s forkserver), so that a side starts in a second or two.
"""

from __future__ import annotations

import logging
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from benchmarks.memory import peak_bytes
from benchmarks.step_case import Case
from benchmarks.step_models import build_model, build_processor, build_records
from benchmarks.step_sides import Run, build_side
from mmrlhf.models.parts import decoder, vision_modules


@dataclass
class Meter:
    """Counts what enters decoder and tower of a side's models, with the time, so that warm-up steps can be left out."""

    events: list[tuple[float, str, int]] = field(default_factory=list)

    @contextmanager
    def watching(self, *models: Any) -> Iterator[None]:
        handles = []
        for model in dict.fromkeys(model for model in models if model is not None):
            handles.append(decoder(model).register_forward_pre_hook(self._decoder, with_kwargs=True))
            ((_, tower),) = vision_modules(model, projector=False)
            handles.append(tower.register_forward_pre_hook(self._tower, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _decoder(self, module: Any, args: tuple, kwargs: dict) -> None:
        given = kwargs.get("inputs_embeds")
        rows = kwargs["input_ids"] if given is None else given[..., 0]
        self._add("policy_tokens" if torch.is_grad_enabled() else "reference_tokens", rows.numel())

    def _tower(self, module: Any, args: tuple, kwargs: dict) -> None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self._add("images", grid.shape[0])

    def _add(self, what: str, amount: int) -> None:
        self.events.append((time.perf_counter(), what, amount))

    def per_step(self, marks: list[float]) -> dict[str, float]:
        """{"policy_tokens", "reference_tokens", "images"} a step, between the first mark and the last."""
        found: Counter[str] = Counter(policy_tokens=0, reference_tokens=0, images=0)
        for at, what, amount in self.events:
            if marks[0] <= at <= marks[-1]:
                found[what] += amount
        return {what: amount / (len(marks) - 1) for what, amount in found.items()}


def measure(case: Case, side: str, device: str = "cpu") -> dict[str, Any]:
    """Figures of one side: build the model on `device`, warm up, time the steps.

    "peak_bytes" is what the process, or CUDA, held at most beyond the policy's weights: reference model, gradients,
    optimiser state, activations; None where the system cannot say.
    """
    processor = build_processor()
    with torch.device(device):
        model = build_model(case.model, processor, dtype=getattr(torch, case.dtype))
    records = build_records(
        case.groups, image_tokens=case.image_tokens, response_tokens=case.response, k=case.k, seed=0
    )
    warmup, steps = case.warmup_of(side), case.steps_of(side)
    meter, runs = Meter(), []

    def train() -> None:
        made = build_side(side, model, processor, records, lora=case.lora)
        with meter.watching(made.model, made.reference):
            runs.append(made.run(warmup + steps))

    peak = peak_bytes(train, torch.device(device))
    run: Run = runs[0]
    return {
        "seconds": statistics.median(run.seconds[warmup:]),
        "all_seconds": run.seconds,
        "cpu_seconds": statistics.median(run.cpu_seconds[warmup:]),
        "losses": run.losses,
        "peak_bytes": peak,
        **meter.per_step(run.marks[warmup:]),
        "threads": torch.get_num_threads(),
    }


def measure_apart(case: Case, side: str, device: str = "cpu", limit: float | None = None) -> dict[str, Any]:
    """`measure` in a fresh process; {"error": …} where it fails, or takes longer than `limit` seconds."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, case, side, device), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        process.terminate()
        return {"error": f"stopped after {limit:.0f} s"}
    except EOFError:
        process.join()
        return {"error": f"its process ended with status {process.exitcode}"}
    finally:
        process.join()


def _work(sender: Any, case: Case, side: str, device: str) -> None:
    logging.disable(logging.WARNING)  # a notice a side from each library
    warnings.simplefilter("ignore")
    try:
        sender.send(measure(case, side, device))
    except Exception as error:  # a trainer may raise anything; the other sides still run
        traceback.print_exc()
        sender.send({"error": f"{type(error).__name__}: {str(error)[:300]}"})


@cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.step_worker", "benchmarks.step_preload"])
    return context
