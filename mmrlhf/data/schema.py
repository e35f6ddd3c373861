"""PreferenceGroup: one prompt with its images and its K responses, in whatever format it was published.

Every reader produces these; every later step reads only these. Ties give no pair. A plain chosen/rejected record
is K = 2. Text here is user data: the marker tokens of a model never appear in it (`collate` refuses them).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Literal, Protocol

PairMode = Literal["all", "adjacent", "best_vs_rest"]
PAIR_MODES: tuple[str, ...] = ("all", "adjacent", "best_vs_rest")


class BadRow(ValueError):
    """A row that cannot be used. `source` is "file:line", "file:row N" or a group id; `reason` says why."""

    def __init__(self, source: str, reason: str):
        super().__init__(f"{source}: {reason}")
        self.source = source
        self.reason = reason


class Stored(Protocol):
    """Bytes that lie in a file of ours; `spool.Spooled` is one."""

    @property
    def digest(self) -> bytes: ...  # sha256

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of an image are: a path inside the data root, the bytes themselves, or a place they can be read
    from again (those of a large data set that carries its images inside)."""

    path: str | None = None  # relative to the data root; opened by `images.open_image` only
    data: bytes | None = None
    stored: Stored | None = None

    def __post_init__(self):
        if sum(each is not None for each in (self.path, self.data, self.stored)) != 1:
            raise ValueError("ImageRef takes exactly one of path, data and stored")

    def embedded(self) -> bytes | None:
        """The encoded bytes of an image that came inside the data; None for one that is a file."""
        return self.stored.read() if self.stored is not None else self.data

    @property
    def identity(self) -> str | bytes:
        """Equal for equal images: the path, or the sha256 of embedded bytes."""
        if self.path is not None:
            return self.path
        if self.stored is not None:
            return self.stored.digest
        assert self.data is not None
        return hashlib.sha256(self.data).digest()


@dataclass(frozen=True)
class VideoRef:
    """A directory of frame images, or a video file, inside the data root."""

    path: str


@dataclass(frozen=True)
class Part:
    """One piece of a message: text, or the place of the next image or video."""

    type: Literal["text", "image", "video"]
    text: str = ""


@dataclass(frozen=True)
class Message:
    role: str  # system | user | assistant
    content: tuple[Part, ...]


@dataclass(frozen=True)
class Response:
    text: str
    score: float | None = None  # reward, higher is better
    rank: int | None = None  # 1 is best; equal ranks are ties
    critique: str | None = None
    segments: tuple[tuple[int, int], ...] | None = None  # corrected [start, end) character spans of `text`


@dataclass(frozen=True)
class ListedPair:
    """A pair the data itself names: response `better` is preferred to response `worse`."""

    better: int
    worse: int
    margin: float | None = None  # reward margin, if the data gives one and the responses carry no scores


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt, its images and videos in the order their parts appear, and K responses."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[Response, ...]
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    pairs: tuple[ListedPair, ...] | None = None  # None: derive them from ranks, else from scores
    ties: tuple[tuple[int, int], ...] = ()  # pairs that the data names as tied; equal ranks are ties as well
    source: str = ""  # file:line of the (first) row it came from
    meta: dict[str, str] = field(default_factory=dict)

    def preference_pairs(self, mode: PairMode = "all") -> tuple[ListedPair, ...]:
        """The pairs (better, worse) of this group; ties give none.

        From listed pairs: "all" keeps them as they are; "adjacent" leaves out a pair that two others of the list
        imply (better over c, c over worse); "best_vs_rest" keeps those whose better response nothing in the list
        beats. A list that goes in a circle may leave none of either.
        Otherwise pairs come from ranks (1 is best), or from scores where no response has a rank. "all": every pair of
        different level; "adjacent": each level against the next one down; "best_vs_rest": the best level against all
        others. Margins are score differences.
        Raises BadRow if ranks or scores are there for some of the responses only, or for none.
        """
        if mode not in PAIR_MODES:
            raise ValueError(f"pairs must be one of {', '.join(PAIR_MODES)}, got {mode!r}")
        if self.pairs is not None:
            return tuple(ListedPair(p.better, p.worse, self._margin(p)) for p in _thinned(self.pairs, mode))
        level = self._levels()
        distinct = sorted(set(level))
        position = {value: index for index, value in enumerate(distinct)}
        chosen: list[ListedPair] = []
        for i, a in enumerate(level):
            for j, b in enumerate(level):
                if a >= b:
                    continue
                if mode == "adjacent" and position[b] != position[a] + 1:
                    continue
                if mode == "best_vs_rest" and position[a] != 0:
                    continue
                chosen.append(ListedPair(i, j, self._margin(ListedPair(i, j))))
        return tuple(chosen)

    def why_no_pairs(self, mode: PairMode = "all") -> str:
        """What to say of a group that `preference_pairs(mode)` gives no pair of."""
        if not self.pairs:
            return "no preference pair: all responses are tied"
        return f"no preference pair: the {len(self.pairs)} listed pairs go in a circle, so that pairs={mode} keeps none"

    def _levels(self) -> list[float]:
        """Each response's level, lower is better."""
        for name, values, sign in (
            ("rank", [r.rank for r in self.responses], 1.0),
            ("score", [r.score for r in self.responses], -1.0),
        ):
            given = [v for v in values if v is not None]
            if not given:
                continue
            if len(given) < len(values):
                raise BadRow(self.source or self.id, f"{name} is given for {len(given)} of {len(values)} responses")
            return [sign * v for v in given]
        raise BadRow(self.source or self.id, "no pairs listed, and no response has a rank or a score")

    def _margin(self, pair: ListedPair) -> float | None:
        better, worse = self.responses[pair.better].score, self.responses[pair.worse].score
        if better is not None and worse is not None and math.isfinite(better) and math.isfinite(worse):
            return better - worse
        return pair.margin


def _thinned(listed: tuple[ListedPair, ...], mode: PairMode) -> list[ListedPair]:
    """The listed pairs that `mode` keeps, in their order."""
    edges = {(p.better, p.worse) for p in listed}
    beaten = {worse for _, worse in edges}
    if mode == "best_vs_rest":
        return [p for p in listed if p.better not in beaten]
    if mode == "adjacent":
        return [p for p in listed if not any((p.better, c) in edges and (c, p.worse) in edges for c in beaten)]
    return list(listed)
