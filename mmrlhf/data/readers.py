"""read_groups: preference data in any published format -> PreferenceGroups, every bad row accounted for.

    rows (rows.py)  ->  Record, by format (formats.py)  ->  gathered by prompt and images, here

Records with the same prompt and the same images become one group. Its responses are unique texts. Pairs that say the
same twice count once. Two rows that say opposite things cancel: both pairs go, and are counted (longer cycles stay).
A tie gives no pair; a group left without any pair is set aside and named, which is no error of the file's. A response
scored differently in two rows keeps each row's own margin. A ranking that meets other records of its prompt becomes
the pairs it implies. Ids are made unique ("x", "x~2"), or made from the content where the file has none.
Texts are held in memory. Images that the files carry inside are kept once each, still encoded: IN_MEMORY bytes of them
in memory, the rest in a temporary file (`spool`). `writers.unpack_images` makes a set that only names them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrlhf.data import advice
from mmrlhf.data.fields import Record
from mmrlhf.data.formats import COLUMNS, PARSERS, detect
from mmrlhf.data.rows import Row, iter_objects, iter_rows
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, PreferenceGroup, Response
from mmrlhf.data.spool import Spool

FORMATS = ("auto", *PARSERS)
_DETECT_ROWS = 32
IN_MEMORY = 64 * 2**20  # bytes of embedded images; a set of 12 GB would take as much in every process
_HOPELESS = 100_000  # bad rows after which reading stops in any case


class TooManyBadRows(ValueError):
    """More rows are bad than the cap allows; the message counts the reasons. `bad_rows` holds them all."""

    def __init__(self, message: str, bad_rows: list[BadRow]):
        super().__init__(message)
        self.bad_rows = bad_rows


@dataclass
class GroupSet:
    """What a file held. `rows` counts every row, good and bad."""

    groups: list[PreferenceGroup]
    bad_rows: list[BadRow]
    rows: int
    format: str
    root: Path
    without_pairs: list[str] = field(default_factory=list)  # sources of groups with only ties or contradictions
    contradictions: int = 0  # pairs that two rows order in opposite ways; both were dropped
    duplicate_pairs: int = 0  # pairs stated again; counted once
    tied_pairs: int = 0  # chosen/rejected rows marked as ties
    duplicate_ids: int = 0  # groups that share an id with another prompt; renamed "id~2"
    ignored_columns: dict[str, int] = field(default_factory=dict)  # column -> rows that filled it

    def __len__(self) -> int:
        return len(self.groups)


def read_groups(
    path: str | Path | Iterable[Mapping[str, Any]],
    *,
    format: str = "auto",
    root: str | Path | None = None,
    on_bad_row: str = "raise",
    max_bad_rows: float = 0.05,
) -> GroupSet:
    """Read a file, a folder, or rows in memory (such as a `datasets.Dataset`).

    Args:
        path: .jsonl, .json, .parquet, a folder of them, a `save_to_disk` folder, or an iterable of mappings.
        format: one of FORMATS; "auto" goes by what the first rows hold.
        root: images are looked up here; by default the folder that holds `path`.
        on_bad_row: "raise" stops at the first BadRow; "skip" collects them in `.bad_rows`.
        max_bad_rows: share of the rows that may be skipped; above it TooManyBadRows lists the reasons.
    Raises FileNotFoundError; BadRow, also for a container that is refused (pickle, script, archive) or holds no row of
    a known format; ValueError for a bad argument.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be raise or skip, got {on_bad_row!r}")
    if not 0.0 <= max_bad_rows <= 1.0:
        raise ValueError(f"max_bad_rows must be in [0, 1], got {max_bad_rows!r}")
    rows: Iterator[Row]
    if isinstance(path, (str, Path)):
        name, rows = str(path), iter_rows(path)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
    else:
        name, rows, folder = "rows", iter_objects(path), Path(".")
    if format == "auto":
        format, rows = _detect(rows, name)
    gatherer = Gatherer()
    bad: list[BadRow] = []
    count = 0
    for source, row in rows:
        count += 1
        problem = row if isinstance(row, BadRow) else _take(gatherer, format, row, source)
        if problem is None:
            continue
        if on_bad_row == "raise":
            raise problem
        bad.append(problem)
        if len(bad) > _HOPELESS:
            break
    check_cap(bad, count, max_bad_rows, what="rows", where=name)
    return gatherer.finish(bad_rows=bad, rows=count, format=format, root=Path(root) if root is not None else folder)


def _take(gatherer: Gatherer, format: str, row: dict[str, Any], source: str) -> BadRow | None:
    try:
        record = PARSERS[format](row)
        gatherer.add(record, source)
    except BadRow as error:
        return error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # a parser meets whatever types a file holds; only ValueError carries a sentence of ours
        reason = str(error) if isinstance(error, ValueError) else f"wrong types: {type(error).__name__}: {error}"
        return BadRow(source, reason)
    for key, value in row.items():
        if value is not None and key not in COLUMNS[format]:
            gatherer.ignored[str(key)] += 1
    return None


def _detect(rows: Iterator[Row], name: str) -> tuple[str, Iterator[Row]]:
    """The format most of the first rows have, and all rows again."""
    first = list(itertools.islice(rows, _DETECT_ROWS))
    found = Counter(kind for _, row in first if isinstance(row, dict) and (kind := detect(row)))
    if not found:
        problem = next((row for _, row in first if isinstance(row, BadRow)), None)
        if not first:
            raise BadRow(name, "no rows")
        if problem is not None and not any(isinstance(row, dict) for _, row in first):
            raise problem
        source, shown = next((source, row) for source, row in first if isinstance(row, dict))
        keys = ", ".join(sorted(map(str, shown))[:20]) or "(none)"
        hint = advice.for_columns(shown, name if Path(name).is_file() else source.rpartition(":")[0])
        unread = "" if problem is None else f" (another row cannot be read: {problem})"
        raise BadRow(source, f"no known format ({', '.join(PARSERS)}) has columns {keys}; {hint}{unread}")
    return found.most_common(1)[0][0], itertools.chain(first, rows)


def check_cap(bad: list[BadRow], total: int, cap: float, *, what: str, where: str) -> None:
    """Raise TooManyBadRows, reasons counted, if more than `cap` of `total` are bad."""
    if total and len(bad) > cap * total:
        raise TooManyBadRows(
            f"{where}: {len(bad)} of {total} {what} are bad ({len(bad) / total:.1%}, at most {cap:.1%} may be):\n"
            + summary(bad),
            bad,
        )


def summary(bad: list[BadRow], *, limit: int = 8) -> str:
    """The reasons, counted and with one example each, a line a reason."""
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        kinds.setdefault(re.sub(r"'[^']*'|\d+", "…", row.reason)[:120], []).append(row)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    lines = [f"  {len(rows)} x {rows[0].reason[:200]} (first: {rows[0].source})" for rows in ordered[:limit]]
    if len(ordered) > limit:
        lines.append(f"  and {len(ordered) - limit} other reasons")
    return "\n".join(lines)


@dataclass
class _Building:
    """A group while its records come in."""

    first: Record
    source: str
    responses: list[Response] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)  # text -> index
    edges: dict[tuple[int, int], float | None] = field(default_factory=dict)  # (better, worse) -> margin
    void: set[frozenset[int]] = field(default_factory=set)  # pairs stated both ways
    ties: set[frozenset[int]] = field(default_factory=set)  # pairs stated as tied; an order goes before
    edge_meta: dict[str, dict[str, str]] = field(default_factory=dict)
    ranked: bool = False


