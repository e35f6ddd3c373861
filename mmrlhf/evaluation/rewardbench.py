"""Does a reward model prefer what people preferred? MM-RLHF-RewardBench and VL-RewardBench.

    file -> Comparison (prompt, pictures, better, worse)  -- scorer -->  two rewards  -->  BenchResult

MM-RLHF-RewardBench: 170 pairs of 46 queries. ACC is the share of pairs whose better response scores strictly higher (a
tie is wrong); ACC+ the share of queries all of whose pairs are right. A pair's category is the first of CATEGORIES
that its picture's path contains. Source: the released cal_performance_mmreweard_bench.py (arXiv 2502.10391, section 5).

VL-RewardBench: 1250 pairs. `accuracy` is the share of right pairs (the paper's overall); `macro` the mean of the shares
of its three groups, which are of very different size: two figures that are easily confused. Its released script asks a
judge which of two is better, several times over; here every pair is scored. Source: arXiv 2411.17451, cal.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrlhf.data.fields import number, optional_text, user
from mmrlhf.data.media import images_of, videos_of
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, PreferenceGroup, Response, VideoRef
from mmrlhf.evaluation.rows import PROMPT_KEYS, first, id_of, open_pictures, read, string

CATEGORIES = ("mcq", "long", "short", "safety", "video")
# VL-RewardBench's groups by the data set a query came from, in the spellings of its table and of its file paths.
GROUPS = {
    "wildvision": "general",
    "wildvision-battle": "general",
    "vlfeedback": "general",
    "povid": "hallucination",
    "rlhf-v": "hallucination",
    "rlaif-v": "hallucination",
    "mmmu-pro": "reasoning",
    "mathverse": "reasoning",
    "reasoning_tasks": "reasoning",
}
BENCHMARKS = ("mm_rlhf", "vl")

Scorer = Callable[[str, Sequence[Any], str], float]  # prompt, its pictures, a response -> reward
Scores = tuple[float, float]  # of the better response and of the worse one


@dataclass(frozen=True)
class Comparison:
    """One pair of a benchmark. `query` is shared by the pairs of one question; `id` names the pair."""

    id: str
    query: str
    category: str
    prompt: str
    chosen: str
    rejected: str
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    source: str = ""
    critiques: tuple[str | None, str | None] = (None, None)  # of chosen and rejected, where the file has them


@dataclass(frozen=True)
class Share:
    right: int
    of: int

    @property
    def value(self) -> float:
        return self.right / self.of


@dataclass(frozen=True)
class BenchResult:
    """Shares in [0, 1]. `accuracy` is over pairs, `all_right` over queries (ACC+), `macro` the mean over categories."""

    pairs: Share
    queries: Share
    categories: dict[str, tuple[Share, Share]]  # category -> (pairs, queries)
    ties: int  # pairs of equal rewards, all counted wrong
    wrong: tuple[str, ...] = field(repr=False, default=())  # ids of the pairs that were not right

    @property
    def accuracy(self) -> float:
        return self.pairs.value

    @property
    def all_right(self) -> float:
        return self.queries.value

    @property
    def macro(self) -> float:
        return sum(pairs.value for pairs, _ in self.categories.values()) / len(self.categories)


def read_comparisons(
    path: str | Path, *, benchmark: str = "mm_rlhf", on_bad_row: str = "raise"
) -> tuple[list[Comparison], list[BadRow]]:
    """The pairs of a benchmark's file, and the rows that could not be read.

    "mm_rlhf": {"id", "image" or "video", "prompt", "chosen", "rejected"}, optional "category", "chosen_reason" and
    "rejected_reason".
    "vl": {"id", "query", "image", "response": [two], "human_ranking": [0, 1] or [1, 0], "query_source"}; rank 0 is the
    better. Raises ValueError for an unknown benchmark.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be one of {', '.join(BENCHMARKS)}, got {benchmark!r}")
    counts: dict[str, int] = {}
    parse = _mm_rlhf if benchmark == "mm_rlhf" else _vl
    return read(path, lambda row: parse(row, counts), on_bad_row=on_bad_row)


