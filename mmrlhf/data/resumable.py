"""A file of JSON lines that a run appends to as it goes, and that a stopped run goes on with.

    with ResumableLines(path, what="scores") as lines:
        known = dict(lines.read(lambda row: (row["id"], row["score"])))    # once, before the first append
        lines.append({"id": …, "score": …})

A line counts once its line break is written. What a kill left behind the last break is cut off, so the work behind it
is done again. One process at a time: another one that opens the file gets a ValueError instead of a mixed file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class ResumableLines:
    """`path` is made, with its folders, where it is missing; `what` the lines are, for messages."""

    def __init__(self, path: str | Path, *, what: str):
        self.path, self.what = Path(path), what
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - lives until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{self.path} is in use by another process") from error
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> ResumableLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
        """Every whole line, parsed; then what is left of a cut one is dropped from the file.

        Raises ValueError naming the line that is no JSON object, or of which `parse` raises KeyError, TypeError or
        ValueError.
        """
        whole = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                return
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise TypeError(f"it must be an object, got {type(row).__name__}")
                value = parse(row)
            except (ValueError, KeyError, TypeError) as error:
                why = f"it lacks {error}" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"{self.path}:{number}: not a line of {self.what} ({why}): remove the file to make it anew"
                ) from error
            whole += len(line)
            yield value

    def append(self, *rows: dict[str, Any]) -> None:
        """Write these lines, on the disk when it returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8", "surrogatepass"))  # as json.loads reads bytes
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
