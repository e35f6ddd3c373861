"""One self-contained HTML page about a training run, read from its folder alone.

    config.yaml, run.json, metrics.jsonl, samples.jsonl, images/  ->  report.html

The page carries everything it shows: curves as SVG whose colours are CSS variables (so they follow the reader's light
or dark theme), pictures as data URLs, no script and no address outside itself. What a folder lacks (a killed run, no
samples, a half-written line) is said on the page and never stops it. User text reaches the page only through the
template's autoescape; a picture is read only from inside the folder.

Not covered: following a run while it trains (write the page again), comparing runs, checkpoints.
"""

from __future__ import annotations

import base64
import difflib
import importlib
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mmrlhf._report.curves import column, duration, number, panels, short

MAX_SAMPLES = 64  # pictures are embedded: 64 at about 60 kB keep the page under 5 MB
IMAGE_SIDE = 640  # longest side of an embedded picture, pixels
IMAGE_PIXELS = 100_000_000  # a picture that claims more is not decoded
MAX_BAD_ROWS = 50  # skipped rows named on the page; run.json has them all
DIFF_WORDS = 2000  # texts longer than this are shown without word differences (difflib is quadratic)

_PIECE = re.compile(r"\s*\w[\w'’-]*|\s*[^\w\s]|\s+$")  # a word, a mark, or the space at the end


@dataclass
class RunFolder:
    """What could be read of a run folder, and `notes` on what could not."""

    path: Path
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path.

    Anything may be missing from the folder; the page then says what is. Raises NotADirectoryError if there is no such
    folder, ImportError naming the extra if matplotlib or jinja2 is not installed.
    """
    run_folder = Path(run_folder)
    if not run_folder.is_dir():
        raise NotADirectoryError(f"run_folder must be the folder of a training run, got {str(run_folder)!r}")
    for module in ("matplotlib", "jinja2"):
        _need(module)
    html = _render(read_run(run_folder))
    target = run_folder / "report.html"
    handle, temporary = tempfile.mkstemp(dir=run_folder, prefix=".report-", suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"the report needs {module}: pip install mmrlhf[report]") from error


def read_run(folder: Path) -> RunFolder:
    """Read a run folder as far as it goes. Unreadable files and lines become notes."""
    found = RunFolder(folder)
    text = _read_text(folder / "config.yaml", found.notes)
    found.config_text = text or ""
    if text:
        import yaml

        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError:
            config = None
        if isinstance(config, dict):
            found.config = config
        else:
            found.notes.append("config.yaml is not a YAML mapping; it is shown as it is.")
    text = _read_text(folder / "run.json", found.notes)
    if text is not None:
        try:
            run = json.loads(text)
        except ValueError:
            run = None
        if isinstance(run, dict):
            found.run = run
            if run.get("status") == "running":
                found.notes.append("run.json says running: the run goes on, or was killed without a word.")
        else:
            found.notes.append("run.json could not be read; the run was perhaps killed while it was written.")
    by_step: dict[float, dict[str, Any]] = {}
    for row in _read_lines(folder / "metrics.jsonl", found.notes):
        step = number(row.get("step"))
        if math.isfinite(step):
            by_step[step] = row  # a resumed run logs some steps again: the later line is the one that counted
        else:
            found.notes.append("metrics.jsonl: a line without a step number was left out.")
    found.steps = [by_step[step] for step in sorted(by_step)]
    if not found.steps:
        found.notes.append("No step was logged, so there are no curves.")
    found.samples = list(_read_lines(folder / "samples.jsonl", found.notes))
    if len(found.samples) > MAX_SAMPLES:
        found.notes.append(f"{len(found.samples)} samples were written; the first {MAX_SAMPLES} are shown.")
        del found.samples[MAX_SAMPLES:]
    return found


def _read_text(path: Path, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"could not be read ({error.strerror})"
        notes.append(f"{path.name} {reason}.")
        return None


def _read_lines(path: Path, notes: list[str]) -> Iterable[dict[str, Any]]:
    """The JSON objects of a JSON-lines file; lines that are none are counted in the notes."""
    text = _read_text(path, notes)
    if text is None:
        return
    lines = text.split("\n")
    bad = []
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            bad.append(at)
    if bad == [len(lines)]:
        notes.append(f"{path.name}: the last line was cut off while it was written, and is left out.")
    elif bad:
        shown = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        notes.append(f"{path.name}: {len(bad)} unreadable lines are left out (line {shown}).")


def _words(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Both texts in pieces (text, differs), by words and punctuation marks."""
    a, b = _PIECE.findall(before), _PIECE.findall(after)
    if max(len(a), len(b)) > DIFF_WORDS:
        return [(before, False)], [(after, False)]
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    matcher = difflib.SequenceMatcher(None, [w.strip() for w in a], [w.strip() for w in b], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        for pieces, words in ((left, a[i:j]), (right, b[k:m])):
            if words:
                text = "".join(words)
                space = text[: len(text) - len(text.lstrip())]  # not coloured: it would hang before the first word
                pieces.extend([(space, False)] * bool(space) + [(text.lstrip(), tag != "equal")])
    return left, right


def _picture(folder: Path, relative: Any) -> tuple[dict[str, Any] | None, str]:
    """A picture of the run folder as a data URL no larger than IMAGE_SIDE, or the reason why there is none."""
    if not isinstance(relative, str) or not relative:
        return None, "no picture"
    path = (folder / relative).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None, "the picture lies outside the run folder and was not read"
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "GIF", "BMP")) as image:
            if image.width * image.height > IMAGE_PIXELS:
                return None, f"the picture is too large to show ({image.width} × {image.height})"
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError):
        return None, f"the picture {relative} could not be read"
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    kind = "png" if max(small.size) <= 256 else "jpeg"  # small pictures are drawings or thumbnails: keep them exact
    buffer = io.BytesIO()
    small.save(buffer, kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    url = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"url": url, "width": small.width, "height": small.height, "tiny": max(small.size) <= 256}, ""