def _mm_rlhf(row: Mapping[str, Any], counts: dict[str, int]) -> Comparison:
    images, videos = images_of(row), videos_of(row)
    paths = [ref.path or "" for ref in images] + [ref.path for ref in videos]
    category = next((c for c in CATEGORIES if any(c in path for path in paths)), None)
    if row.get("category"):
        category = string(row, ("category",))
    if category is None:
        raise ValueError(f"no category: none of {', '.join(CATEGORIES)} stands in the path {paths[:1]}")
    return _comparison(row, counts, category, string(row, ("chosen",)), string(row, ("rejected",)), images, videos)


def _vl(row: Mapping[str, Any], counts: dict[str, int]) -> Comparison:
    responses, ranking = row.get("response"), row.get("human_ranking", row.get("ranking"))
    if not isinstance(responses, list) or len(responses) != 2 or not all(isinstance(r, str) for r in responses):
        raise ValueError("'response' must be a list of two texts")
    if ranking not in ([0, 1], [1, 0]):
        raise ValueError(f"'human_ranking' must be [0, 1] or [1, 0], got {ranking!r}")
    source = str(first(row, ("query_source", "dataset"))).lower()
    if source not in GROUPS:
        raise ValueError(f"'query_source' must be one of {', '.join(GROUPS)}, got {source!r}")
    better = ranking.index(0)
    return _comparison(row, counts, GROUPS[source], responses[better], responses[1 - better], images_of(row), ())


def _comparison(
    row: Mapping[str, Any],
    counts: dict[str, int],
    category: str,
    chosen: str,
    rejected: str,
    images: tuple[ImageRef, ...],
    videos: tuple[VideoRef, ...],
) -> Comparison:
    prompt, query = string(row, PROMPT_KEYS), id_of(row)
    user(prompt, len(images), len(videos))  # ValueError for places that fit no picture
    place = counts.get(query, 0)
    counts[query] = place + 1
    source = str(row.get("__source__", ""))
    critiques = (
        optional_text(row.get("chosen_reason"), "chosen_reason"),
        optional_text(row.get("rejected_reason"), "rejected_reason"),
    )
    name = f"{query}#{place}"
    return Comparison(name, query, category, prompt, chosen, rejected, images, videos, source, critiques)


def score_comparisons(
    pairs: Iterable[Comparison], scorer: Scorer, *, root: str | Path | None = None, frames: int = 8
) -> dict[str, Scores]:
    """Rewards of every pair by its id. A response that several pairs of a query share is scored once.

    With `root`, the scorer is given the pictures themselves (PIL; of a video `frames` of its frames), opened under that
    folder once a query; without it, the ImageRefs of the row. A reward that is no finite number is a ValueError naming
    the pair; a picture that cannot be opened is a BadRow.
    """
    known: dict[tuple[Any, ...], float] = {}
    opened: tuple[tuple[Any, ...], Sequence[Any]] = ((), ())
    out = {}
    for pair in pairs:
        media = (pair.images, pair.videos)
        if root is not None and opened[0] != media:
            opened = (media, open_pictures(pair.images, pair.videos, root, frames=frames, source=pair.source))
        both = []
        for response in (pair.chosen, pair.rejected):
            key = (pair.query, pair.prompt, media, response)
            if key not in known:
                known[key] = _finite(scorer(pair.prompt, pair.images if root is None else opened[1], response), pair)
            both.append(known[key])
        out[pair.id] = (both[0], both[1])
    return out


def as_groups(pairs: Iterable[Comparison]) -> list[tuple[PreferenceGroup, list[Comparison]]]:
    """The pairs gathered by query, as reward models take them: pictures once, each response once."""
    gathered: dict[tuple[Any, ...], list[Comparison]] = {}
    for pair in pairs:
        gathered.setdefault((pair.query, pair.prompt, pair.images, pair.videos), []).append(pair)
    groups = []
    for own in gathered.values():
        head = own[0]
        critiques: dict[str, str | None] = {}
        for pair in own:
            for text, critique in zip((pair.chosen, pair.rejected), pair.critiques, strict=True):
                critiques[text] = critiques.get(text) or critique
        texts = list(critiques)
        group = PreferenceGroup(
            id=head.id,
            prompt=user(head.prompt, len(head.images), len(head.videos)),
            responses=tuple(Response(text, critique=critique) for text, critique in critiques.items()),
            images=head.images,
            videos=head.videos,
            pairs=tuple(ListedPair(texts.index(p.chosen), texts.index(p.rejected)) for p in own),
            source=head.source,
        )
        groups.append((group, own))
    return groups


