"""The record of a run: a JSON line a step, always; TensorBoard and Weights & Biases beside it when asked for.

The file is written line by line and flushed, so a killed run keeps every line but perhaps half of the last one. On
resume the lines past the checkpoint are cut, so no step stands twice. A number that is not finite is written as null.

A tracker that was asked for and is not installed is an error at the start. One that fails later is named in a warning
and left alone from then on: training never waits for it and never stops because of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmrlhf.train.files import FileSystem, write_atomic


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class MetricsLog:
    """`log` appends a line; `resume_step` cuts the lines of later steps first."""

    def __init__(
        self, path: Path, *, trackers: Mapping[str, Callable[[], Tracker]] | None = None, resume_step: int = 0
    ):
        self.path = path
        cut_after(path, resume_step)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        self._outlets = [_Outlet(name, start) for name, start in (trackers or {}).items()]

    def log(self, values: Mapping[str, Any]) -> None:
        """One step. `values` has "step" and numbers (or None)."""
        line = {key: _finite(value) for key, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "step"}
        for outlet in self._outlets:
            outlet.log(numbers, int(values["step"]))

    def close(self) -> None:
        self._file.close()
        for outlet in self._outlets:
            outlet.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProgressBar:
    """A bar on a terminal; elsewhere (a log file) a line now and then, at most one every SECONDS."""

    SECONDS = 10.0

    def __init__(self, done: int, total: int):
        from tqdm import tqdm

        self.bar = tqdm(initial=done, total=total, desc="train", unit="step", disable=None)
        self.done, self.total, self.told = done, total, -math.inf

    def show(self, numbers: Mapping[str, float]) -> None:
        """One step more."""
        self.done += 1
        text = f"loss {numbers['loss']:.4f}, margin {numbers['rewards/margins']:+.3f}, grad {numbers['grad_norm']:.2f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and (time.monotonic() - self.told > self.SECONDS or self.done == self.total):
            self.told = time.monotonic()
            print(f"step {self.done}/{self.total}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class StepLog:
    """The file, the trackers and the bar of a run, in the process that writes; nothing in the others."""

    def __init__(
        self, folder: Path, trackers: Mapping[str, Callable[[], Tracker]], *, done: int, total: int, first: bool
    ):
        self._parts = contextlib.ExitStack()
        self._log = self._bar = None
        if first:
            log = MetricsLog(folder / "metrics.jsonl", trackers=trackers, resume_step=done)
            self._log = self._parts.enter_context(log)
            self._bar = self._parts.enter_context(ProgressBar(done, total))

    def log(self, values: Mapping[str, Any]) -> None:
        """As `MetricsLog.log`."""
        if self._log is not None:
            self._log.log(values)

    def show(self, numbers: Mapping[str, float]) -> None:
        """As `ProgressBar.show`."""
        if self._bar is not None:
            self._bar.show(numbers)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(self, *error: Any) -> None:
        self._parts.__exit__(*error)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_after(path: Path, step: int) -> None:
    """Keep the whole lines of steps up to `step`; nothing to do where there is no file."""
    if not path.exists():
        return
    kept = []
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(raw)
        except ValueError:
            continue  # the half line that a kill left, or the empty string after the last newline
        if line["step"] <= step:
            kept.append(raw + b"\n")
    write_atomic(path, kept, fs=FileSystem())


class _Outlet:
    """One tracker behind a thread and a short queue: it may raise or hang, and the loop goes on."""

    QUEUE, PATIENCE = 1024, 10.0  # lines waiting; seconds to wait for the last ones at the end

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name, self.start = name, start
        self.waiting: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(self.QUEUE)
        self.failed: str | None = None
        self.given_up = False
        self.thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        try:
            tracker = self.start()
            while (item := self.waiting.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except Exception as error:  # whatever a foreign library raises, named in the warning that follows
            self.failed = f"{type(error).__name__}: {error}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.given_up:
            return
        try:
            if self.failed is not None:
                self._give_up(self.failed)
            else:
                self.waiting.put_nowait((values, step))
        except queue.Full:
            self._give_up(f"{self.QUEUE} lines are waiting for it")

    def _give_up(self, reason: str) -> None:
        warnings.warn(f"{self.name} gets no more metrics ({reason}); metrics.jsonl has them all", stacklevel=3)
        self.given_up = True

    def close(self) -> None:
        if self.given_up:
            return
        if self.failed is None:
            try:
                self.waiting.put(None, timeout=self.PATIENCE)
                self.thread.join(self.PATIENCE)
            except queue.Full:
                self.failed = "it does not take its lines"
            if self.failed is None and self.thread.is_alive():
                self.failed = f"it did not finish within {self.PATIENCE:.0f} s"
        if self.failed is not None:
            self._give_up(self.failed)


class TensorBoard:
    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        import wandb

        # The same folder is the same run, so a resumed run goes on in the same chart.
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project="mmrlhf", id=identity, name=folder.name, dir=str(folder), config=dict(settings), resume="allow"
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


def tracker_starters(
    names: Sequence[str], folder: Path, settings: Mapping[str, Any]
) -> dict[str, Callable[[], Tracker]]:
    """How to start the trackers asked for. Raises ValueError naming the package to install where one is missing."""
    known: dict[str, tuple[str, Callable[[], Tracker]]] = {
        "tensorboard": ("torch.utils.tensorboard", lambda: TensorBoard(folder)),
        "wandb": ("wandb", lambda: WeightsAndBiases(folder, settings)),
    }
    starters: dict[str, Callable[[], Tracker]] = {}
    for name in names:
        module, start = known[name]
        try:
            __import__(module)
        except ImportError as error:
            raise ValueError(f"trackers asks for {name}, which is not installed: pip install {name}") from error
        starters[name] = start
    return starters
