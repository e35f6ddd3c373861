"""The run folder: made and locked before anything else, and `run.json`, which always says how the run stands.

    config.yaml  run.json  metrics.jsonl  samples.jsonl  images/  reference/  checkpoints/  model/  report.html

`run.json` is rewritten whole at each change of status: running, then finished, interrupted (told to stop) or
failed. A run that was killed outright still says running; the lock, which the system frees with the process, tells.
The files of an earlier run in the folder stay as they are until `begin`, so a refused resume leaves no trace.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mmrlhf import config
from mmrlhf.config import TrainConfig
from mmrlhf.train.files import FileSystem, write_atomic, write_json
from mmrlhf.train.preempt import Preempted
from mmrlhf.train.state import versions

SCHEMA = 1


class RunFolder:
    """`with RunFolder(settings) as run:` holds the lock; `run.facts` is what run.json says, `run.write()` writes it.

    Raises ValueError if the folder cannot be used, or if another process is running in it.
    """

    def __init__(self, settings: TrainConfig, *, fs: FileSystem | None = None):
        self.settings, self.fs = settings, fs or FileSystem()
        self.path = Path(settings.output)
        self.checkpoints = self.path / "checkpoints"
        self.facts: dict[str, Any] = {}
        self._begun = False
        self._lock: int | None = None
        self._started = time.monotonic()
        self._earlier = 0.0  # wall seconds of the runs this one resumes

    def __enter__(self) -> RunFolder:
        self._prepare()
        before = self._read()
        self._earlier = float(before.get("wall_seconds", 0.0)) if self.settings.resume else 0.0
        self.facts = {
            "schema": SCHEMA,
            "status": "running",
            "recipe": self.settings.recipe,
            "started": before.get("started") or datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            "versions": versions(),
            "host": socket.gethostname(),
            "notes": [],
        }
        if not before:
            try:
                self.begin()
            except OSError:
                self._unlock()
                raise
        return self

    def begin(self) -> None:
        """From here on the folder speaks of this run: write config.yaml and run.json."""
        if not self._begun:
            self._begun = True
            write_atomic(self.path / "config.yaml", [config.dump(self.settings).encode()], fs=self.fs)
            self.write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "finished" if error is None else "failed"
        if isinstance(error, (Preempted, KeyboardInterrupt)):
            status = "interrupted"
        self.facts["status"] = status
        if error is not None:
            self.facts["error"] = f"{type(error).__name__}: {error}"
        try:
            self.write()
        except OSError:
            if error is None:
                raise
        finally:
            self._unlock()

    def _unlock(self) -> None:
        assert self._lock is not None
        os.close(self._lock)

    def write(self) -> None:
        """Write run.json, once the run has begun."""
        if not self._begun:
            return
        self.facts["wall_seconds"] = round(self._earlier + time.monotonic() - self._started, 3)
        write_json(self.path / "run.json", self.facts, fs=self.fs)

    def note(self, text: str) -> None:
        """Something the user should know: on the terminal, and in run.json."""
        from tqdm import tqdm

        self.facts["notes"].append(text)
        tqdm.write(text, file=sys.stderr)

    @classmethod
    def of(cls, settings: TrainConfig, *, first: bool) -> RunFolder:
        """The folder for the process that writes, or for one that only reads it."""
        return cls(settings) if first else _Reader(settings)

    def _prepare(self) -> None:
        """Make the folder, take the lock, and try one write and rename where the checkpoints will be."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ValueError(f"output: cannot write to {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            self._unlock()
            raise ValueError(f"output: {self.path} is in use by another run ({holder or 'unknown'})") from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        try:
            probe = self.checkpoints / ".probe"
            write_atomic(probe, [b"probe"], fs=self.fs)
            self.fs.remove(probe)
        except OSError as error:
            self._unlock()
            raise ValueError(f"output: cannot write to {self.checkpoints}: {error.strerror}") from error

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "run.json").read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return {}


class _Reader(RunFolder):
    """The same folder seen by another process of the run: no lock, nothing written, nothing said twice."""

    def __enter__(self) -> RunFolder:
        self.facts = {"notes": []}
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        pass

    def write(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass
