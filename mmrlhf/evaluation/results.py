"""Figures of one model in one JSON file, as a table, and beside those of another.

    results.json   {"format": 1, "model", "weights", "created", "figures": [{"dimension", "benchmark", "metric",
                    "value", "better", "count", "note", "measurement"}], "details": {measurement: {...}}}

Shares are per cent here, as the papers print them. A figure that could not be had is null, and its note says why: it is
never left out silently, and never 0. `merge` lets several commands write into one file, a measurement each: one that is
made again takes the place of all the figures and details that it had.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmrlhf.train.files import write_json

FORMAT = 1
NOT_RUN = "not run"  # the metric of a benchmark that stands in a file without figures


@dataclass(frozen=True)
class Figure:
    dimension: str
    benchmark: str
    metric: str
    value: float | None
    better: str = "higher"  # higher | lower | "" where neither is (a length, a count)
    count: int | None = None  # answers, pairs or questions it is over
    note: str = ""
    measurement: str = ""  # its entry in the details, which figures are replaced with; empty: the benchmark is one

    @property
    def key(self) -> tuple[str, str, str]:
        return self.dimension, self.benchmark, self.metric

    def __post_init__(self):
        if self.better not in ("higher", "lower", ""):
            raise ValueError(f"better must be higher, lower or empty, got {self.better!r}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.benchmark} {self.metric} must be finite or None, got {self.value}")


@dataclass
class Results:
    model: str
    figures: list[Figure]
    details: dict[str, Any]
    created: str = ""
    weights: str = ""  # what tells the model's files from others of its name (`answers.model_fingerprint`), if known


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def save(results: Results, path: str | Path) -> Path:
    """Write a results file, whole or not at all; other measurements of the same model that it has stay, see `merge`.

    Raises ValueError if it holds another model's.
    """
    path = Path(path)
    if path.exists():
        results = merge(load(path), results)
    path.parent.mkdir(parents=True, exist_ok=True)
    created = results.created or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_json(
        path,
        {
            "format": FORMAT,
            "model": results.model,
            "weights": results.weights,
            "created": created,
            "figures": [asdict(figure) for figure in results.figures],
            "details": results.details,
        },
    )
    return path


def merge(old: Results, new: Results) -> Results:
    """The new figures, and the old ones of measurements that were not made again: never some of either.

    A measurement is known by its name; a figure without one (written by hand) counts for all of its benchmark. That a
    benchmark was not run is left out where it was. Raises ValueError where both are of one name but not of one model.
    """
    if old.model != new.model:
        raise ValueError(f"the results file is of {old.model!r}, the new figures of {new.model!r}: name another file")
    made = [figure for figure in new.figures if figure.metric != NOT_RUN]
    again, keys = {figure.measurement for figure in made if figure.measurement}, {figure.key for figure in made}
    again |= {figure.measurement for figure in old.figures if figure.measurement and figure.key in keys}
    whole = {figure.key[:2] for figure in made}  # benchmarks
    whole_by_new = {figure.key[:2] for figure in made if not figure.measurement}
    kept = [
        figure
        for figure in old.figures
        if figure.measurement not in again and figure.key[:2] not in (whole_by_new if figure.measurement else whole)
    ]
    if kept and old.weights and new.weights and old.weights != new.weights:
        raise ValueError(
            f"the results file has figures of other weights of {new.model!r}, such as {kept[0].benchmark}'s: name "
            "another output, or remove the file"
        )
    figures = {figure.key: figure for figure in (*kept, *new.figures)}
    run = {figure.key[:2] for figure in figures.values() if figure.metric != NOT_RUN}
    shown = [figure for figure in figures.values() if figure.metric != NOT_RUN or figure.key[:2] not in run]
    places: dict[tuple[str, str], int] = {}
    for figure in old.figures:
        places.setdefault(figure.key[:2], len(places))
    shown.sort(key=lambda figure: places.get(figure.key[:2], len(places)))  # a benchmark keeps its place
    details = {name: value for name, value in old.details.items() if name not in again}
    return Results(new.model, shown, {**details, **new.details}, new.created, new.weights or old.weights)


def load(path: str | Path) -> Results:
    """A results file, or the `results.json` of a folder. Raises ValueError for anything else."""
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        if value["format"] != FORMAT:
            raise ValueError(f"it has format {value['format']!r}, this version reads {FORMAT}")
        figures = [Figure(**entry) for entry in value["figures"]]
        return Results(value["model"], figures, value["details"], value["created"], value.get("weights", ""))
    except KeyError as error:
        raise ValueError(f"{path} is no results file of mmrlhf: it lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no results file of mmrlhf: {error}") from error


def table(results: Results) -> str:
    """The figures by dimension, a line each; ↓ marks those where lower is better."""
    rows = [("", "", "metric", "value", "over")]
    for figure in ordered(results.figures):
        over = "" if figure.count is None else str(figure.count)
        rows.append((figure.dimension, figure.benchmark, _metric(figure), _number(figure.value), over))
    notes = [f"  {f.benchmark}, {f.metric}: {f.note}" for f in ordered(results.figures) if f.note]
    return "\n".join([results.model, *_columns(rows), *(["", "Notes", *notes] if notes else [])])


def compare(before: Results, after: Results) -> str:
    """Both models' figures side by side, with the change and whether it is for the better.

    A figure that only one has stands with a dash; one over other questions than before is marked.
    """
    old, new = ({f.key: f for f in r.figures} for r in (before, after))
    both = {**old, **new}
    rows = [("", "", "metric", "before", "after", "change", "")]
    better = worse = 0
    for figure in ordered(both.values()):
        a, b = old.get(figure.key), new.get(figure.key)
        start, end = (f.value if f else None for f in (a, b))
        change, verdict = "", ""
        if start is not None and end is not None:
            difference = end - start
            change = f"{difference:+.2f}"
            if abs(difference) >= 5e-3 and figure.better:  # what the table shows as a change
                good = (difference > 0) == (figure.better == "higher")
                better, worse = better + good, worse + (not good)
                verdict = "better" if good else "worse"
            if a and b and a.count != b.count:
                verdict = f"{verdict} (over {a.count}, then {b.count})".strip()
        rows.append(
            (figure.dimension, figure.benchmark, _metric(figure), _number(start), _number(end), change, verdict)
        )
    head = [f"before  {before.model}", f"after   {after.model}", ""]
    tail = ["", f"{better} figures are better, {worse} worse", *_other_settings(before, after)]
    return "\n".join([*head, *_columns(rows), *tail])


def _other_settings(before: Results, after: Results) -> list[str]:
    """What was measured differently: another judge, another rule. Such figures say nothing of the models."""
    lines = []
    for name in before.details:
        old, new = (_settings(results.details.get(name)) for results in (before, after))
        if name in after.details:
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines += [f"  {name}, {key}: {old.get(key, '-')} before, {new.get(key, '-')} after" for key in changed]
    return ["NOT COMPARABLE where settings differ:", *lines] if lines else []


def _settings(details: Any) -> dict[str, Any]:
    found = details.get("settings") if isinstance(details, dict) else None
    return found if isinstance(found, dict) else {}


def ordered(figures: Iterable[Figure]) -> list[Figure]:
    """By dimension, then by benchmark, each in the order of first appearance."""
    figures = list(figures)
    places: dict[Any, int] = {}
    for figure in figures:
        for key in (figure.dimension, (figure.dimension, figure.benchmark)):
            places.setdefault(key, len(places))
    return sorted(figures, key=lambda f: (places[f.dimension], places[(f.dimension, f.benchmark)]))


def _metric(figure: Figure) -> str:
    return figure.metric + (" ↓" if figure.better == "lower" else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; a dimension or benchmark that the line above names too is left blank."""
    numbers = range(3, len(rows[0]))
    shown: list[list[str]] = []
    for index, row in enumerate(rows):
        line = list(row)
        above = rows[index - 1] if index else None
        if above is not None and row[0] == above[0]:
            line[0] = ""
            line[1] = "" if row[1] == above[1] else row[1]
        shown.append(line)
    widths = [max(len(line[column]) for line in shown) for column in range(len(rows[0]))]
    out = []
    for line in shown:
        cells = [
            text.rjust(width) if column in numbers and column < 6 else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    return out
