"""How true captions are, measured against the scenes themselves.

Hallucination has two levels, as in Object HalBench: the share of captions with any object that is not there, and the
share of all mentions that are not there. Neither means anything alone, since a model that says less errs less:
recall and mentions per caption stand beside them, always. Not covered: place in the picture, counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mmrlhf.demo.language import mentions, parse, place_named
from mmrlhf.demo.world import Scene


@dataclass(frozen=True)
class Figures:
    """Shares are in [0, 1]."""

    captions: int
    response_hallucination: float  # captions that name an object that is not there
    mention_hallucination: float  # mentions of objects that are not there, of all mentions
    habit_hallucination: float  # the place's habit named, of the pictures that tempt to it and lack it
    recall: float  # objects named, of all objects that are there
    mentions_per_caption: float
    valid: float  # sentences of the grammar
    place: float  # the right place named

    @property
    def response_error(self) -> float:
        """Standard error of the response level."""
        p = self.response_hallucination
        return math.sqrt(p * (1 - p) / self.captions)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(captions: Sequence[str], scenes: Sequence[Scene]) -> Figures:
    """The figures of one caption a scene. Raises ValueError where there are none, or the counts differ."""
    if len(captions) != len(scenes) or not scenes:
        raise ValueError(f"captions and scenes must be as many, and at least one, got {len(captions)}, {len(scenes)}")
    wrong_captions = wrong = named = found = there = habit_named = habit_absent = 0
    for caption, scene in zip(captions, scenes, strict=True):
        said = mentions(caption)
        absent = sum(kind not in scene.kinds for kind in said)
        wrong_captions += absent > 0
        wrong += absent
        named += len(said)
        found += len(set(said) & set(scene.kinds))
        there += len(scene.kinds)
        if scene.temptation is not None:
            habit_absent += 1
            habit_named += scene.temptation in said
    count = len(scenes)
    return Figures(
        captions=count,
        response_hallucination=wrong_captions / count,
        mention_hallucination=wrong / max(1, named),
        habit_hallucination=habit_named / max(1, habit_absent),
        recall=found / there,
        mentions_per_caption=named / count,
        valid=sum(parse(caption) is not None for caption in captions) / count,
        place=sum(place_named(c) == s.place for c, s in zip(captions, scenes, strict=True)) / count,
    )
