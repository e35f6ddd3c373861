"""Answers before and after training, for a few prompts spread over the data: what the report shows side by side.

    samples.jsonl   {"id", "image", "prompt", "before", "after", "responses": [{"text", "score", "rank"}]}
    images/         a copy of each picture, at most SIDE pixels wide and high

Answers are greedy. `before` is written at the start and kept on resume; `after` is null until the run ends.
Not covered: videos (groups with one are passed over).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrlhf.config import TrainConfig
from mmrlhf.data import images
from mmrlhf.data.schema import PreferenceGroup
from mmrlhf.models import generate
from mmrlhf.train.files import write_atomic

SIDE = 768


class Samples:
    """The chosen groups of a run; `before` and `after` ask the model and write the file."""

    def __init__(self, folder: Path, groups: Sequence[PreferenceGroup], root: Path, settings: TrainConfig):
        self.folder, self.root, self.settings = folder, root, settings
        self.path = folder / "samples.jsonl"
        still = [group for group in groups if not group.videos]
        self.groups = spread(still, settings.samples)

    def before(self, model: Any, processor: Any, *, keep: bool) -> None:
        """Answer with the starting model, unless (`keep`, on resume) the file has these answers."""
        lines = self._read() if keep else []
        if [line["id"] for line in lines] == [group.id for group in self.groups]:
            return
        answers = self._answers(model, processor)
        self._write([self._line(i, group, answers[i]) for i, group in enumerate(self.groups)])

    def after(self, model: Any, processor: Any, *, write: bool = True) -> None:
        """Answer with the trained model. All processes of a sharded one answer together, and one writes."""
        answers = self._answers(model, processor)
        if not write:
            return
        lines = self._read()
        self._write([{**line, "after": answer} for line, answer in zip(lines, answers, strict=True)])

    def _answers(self, model: Any, processor: Any) -> list[str]:
        if not self.groups:
            return []
        prompts = [(group.prompt, self._pictures(group)) for group in self.groups]
        return generate.answer(model, processor, prompts, max_new_tokens=self.settings.sample_tokens)

    def _pictures(self, group: PreferenceGroup) -> list[Any]:
        limit = self.settings.data.max_image_pixels
        return [images.open_image(ref, self.root, max_pixels=limit) for ref in group.images]

    def _line(self, index: int, group: PreferenceGroup, before: str) -> dict[str, Any]:
        image = None
        pictures = self._pictures(group)
        if pictures:
            image = f"images/{index:03d}.png"
            (self.folder / "images").mkdir(exist_ok=True)
            pictures[0].thumbnail((SIDE, SIDE))
            pictures[0].save(self.folder / image)
        return {
            "id": group.id,
            "image": image,
            "prompt": prompt_text(group),
            "before": before,
            "after": None,
            "responses": [{"text": r.text, "score": r.score, "rank": r.rank} for r in group.responses],
        }

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def _write(self, lines: Sequence[dict[str, Any]]) -> None:
        write_atomic(self.path, [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines])


def spread(groups: Sequence[PreferenceGroup], count: int) -> list[PreferenceGroup]:
    """`count` groups at even distances, the first one included; all of them where there are fewer."""
    if count >= len(groups):
        return list(groups)
    return [groups[index * len(groups) // count] for index in range(count)]


def prompt_text(group: PreferenceGroup) -> str:
    """The prompt for a reader: the text alone, with the roles where there is more than one message."""
    lines = []
    for message in group.prompt:
        text = " ".join(part.text for part in message.content if part.type == "text")
        lines.append(f"{message.role}: {text}" if len(group.prompt) > 1 else text)
    return "\n".join(lines)
