"""Rows of a benchmark's file -> what a measure takes, one bad row named after another; and what a row asks a model.

Files are those of `data.rows` (.jsonl, .json, .parquet, folders). A row's pictures are spelled as in preference data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmrlhf.data.fields import text_of
from mmrlhf.data.images import open_image, open_video
from mmrlhf.data.media import images_of, videos_of
from mmrlhf.data.readers import summary
from mmrlhf.data.rows import iter_rows
from mmrlhf.data.schema import BadRow, ImageRef, VideoRef

T = TypeVar("T")

ID_KEYS = ("id", "question_id", "image_id")
PROMPT_KEYS = ("prompt", "question", "query", "text")
ANSWER_KEYS = ("answer", "response", "caption", "model_answer", "text")
ON_BAD_ROW = ("raise", "skip")


@dataclass(frozen=True)
class Question:
    """What is asked of a model: a text, with pictures before it (or where `<image>` stands in it)."""

    id: str
    prompt: str
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    source: str = ""


def read(
    path: str | Path, parse: Callable[[Mapping[str, Any]], T], *, on_bad_row: str = "raise"
) -> tuple[list[T], list[BadRow]]:
    """Every row of a file, parsed, and the rows that could not be.

    `parse` gets a row, with "__source__" (file:line) and "__place__" (the rows before it, usable or not), and raises
    ValueError with a sentence about it. With on_bad_row "raise" (the default) a file with bad rows is a ValueError that
    counts the reasons, each with a row it holds for; with "skip" they come back. A file without a usable row is a
    ValueError either way.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row must be one of {', '.join(ON_BAD_ROW)}, got {on_bad_row!r}")
    good: list[T] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}
    pictures: dict[bytes, bytes] = {}
    for place, (source, row) in enumerate(iter_rows(path)):
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            value = parse({**_with_shared(row, pictures), "__source__": source, "__place__": place})
            name = getattr(value, "id", None)
            if isinstance(name, str):
                if name in seen:
                    raise ValueError(f"id {name!r} was already used by {seen[name]}")
                seen[name] = source
        except BadRow as error:
            bad.append(error)
        except ValueError as error:
            bad.append(BadRow(source, str(error)))
        else:
            good.append(value)
    if bad and on_bad_row == "raise":
        raise ValueError(f"{path}: {len(bad)} of {len(bad) + len(good)} rows cannot be used:\n{summary(bad)}")
    if not good:
        raise ValueError(f"{path} holds no usable row" + (f":\n{summary(bad)}" if bad else ""))
    return good, bad


def _with_shared(row: Mapping[str, Any], known: dict[bytes, bytes]) -> dict[str, Any]:
    """The row with equal pictures as one object: POPE's parquet files hold each of 500 pictures 18 times."""

    def shared(item: Any) -> Any:
        if isinstance(item, bytes):
            return known.setdefault(hashlib.sha256(item).digest(), item)
        if isinstance(item, Mapping) and "bytes" in item:
            return {**item, "bytes": shared(item["bytes"])}
        return [shared(each) for each in item] if isinstance(item, list) else item

    return {name: shared(value) if name in ("image", "images") else value for name, value in row.items()}


def first(row: Mapping[str, Any], keys: Sequence[str], *, optional: bool = False) -> Any:
    """The value of the first of `keys` that the row has, or ValueError naming them all."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    if optional:
        return None
    raise ValueError(f"one of {', '.join(map(repr, keys))} must be given")


def id_of(row: Mapping[str, Any]) -> str:
    """The row's id as text: `id`, `question_id` or `image_id`, a string or a whole number."""
    value = first(row, ID_KEYS)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"the id must be text or a whole number, got {type(value).__name__}")
    return str(value)


def string(row: Mapping[str, Any], keys: Sequence[str], *, blank: bool = False) -> str:
    """The text under the first of `keys` that the row has; `blank` texts are refused unless allowed."""
    name = next((key for key in keys if row.get(key) is not None), "")
    value = text_of(first(row, keys), repr(name))
    if not blank and not value.strip():
        raise ValueError(f"{name!r} is {'empty' if not value else 'only whitespace'}")
    return value


def question_of(row: Mapping[str, Any], *, default_prompt: str | None = None) -> Question:
    """The question of a row; `default_prompt` where it has no text (a captioning benchmark)."""
    asked = first(row, PROMPT_KEYS, optional=default_prompt is not None)
    prompt = default_prompt if asked is None else string(row, PROMPT_KEYS)
    assert prompt is not None
    return Question(id_of(row), prompt, images_of(row), videos_of(row), str(row.get("__source__", "")))


def open_pictures(
    images: Sequence[ImageRef], videos: Sequence[VideoRef], root: str | Path, *, frames: int, source: str = ""
) -> list[Any]:
    """PIL pictures under `root`, and `frames` frames of each video behind them. Raises BadRow."""
    pictures = [open_image(ref, root, source=source) for ref in images]
    for video in videos:
        pictures += open_video(video, root, frames=frames, source=source)
    return pictures
