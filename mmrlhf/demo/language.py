"""What is said about a picture: a small grammar, a parser that knows the truth, corrections and scores.

    A picture of a PLACE with LIST.          In this PLACE there is LIST.          LIST: a red circle, a … and a …

`parse` is strict (the grammar or nothing); `mentions` finds every object that any text names. The oracle
(`correct`, `score`, `critique`) stands where the papers have human annotators: it corrects as RLHF-V's do, in
segments, changing nothing that is right, and scores as MM-RLHF's ranks do. Not covered: synonyms, counts, places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmrlhf.demo.world import COLOURS, PLACES, SHAPES, Kind, Scene

QUESTION = "What is in the picture?"
TEMPLATES = ("A picture of a {place} with {things}.", "In this {place} there is {things}.")

# Every word of the two templates, the question and the turns; the tokenizer is made of these and the special tokens.
WORDS: tuple[str, ...] = (
    *(".", ",", "?", "A", "a", "and", "picture", "of", "with", "In", "this", "there", "is"),
    *("What", "in", "the", "user", "assistant"),
    *PLACES,
    *COLOURS,
    *SHAPES,
)

_THING = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_LIST = rf"a (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
_CAPTION = tuple(
    re.compile(
        re.escape(template)
        .replace(re.escape("{place}"), f"(?P<place>{'|'.join(PLACES)})")
        .replace(re.escape("{things}"), f"(?P<things>(?:{_LIST}(?:, {_LIST})* and )?{_LIST})")
    )
    for template in TEMPLATES
)
_PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")


@dataclass(frozen=True)
class Caption:
    """A sentence of the grammar, taken apart."""

    place: str
    kinds: tuple[Kind, ...]  # at least one, in the order named
    template: int

    def __str__(self) -> str:
        return TEMPLATES[self.template].format(place=self.place, things=list_kinds(self.kinds))


def list_kinds(kinds: Sequence[Kind]) -> str:
    """In words: a red circle, a blue square and a white cross. Raises ValueError for none: no sentence says that."""
    if not kinds:
        raise ValueError("kinds must not be empty: the grammar cannot say that there is nothing")
    named = [f"a {kind}" for kind in kinds]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


def parse(text: str) -> Caption | None:
    """The caption, or None where the text is not a sentence of the grammar."""
    for template, pattern in enumerate(_CAPTION):
        match = pattern.fullmatch(text)
        if match:
            kinds = tuple(Kind(*found) for found in _THING.findall(match["things"]))
            return Caption(match["place"], kinds, template)
    return None


def mentions(text: str) -> list[Kind]:
    """Every object the text names, in order and with repeats, whether or not it keeps to the grammar."""
    return [Kind(*found) for found in _THING.findall(text)]


def place_named(text: str) -> str | None:
    """The first place the text names."""
    found = _PLACE.search(text)
    return found[1] if found else None


def wrong_spans(text: str, scene: Scene) -> list[tuple[int, int]]:
    """Character spans [start, end) of the objects named that are not in the picture."""
    return [m.span() for m in _THING.finditer(text) if Kind(m[1], m[2]) not in scene.kinds]


def correct(text: str, scene: Scene) -> str:
    """The text as a careful annotator would leave it: every wrong segment made right, the rest untouched.

    An object that is not there becomes one that is there and is not named (one of its shape, else the next), or goes
    if there is none; a repeat goes; a wrong place is replaced. Text outside the grammar has no segments: it is written
    anew.
    """
    caption = parse(text)
    if caption is None:
        return str(Caption(scene.place, scene.kinds, 0))
    named = set(caption.kinds)
    unnamed = [kind for kind in scene.kinds if kind not in named]
    kept: list[Kind] = []
    for kind in caption.kinds:
        if kind in scene.kinds:
            if kind not in kept:
                kept.append(kind)
        elif unnamed:
            meant = next((other for other in unnamed if other.shape == kind.shape), unnamed[0])
            unnamed.remove(meant)
            kept.append(meant)
    return str(Caption(scene.place, tuple(kept), caption.template))


def score(text: str, scene: Scene) -> float:
    """What an annotator's rank rests on: +1 an object rightly named, -2 one that is not there, -1 a repeat, -1 a wrong
    place, -2 a sentence outside the grammar."""
    named = mentions(text)
    distinct = set(named)
    right = len(distinct & set(scene.kinds))
    absent = sum(kind not in scene.kinds for kind in distinct)
    repeats = len(named) - len(distinct)
    return float(right - 2 * absent - repeats - (place_named(text) != scene.place) - 2 * (parse(text) is None))


def critique(text: str, scene: Scene) -> str:
    """The reasons behind `score`, as a sentence."""
    named = set(mentions(text))
    absent = [kind for kind in dict.fromkeys(mentions(text)) if kind not in scene.kinds]
    missed = [kind for kind in scene.kinds if kind not in named]
    reasons = []
    if parse(text) is None:
        reasons.append("it is not a whole sentence")
    if place_named(text) != scene.place:
        reasons.append(f"the place is a {scene.place}")
    if absent:
        reasons.append(f"{list_kinds(absent)} {'is' if len(absent) == 1 else 'are'} not in the picture")
    if missed:
        reasons.append(f"it does not name {list_kinds(missed)}")
    return (
        ("; ".join(reasons) + ".").capitalize() if reasons else "Everything in the picture is named, and nothing else."
    )