def score_by_groups(
    pairs: Sequence[Comparison], score: Callable[[Sequence[PreferenceGroup]], Iterable[Any]]
) -> dict[str, Scores]:
    """Rewards of every pair, from a function that scores whole groups: it yields objects with `index`, the group's
    place, and `scores`, a reward a response. (`mmrlhf.reward.score.score_groups`, bound to its model, is one.)"""
    gathered = as_groups(pairs)
    out = {}
    for scored in score([group for group, _ in gathered]):
        group, own = gathered[scored.index]
        rewards = {r.text: value for r, value in zip(group.responses, scored.scores, strict=True)}
        for pair in own:
            out[pair.id] = (_finite(rewards[pair.chosen], pair), _finite(rewards[pair.rejected], pair))
    return out


def _finite(reward: Any, pair: Comparison) -> float:
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"the reward of pair {pair.id} ({pair.source}) must be finite, got {value}")
    return value


def read_scores(path: str | Path) -> dict[str, Scores]:
    """Rewards from a file of {"id", "rewards": [better, worse]} rows, or {"id", "chosen_score", "rejected_score"}.

    `id` is a pair's ("q#0") or a query's, whose rows then follow the order of its pairs.
    """
    counts: dict[str, int] = {}

    def parse(row: Mapping[str, Any]) -> tuple[str, Scores]:
        rewards = row.get("rewards")
        if rewards is None:
            rewards = [first(row, ("chosen_score",)), first(row, ("rejected_score",))]
        if not isinstance(rewards, list) or len(rewards) != 2:
            raise ValueError("'rewards' must be a list of two numbers, the better response's first")
        better, worse = (number(value, "a reward") for value in rewards)
        if better is None or worse is None:
            raise ValueError("'rewards' holds null")
        name = id_of(row)
        if "#" not in name:
            counts[name] = counts.get(name, 0) + 1
            name = f"{name}#{counts[name] - 1}"
        return name, (better, worse)

    rows, _ = read(path, parse)
    scores = dict(rows)
    if len(scores) < len(rows):
        names = [name for name, _ in rows]
        raise ValueError(f"{path}: pair {next(n for n in names if names.count(n) > 1)!r} has two rows of rewards")
    return scores


def measure(pairs: Sequence[Comparison], scores: Mapping[str, Scores]) -> BenchResult:
    """The figures of all pairs. Raises ValueError where there is no pair, a pair has no score, or a score no pair."""
    if not pairs:
        raise ValueError("pairs must not be empty: there is nothing to measure")
    missing = [pair.id for pair in pairs if pair.id not in scores]
    extra = sorted(set(scores) - {pair.id for pair in pairs})
    if missing or extra:
        raise ValueError(
            f"{len(pairs)} pairs and {len(scores)} scores: {len(missing)} pairs have none ({', '.join(missing[:3])}), "
            f"{len(extra)} scores have no pair ({', '.join(extra[:3])})"
        )
    right = {pair.id: scores[pair.id][0] > scores[pair.id][1] for pair in pairs}
    present = {pair.category for pair in pairs}
    order = [c for c in (*CATEGORIES, *dict.fromkeys(GROUPS.values())) if c in present]
    order += sorted(present - set(order))
    return BenchResult(
        *_shares(pairs, right),
        categories={name: _shares([p for p in pairs if p.category == name], right) for name in order},
        ties=sum(scores[pair.id][0] == scores[pair.id][1] for pair in pairs),
        wrong=tuple(pair.id for pair in pairs if not right[pair.id]),
    )


def _shares(pairs: Sequence[Comparison], right: Mapping[str, bool]) -> tuple[Share, Share]:
    queries: dict[str, bool] = {}
    for pair in pairs:
        queries[pair.query] = queries.get(pair.query, True) and right[pair.id]
    return Share(sum(right[p.id] for p in pairs), len(pairs)), Share(sum(queries.values()), len(queries))
