"""What is scored already: a line a group, appended as groups are done, so that what is stopped goes on where it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.data.fields import want
from mmrlhf.data.resumable import ResumableLines
from mmrlhf.data.schema import PreferenceGroup


@dataclass(frozen=True)
class Scored:
    """What one group got."""

    index: int  # into the groups asked for
    id: str
    scores: tuple[float, ...]  # one a response, in the group's order
    critiques: tuple[str | None, ...]  # that the scores were read after; of several samples the first


Known = tuple[tuple[float, ...], tuple["str | None", ...]]  # scores, critiques


class Journal:
    """Groups that are scored: {"key"}, what made the scores, then {"group", "scores", "critiques"} a line.

    One process at a time. ValueError for a journal of another key, one in use, or a line that is neither.
    """

    def __init__(self, path: Path, *, key: str):
        self.path, self.key = path, key
        self._known: dict[str, Known] = {}

    def __enter__(self) -> Journal:
        self._lines = ResumableLines(self.path, what="a journal of scores")
        try:
            self._read()
        except ValueError:
            self._lines.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def _read(self) -> None:
        rows = self._lines.read(_parse)
        before, _ = next(rows, (None, None))
        if before not in (None, self.key):
            raise ValueError(
                f"{self.path} has scores of another model or with other options: remove it, or choose another output"
            )
        self._known = dict(rows)
        if before is None:
            self._lines.append({"key": self.key})

    def get(self, name: str, group: PreferenceGroup) -> Scored | None:
        """What is known of the group whose `row_hash` is `name`."""
        scores, critiques = self._known.get(name, ((), ()))
        if len(scores) != len(group.responses):
            return None
        return Scored(-1, group.id, scores, critiques)

    def add(self, name: str, done: Scored) -> None:
        self._lines.append({"group": name, "scores": list(done.scores), "critiques": list(done.critiques)})
        self._known[name] = done.scores, done.critiques


def _parse(row: dict[str, Any]) -> tuple[str, Known]:
    if "key" in row:  # the first line
        return want(row, "key", str), ((), ())
    return want(row, "group", str), (tuple(row["scores"]), tuple(row["critiques"]))