def _sample(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """One line of samples.jsonl as the template shows it."""
    before, after = (row.get(side) for side in ("before", "after"))
    before, after = (text if isinstance(text, str) else None for text in (before, after))
    if before is None or after is None:  # one side alone has no differences to mark
        left, right = ([(text, False)] if text else [] for text in (before, after))
    else:
        left, right = _words(before, after)
    picture, reason = _picture(folder, row.get("image"))
    given = row.get("responses")
    responses = [r for r in (given if isinstance(given, list) else []) if isinstance(r, dict)]
    scores = [number(r.get("score")) for r in responses]
    finite = [s for s in scores if math.isfinite(s)]
    low, high = (min(0.0, *finite), max(finite)) if finite else (0.0, 0.0)
    for response, score in zip(responses, scores, strict=True):
        response["shown"] = short(score) if math.isfinite(score) else ""
        response["share"] = round(100 * (score - low) / (high - low)) if math.isfinite(score) and high > low else None
    responses.sort(key=lambda r: (_rank(r), -number(r.get("score")) if r["shown"] else 0.0))
    sides = [
        {"name": "Before", "text": left if before is not None else None, "mark": "gone"},
        {"name": "After", "text": right if after is not None else None, "mark": "new"},
    ]
    same = before is not None and before == after
    return {**row, "picture": picture, "no_picture": reason, "sides": sides, "same": same, "responses": responses}


def _rank(response: dict[str, Any]) -> float:
    rank = number(response.get("rank"))
    return rank if math.isfinite(rank) else math.inf


def _tiles(found: RunFolder) -> list[dict[str, str]]:
    """The figures at the top: what changed from the first tenth of the steps to the last, and what it took."""
    steps = found.steps
    tiles = [{"label": "steps", "value": short(number(steps[-1].get("step"))) if steps else "0", "was": ""}]
    share = max(len(steps) // 10, 1)
    for key, label in (("loss", "loss"), ("rewards/accuracies", "accuracy"), ("rewards/margins", "reward margin")):
        values = column(steps, key)
        values = values[~np.isnan(values)]
        if len(values):
            first, last = short(float(values[:share].mean())), short(float(values[-share:].mean()))
            tiles.append({"label": label, "value": last, "was": f"from {first}" if len(values) > 1 else ""})
    tokens, seconds = (np.nansum(column(steps, key)) for key in ("tokens", "seconds"))
    if tokens > 0:
        rate = f"{short(tokens / seconds)} a second" if seconds > 0 else ""
        tiles.append({"label": "tokens", "value": short(tokens), "was": rate})
    wall = next((number(found.run[key]) for key in ("wall_seconds", "seconds", "wall") if key in found.run), math.nan)
    if math.isfinite(wall):
        tiles.append({"label": "wall time", "value": duration(wall), "was": ""})
    return tiles


def _about(found: RunFolder) -> list[str]:
    """The line under the name: the model, what it was trained on, and how much of that was left out."""
    parts = []
    trained, asked = (m if isinstance(m, dict) else {} for m in (found.run.get("model"), found.config.get("model")))
    name = trained.get("path") or asked.get("path") or trained.get("class")  # a model given in memory has no path
    parts += [name] if isinstance(name, str) else []
    for key in ("groups", "pairs"):
        count = _find(found.run, key)
        parts += [f"{short(count)} {key if count != 1 else key[:-1]}"] if math.isfinite(count) else []
    left_out = sum(block["count"] for block in _bad_rows(found.run))
    return [*parts, f"{left_out} left out"] if left_out else parts


def _find(run: dict[str, Any], key: str) -> float:
    """A count by its name, at the top of run.json or in a mapping below it; NaN if it is nowhere."""
    inner = [_find(value, key) for value in run.values() if isinstance(value, dict)]
    return next((value for value in (number(run.get(key)), *inner) if math.isfinite(value)), math.nan)


def _status(found: RunFolder) -> dict[str, str]:
    """The word in the header and how it is coloured."""
    word = found.run.get("status")
    if not isinstance(word, str) or not word:
        return {"word": "no status recorded", "mood": "warn"}
    mood = "good" if word in ("finished", "done", "complete") else "bad" if word in ("failed", "error") else "warn"
    return {"word": word, "mood": mood}


def _facts(found: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """run.json as titled lists of (name, value): a list for the plain entries, one for each mapping in it."""
    plain: list[tuple[str, str]] = []
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    for key, value in found.run.items():
        if key in ("notes", "error"):  # sentences, which have their own places
            continue
        if isinstance(value, dict):
            rows = list(_flat(value))
            sections += [(_title(key), rows)] if rows else []
        else:
            plain += list(_flat({key: value}))
    return [("Run", plain), *sections] if plain else sections


def _flat(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        name = f"{prefix}{_title(key, first=not prefix).lower()}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name} · ")
        elif isinstance(value, list):
            if all(isinstance(item, str | int | float) for item in value) and 0 < len(value) <= 8:
                yield name, ", ".join(map(str, value))
        elif isinstance(value, float):
            seconds = key.endswith("seconds")
            yield name.removesuffix(" seconds") if seconds else name, duration(value) if seconds else f"{value:.6g}"
        elif isinstance(value, bool):
            yield name, "yes" if value else "no"
        elif value is not None and value != "":
            yield name, f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def _title(key: str, *, first: bool = True) -> str:
    words = str(key).replace("_", " ").strip()
    return words[:1].upper() + words[1:] if first else words


def _bad_rows(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Every list of {source, reason} in run.json, wherever it stands: rows skipped and groups dropped."""
    found: list[dict[str, Any]] = []
    for key, value in run.items():
        if isinstance(value, dict):
            found += _bad_rows(value)
        elif isinstance(value, list) and value and all(isinstance(item, dict) and "reason" in item for item in value):
            rows = [(str(item.get("source", item.get("id", ""))), str(item["reason"])) for item in value]
            found.append({"title": _title(key), "count": len(rows), "rows": rows[:MAX_BAD_ROWS]})
    return found


def _render(found: RunFolder) -> str:
    """The page. Everything but the SVG drawn here goes through autoescape."""
    import jinja2
    from markupsafe import Markup

    page = (resources.files("mmrlhf") / "_report" / "page.html").read_text(encoding="utf-8")
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(autoescape=True, **options)
    return environment.from_string(page).render(
        name=found.path.resolve().name,
        recipe=str(found.config.get("recipe") or found.run.get("recipe") or ""),
        status=_status(found),
        about=_about(found),
        tiles=_tiles(found),
        facts=_facts(found),
        error=str(found.run.get("error") or ""),
        said=[str(note) for note in said] if isinstance(said := found.run.get("notes"), list) else [],
        bad_rows=_bad_rows(found.run),
        panels=[{**panel, "svg": Markup(panel["svg"])} for panel in panels(found.steps)],
        samples=[_sample(found.path, row) for row in found.samples],
        notes=found.notes,
        config=found.config_text,
    )