class Gatherer:
    """Gathers records into groups; see the module's text for what is done with doubles and contradictions."""

    def __init__(self) -> None:
        self.building: dict[tuple, _Building] = {}
        self.ignored: Counter[str] = Counter()
        self.images: dict[bytes, ImageRef] = {}  # digest -> the one copy
        self.embedded = 0  # bytes of those copies
        self.spool: Spool | None = None
        self.contradictions = self.duplicates = self.ties = 0

    def add(self, record: Record, source: str) -> None:
        """Take one record. Raises BadRow and changes nothing if it contradicts itself."""
        tied = [[record.responses[index].text for index in tie] for tie in record.ties]
        record.responses, record.pairs = _unique(record, source)
        texts = [response.text for response in record.responses]
        record.ties = [(texts.index(a), texts.index(b)) for a, b in tied if a != b]
        record.images = tuple(self._shared(ref) for ref in record.images)
        key = (record.prompt, tuple(_image_key(ref) for ref in record.images), record.videos)
        group = self.building.get(key)
        if group is None:
            group = self.building[key] = _Building(record, source, ranked=record.pairs is None)
            if group.ranked:
                group.responses = list(record.responses)
                return
        elif group.ranked or record.pairs is None:
            if group.ranked:
                group.ranked = False
                ranking, group.responses = _as_pairs(group.first, group.source), []
                self._add_pairs(group, group.first, ranking)
            if record.pairs is None:
                record.pairs = _as_pairs(record, source)
        if not record.pairs and len(record.responses) == 2:
            self.ties += 1
        self._add_pairs(group, record, record.pairs or [])

    def _add_pairs(self, group: _Building, record: Record, pairs: Iterable[ListedPair]) -> None:
        at = [self._response(group, response) for response in record.responses]
        group.ties |= {frozenset((at[i], at[j])) for i, j in record.ties}
        for pair in pairs:
            edge = (at[pair.better], at[pair.worse])
            both = frozenset(edge)
            scores = record.responses[pair.better].score, record.responses[pair.worse].score
            margin = pair.margin if scores[0] is None or scores[1] is None else scores[0] - scores[1]
            if both in group.void:
                self.contradictions += 1
            elif edge[::-1] in group.edges:
                del group.edges[edge[::-1]]
                group.void.add(both)
                self.contradictions += 1
            elif edge in group.edges:
                self.duplicates += 1
                if group.edges[edge] is None:
                    group.edges[edge] = margin
            else:
                group.edges[edge] = margin
            for name, value in record.edge_meta.items():
                group.edge_meta.setdefault(name, {})[f"{edge[0]}>{edge[1]}"] = value

    def _response(self, group: _Building, response: Response) -> int:
        known = group.index.get(response.text)
        if known is None:
            group.index[response.text] = len(group.responses)
            group.responses.append(response)
            return len(group.responses) - 1
        old = group.responses[known]
        group.responses[known] = dataclasses.replace(
            old,
            critique=old.critique or response.critique,
            segments=old.segments if old.segments is not None else response.segments,
            score=old.score if old.score == response.score else None,  # in doubt the pairs' own margins hold
            rank=None,
        )
        return known

    def _shared(self, ref: ImageRef) -> ImageRef:
        if ref.data is None:
            return ref
        digest = hashlib.sha256(ref.data).digest()
        known = self.images.get(digest)
        if known is None:
            self.embedded += len(ref.data)
            if self.embedded > IN_MEMORY:
                self.spool = self.spool or Spool()
                ref = ImageRef(stored=self.spool.add(ref.data, digest))
            known = self.images[digest] = ref
        return known

    def finish(self, **about: Any) -> GroupSet:
        groups: list[PreferenceGroup] = []
        without: list[str] = []
        seen: Counter[str] = Counter()
        doubled = 0
        taken = {b.first.id for b in self.building.values()}
        for key, building in self.building.items():
            group = _group(building, key)
            if not group.preference_pairs():
                without.append(building.source)
                continue
            seen[group.id] += 1
            if seen[group.id] > 1:
                doubled += 1
                name = group.id
                while (renamed := f"{name}~{seen[name]}") in taken:
                    seen[name] += 1
                taken.add(renamed)
                group = dataclasses.replace(group, id=renamed)
            groups.append(group)
        return GroupSet(
            groups=groups,
            without_pairs=without,
            contradictions=self.contradictions,
            duplicate_pairs=self.duplicates,
            tied_pairs=self.ties,
            duplicate_ids=doubled,
            ignored_columns=dict(self.ignored.most_common()),
            **about,
        )


def _unique(record: Record, source: str) -> tuple[list[Response], list[ListedPair] | None]:
    """The responses of a record without repeated texts, and its pairs renumbered; checks that it can be ranked."""
    kept: list[Response] = []
    at: list[int] = []
    for response in record.responses:
        same = next((i for i, r in enumerate(kept) if r.text == response.text), None)
        if same is None:
            same = len(kept)
            kept.append(response)
        elif (kept[same].rank, kept[same].score) != (response.rank, response.score):
            raise BadRow(source, "the same response is listed twice with different ranks or scores")
        at.append(same)
    if record.pairs is None:
        PreferenceGroup("", record.prompt, tuple(kept), source=source).preference_pairs()
        return kept, None
    pairs = [dataclasses.replace(p, better=at[p.better], worse=at[p.worse]) for p in record.pairs]
    if any(p.better == p.worse for p in pairs):
        raise BadRow(source, "a pair compares a response with itself")
    return kept, pairs


def _as_pairs(record: Record, source: str) -> list[ListedPair]:
    group = PreferenceGroup("", record.prompt, tuple(record.responses), source=source)
    return list(group.preference_pairs())


def _image_key(ref: ImageRef) -> object:
    return id(ref) if ref.path is None else ref.path  # embedded images were made one object by `_shared`


def _group(building: _Building, key: tuple) -> PreferenceGroup:
    record = building.first
    meta = dict(record.meta)
    for name, values in building.edge_meta.items():
        meta[name] = ", ".join(f"{edge}: {value}" for edge, value in values.items())
    pairs = None
    if not building.ranked:
        pairs = tuple(ListedPair(i, j, margin) for (i, j), margin in building.edges.items())
    ordered = {frozenset(edge) for edge in building.edges} | building.void
    return PreferenceGroup(
        id=record.id or _content_id(record),
        prompt=record.prompt,
        responses=tuple(building.responses),
        images=record.images,
        videos=record.videos,
        pairs=pairs,
        ties=tuple(sorted((min(tie), max(tie)) for tie in building.ties - ordered)),
        source=building.source,
        meta=meta,
    )


def _content_id(record: Record) -> str:
    digest = hashlib.sha256(repr((record.prompt, record.videos)).encode())
    for ref in record.images:
        embedded = ref.embedded()
        digest.update(embedded if embedded is not None else (ref.path or "").encode())
    return digest.hexdigest()[:16]
