"""A model's answers to the questions of a benchmark, greedy, in a file that a stopped run goes on with.

    answers.jsonl   {"id", "answer", "key"}: one line a question, appended batch by batch

`key` is a hash of the question, its pictures' bytes, the length and the model's files: a line of another model or
prompt is refused, not used. A line that a kill cut short is dropped and its question asked again. The frames of a video
are given as so many images, in its place. Not covered: beams and sampling (`models.generate` decodes greedily), several
processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.data.fields import user, want
from mmrlhf.data.images import frame_names, image_bytes, image_size, open_image, open_video
from mmrlhf.data.readers import summary
from mmrlhf.data.resumable import ResumableLines
from mmrlhf.data.schema import BadRow, ImageRef, Message, Part
from mmrlhf.evaluation.rows import ANSWER_KEYS, Question, id_of, read, string
from mmrlhf.models import generate

Loader = Callable[[], "tuple[Any, Any]"]  # -> model, processor; called only where a question is open


def read_answers(path: str | Path) -> dict[str, str]:
    """Answers by id from a file of {"id", "answer"} rows. An empty answer is an answer."""
    rows, _ = read(path, lambda row: _Answer(id_of(row), string(row, ANSWER_KEYS, blank=True)))
    return {row.id: row.text for row in rows}


@dataclass(frozen=True)
class _Answer:
    id: str
    text: str


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
    """Answers by id, and the questions that cannot be asked: pictures that are missing, broken or not named at all, or
    that do not fit the places for them. The model is asked where `path` lacks an answer.

    `load` gives (model, processor) and is not called when nothing is open. `model_name` is the folder or hub id that
    it loads. Pictures are looked up under `root`; with on_bad_row "raise" a question that cannot be asked is a
    ValueError, as soon as it is seen. Raises ValueError where no question is left, or `path` holds answers of another
    model, prompt, picture or length.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    made_by = f"{model_fingerprint(model_name)}\0{max_new_tokens}"
    keys: dict[str, str] = {}
    bad: list[BadRow] = []
    for question in questions:  # before hours of answers, and before a model is loaded
        try:
            keys[question.id] = _key(question, root, frames, made_by)
        except ValueError as error:
            bad.append(_bad_row(question, error))
    if bad and (on_bad_row == "raise" or not keys):
        raise ValueError(f"{len(bad)} of {len(questions)} questions cannot be asked:\n{summary(bad)}")
    with ResumableLines(path, what="a model's answers") as lines:
        done = _known(lines, keys)
        todo = [question for question in questions if question.id in keys and question.id not in done]
        if not todo:
            return done, bad
        model, processor = load()
        for start in range(0, len(todo), batch_size):
            batch: list[tuple[Question, generate.Prompt]] = []
            for question in todo[start : start + batch_size]:
                try:
                    batch.append((question, _prompt(question, root, frames)))
                except ValueError as error:
                    row = _bad_row(question, error)
                    if on_bad_row == "raise":
                        raise row from error
                    bad.append(row)
            options = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
            texts = generate.answer(model, processor, [prompt for _, prompt in batch], **options)
            new = {question.id: text for (question, _), text in zip(batch, texts, strict=True)}
            lines.append(*({"id": name, "answer": text, "key": keys[name]} for name, text in new.items()))
            done |= new
            if say is not None:
                say(f"{min(start + batch_size, len(todo))} of {len(todo)} questions answered")
    return done, bad


def _bad_row(question: Question, error: ValueError) -> BadRow:
    return error if isinstance(error, BadRow) else BadRow(question.source or question.id, str(error))


def _known(lines: ResumableLines, keys: Mapping[str, str]) -> dict[str, str]:
    """The answers that the file has for these questions."""
    done = {}
    for name, text, key in lines.read(lambda row: [want(row, field, str) for field in ("id", "answer", "key")]):
        if key != keys.get(name, key):
            raise ValueError(
                f"{lines.path}: the answer to {name!r} is of another model, prompt, picture or length; "
                "name another output, or remove the file"
            )
        if name in keys:
            done[name] = text
    return done


def _prompt(question: Question, root: str | Path, frames: int) -> generate.Prompt:
    """The turn with a part a picture, a video being its frames, and the pictures in the order of their parts."""
    images, videos = iter(question.images), iter(question.videos)
    parts: list[Part] = []
    pictures: list[Any] = []
    for part in _parts(question):
        if part.type == "text":
            parts.append(part)
            continue
        if part.type == "image":
            shown = [open_image(next(images), root, source=question.source)]
        else:
            shown = open_video(next(videos), root, frames=frames, source=question.source)
        parts += [Part("image")] * len(shown)
        pictures += shown
    return (Message("user", tuple(parts)),), pictures


def _parts(question: Question) -> tuple[Part, ...]:
    (turn,) = user(question.prompt, len(question.images), len(question.videos))
    return turn.content


def model_fingerprint(name: str | Path) -> str:
    """What tells one model from another: names, sizes and times of a folder's files; of a hub id, the id."""
    folder = Path(name)
    if not folder.is_dir():
        return str(name)
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".txt", ".model", ".py"):
            about = file.stat()
            digest.update(f"{file.name}:{about.st_size}:{about.st_mtime_ns}\n".encode())
    return f"{folder.name}:{digest.hexdigest()}"


def _key(question: Question, root: str | Path, frames: int, made_by: str) -> str:
    """Hash of all that an answer depends on; of a video the path. Raises ValueError where it cannot be asked."""
    if not question.images and not question.videos:
        raise ValueError("no picture: 'image' or 'video' must be given")
    _parts(question)
    digest = hashlib.sha256(f"{made_by}\0{question.prompt}\0".encode())
    for image in question.images:
        data = image_bytes(image, root, source=question.source)
        image_size(ImageRef(data=data), root, source=question.source or image.path or "")
        digest.update(hashlib.sha256(data).digest())
    for video in question.videos:
        frame_names(video, root, source=question.source)
        digest.update(f"{video.path}\0{frames}\0".encode())
    return digest.hexdigest()[:32]
