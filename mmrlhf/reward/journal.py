"""What is scored already: a line a group, appended as groups are done, so that what is stopped goes on where it was."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.data.schema import PreferenceGroup


@dataclass(frozen=True)
class Scored:
    """What one group got."""

    index: int  # into the groups asked for
    id: str
    scores: tuple[float, ...]  # one a response, in the group's order
    critiques: tuple[str | None, ...]  # that the scores were read after; of several samples the first


class Journal:
    """Groups that are scored, a line each, written as they come. One process at a time.

    The first line is the key: what made the scores. ValueError for a journal of another key, or one in use.
    """

    def __init__(self, path: Path, *, key: str):
        self.path, self.key = path, key
        self._known: dict[str, dict[str, Any]] = {}
        self._descriptor = -1

    def __enter__(self) -> Journal:
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise ValueError(f"{self.path} is in use by another process") from error
        try:
            self._read()
        except ValueError:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def _read(self) -> None:
        """Take what is there, and cut the half line that a kill left."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            os.ftruncate(self._descriptor, len(whole))
        os.lseek(self._descriptor, 0, os.SEEK_END)
        lines = whole.splitlines()
        if not lines:
            self._append({"key": self.key})
            return
        try:
            first, *rest = [json.loads(line) for line in lines]
            before = first["key"]
            self._known = {line["group"]: line for line in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): remove it to score everything again") from error
        if before != self.key:
            raise ValueError(
                f"{self.path} has scores of another model or with other options: remove it, or choose another output"
            )

    def get(self, name: str, group: PreferenceGroup) -> Scored | None:
        """What is known of the group whose `row_hash` is `name`."""
        line = self._known.get(name)
        if line is None or len(line["scores"]) != len(group.responses):
            return None
        return Scored(-1, group.id, tuple(line["scores"]), tuple(line["critiques"]))

    def add(self, name: str, done: Scored) -> None:
        line = {"group": name, "scores": list(done.scores), "critiques": list(done.critiques)}
        self._append(line)
        self._known[name] = line

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._descriptor, (json.dumps(line, ensure_ascii=False) + "\n").encode())
