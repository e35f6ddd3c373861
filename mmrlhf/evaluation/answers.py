"""A model's answers to the questions of a benchmark, greedy, in a file that a stopped run goes on with.

    answers.jsonl   {"id", "answer", "key"}: one line a question, appended batch by batch

`key` is a hash of the question, its pictures, the length and the model's files: a line of another model or prompt is
refused, not used. A line that a kill cut short is dropped and its question asked again. The frames of a video are
given as so many images. Not covered: beams and sampling (`models.generate` decodes greedily), several processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrlhf.data.fields import user
from mmrlhf.data.images import image_size
from mmrlhf.data.readers import summary
from mmrlhf.data.schema import BadRow
from mmrlhf.evaluation.rows import ANSWER_KEYS, Question, id_of, open_pictures, read, string
from mmrlhf.models import generate

Loader = Callable[[], "tuple[Any, Any]"]  # -> model, processor; called only where a question is open


def read_answers(path: str | Path) -> dict[str, str]:
    """Answers by id from a file of {"id", "answer"} rows. An empty answer is an answer."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Answer:
        id: str
        text: str

    rows, _ = read(path, lambda row: Answer(id_of(row), string(row, ANSWER_KEYS, blank=True)))
    return {row.id: row.text for row in rows}


def answer_questions(
    questions: Sequence[Question],
    path: str | Path,
    load: Loader,
    *,
    model_name: str,
    root: str | Path = ".",
    max_new_tokens: int = 512,
    batch_size: int = 8,
    frames: int = 8,
    on_bad_row: str = "raise",
    say: Callable[[str], None] | None = None,
) -> tuple[dict[str, str], list[BadRow]]:
    """Answers by id, and the questions whose pictures cannot be read; both asked of the model only where `path` lacks
    them.

    `load` gives (model, processor) and is not called when nothing is open. `model_name` is the folder or hub id that
    it loads. Pictures are looked up under `root`; with on_bad_row "raise" one that cannot be read is a ValueError, as
    soon as it is seen. Raises ValueError where `path` holds answers of another model, prompt or length.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    path = Path(path)
    model_key = model_fingerprint(model_name)
    keys = {q.id: _key(q, model_key, max_new_tokens, frames, root) for q in questions}
    done = _read_done(path, keys)
    bad: list[BadRow] = []
    open_ones = [q for q in questions if q.id not in done]
    if open_ones:
        readable = []
        for question in open_ones:  # headers first: a picture that is missing is said before hours of answers
            try:
                for image in question.images:
                    image_size(image, root, source=question.source)
                readable.append(question)
            except BadRow as error:
                bad.append(error)
        open_ones = readable
    if bad and on_bad_row == "raise":
        raise ValueError(f"{len(bad)} questions have pictures that cannot be read:\n{summary(bad)}")
    if not open_ones:
        return done, bad
    model, processor = load()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for start in range(0, len(open_ones), batch_size):
            batch: list[tuple[Question, generate.Prompt]] = []
            for question in open_ones[start : start + batch_size]:
                try:
                    batch.append((question, _prompt(question, root, frames)))
                except ValueError as error:
                    row = error if isinstance(error, BadRow) else BadRow(question.source, str(error))
                    if on_bad_row == "raise":
                        raise row from error
                    bad.append(row)
            prompts = [prompt for _, prompt in batch]
            texts = generate.answer(
                model, processor, prompts, max_new_tokens=max_new_tokens, batch_size=max(1, len(batch))
            )
            for (question, _), text in zip(batch, texts, strict=True):
                done[question.id] = text
                line = {"id": question.id, "answer": text, "key": keys[question.id]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if say is not None:
                say(f"{min(start + batch_size, len(open_ones))} of {len(open_ones)} questions answered")
    return done, bad


def _prompt(question: Question, root: str | Path, frames: int) -> generate.Prompt:
    pictures = open_pictures(question.images, question.videos, root, frames=frames, source=question.source)
    text = question.prompt
    if question.videos:  # its frames stand where the video would
        text = text.replace("<video>", "")
    return user(text, len(pictures)), pictures


def model_fingerprint(name: str | Path) -> str:
    """What tells one model from another: names, sizes and times of a folder's files; of a hub id, the id."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json"):
            about = file.stat()
            digest.update(f"{file.name}:{about.st_size}:{about.st_mtime_ns}\n".encode())
    return f"{folder.name}:{digest.hexdigest()}"


def _key(question: Question, model_key: str, max_new_tokens: int, frames: int, root: str | Path) -> str:
    digest = hashlib.sha256(f"{model_key}\0{max_new_tokens}\0{question.prompt}\0".encode())
    for image in question.images:
        digest.update(image.data if image.data is not None else f"{image.path}\0".encode())
    for video in question.videos:
        digest.update(f"{video.path}\0{frames}\0".encode())
    return digest.hexdigest()[:32]


def _read_done(path: Path, keys: Mapping[str, str]) -> dict[str, str]:
    """Answers that the file has for these questions. The file is cut behind its last whole line."""
    if not path.exists():
        return {}
    done: dict[str, str] = {}
    whole = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            try:
                row = json.loads(line)
                name, text, key = row["id"], row["answer"], row["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: not a line of answers this command wrote ({error})") from error
            if name not in keys:
                continue
            if key != keys[name]:
                raise ValueError(
                    f"{path}:{number}: the answer to {name!r} is of another model, prompt or length; "
                    "name another output, or remove the file"
                )
            done[name] = text
    os.truncate(path, whole)
    return done
