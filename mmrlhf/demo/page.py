"""The demo's own page: what changed, on pictures that no training saw.

One self-contained HTML file (no script, no address outside its folder; it links to the two runs' own reports beside
it). The pictures are chosen by a rule, not by their outcome: the first held-out ones on which the model erred before,
and the first on which it did not. Not covered: training curves, which the runs' reports have.
"""

from __future__ import annotations

import base64
import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrlhf.demo.language import list_kinds, mentions, wrong_spans
from mmrlhf.demo.world import Scene, draw

if TYPE_CHECKING:
    from mmrlhf.demo.pipeline import Result
    from mmrlhf.demo.preferences import PreferenceData

Pieces = list[tuple[str, str]]  # (text, class): class is "", "wrong", "gone" or "new"

# (field, heading, what is better)
PANELS = (
    ("response_hallucination", "Captions that name something absent", "less is better"),
    ("mention_hallucination", "Mentions that are absent", "less is better"),
    ("recall", "Objects found", "should not fall"),
)


def write_page(
    output: Path, summary: dict[str, Any], results: list[Result], scenes: list[Scene], data: PreferenceData
) -> Path:
    """Write `output/report.html` and return its path. `scenes` are those that the results' captions describe."""
    from jinja2 import Environment

    source = resources.files("mmrlhf.demo").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    by_name = {row["name"]: row for row in summary["results"]}
    html = environment.from_string(source).render(
        summary=summary,
        rows=summary["results"],
        before=by_name["base"],
        after=[by_name["rlhf_v"], by_name["mm_dpo"]],
        panels=[_panel(summary["results"], *panel) for panel in PANELS],
        cards=[
            _card(scenes[i], [r for r in results if r.name != "sft"], i)
            for i in choose(results[0], scenes, summary["plan"]["shown"])
        ],
        **_examples(data),
    )
    path = output / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def choose(before: Result, scenes: list[Scene], count: int) -> list[int]:
    """Which held-out pictures to show: the first two thirds of `count` where the model erred before, and the first
    third where it did not, in the order of the pictures."""
    erred = [i for i, scene in enumerate(scenes) if wrong_spans(before.captions[i], scene)]
    right = sorted(set(range(len(scenes))) - set(erred))
    wanted = 2 * count // 3
    return erred[:wanted] + right[: count - wanted]


def mark_wrong(text: str, scene: Scene) -> Pieces:
    """The text in pieces, objects that are not in the picture marked "wrong"."""
    pieces: Pieces = []
    at = 0
    for start, stop in wrong_spans(text, scene):
        pieces += [(text[at:start], ""), (text[start:stop], "wrong")]
        at = stop
    pieces.append((text[at:], ""))
    return [piece for piece in pieces if piece[0]]


def mark_changes(rejected: str, chosen: str) -> tuple[Pieces, Pieces]:
    """Both texts in pieces, word by word: what the correction took away is "gone", what it put there "new"."""
    import difflib
    import re

    left, right = (re.findall(r"\s*[\w]+|\s*[^\w\s]", text) for text in (rejected, chosen))
    gone: Pieces = []
    new: Pieces = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        changed = tag != "equal"
        _add(gone, "".join(left[a:b]), "gone" if changed else "")
        _add(new, "".join(right[c:d]), "new" if changed else "")
    return gone, new


def _add(pieces: Pieces, text: str, mark: str) -> None:
    """Add a piece; the space before a marked one is not marked."""
    bare = text.lstrip()
    if mark and bare != text:
        pieces.append((text[: len(text) - len(bare)], ""))
        text = bare
    if text:
        pieces.append((text, mark))


def _panel(rows: list[dict[str, Any]], field: str, heading: str, better: str) -> dict[str, Any]:
    """Bars on a scale that starts at 0; recall's ends at 1, the others' at their largest value and its error."""
    top = 1.0 if field == "recall" else max(row[field] + 2 * row["response_error"] for row in rows) or 1.0
    bars = []
    for row in rows:
        error = row["response_error"] if field == "response_hallucination" else 0.0
        low, high = max(0.0, row[field] - error), row[field] + error
        bars.append(
            {
                "name": row["name"],
                "label": row["label"],
                "value": row[field],
                "width": 100 * row[field] / top,
                "low": 100 * low / top,
                "span": 100 * (high - low) / top,
            }
        )
    return {"heading": heading, "better": better, "bars": bars}


def _card(scene: Scene, results: list[Result], index: int) -> dict[str, Any]:
    answers = []
    for result in results:
        text = result.captions[index]
        missed = [kind for kind in scene.kinds if kind not in mentions(text)]
        answers.append(
            {
                "name": result.name,
                "pieces": mark_wrong(text, scene),
                "missed": list_kinds(missed) if missed else "",
                "right": not missed and not wrong_spans(text, scene),
            }
        )
    return {"picture": picture_url(scene), "place": scene.place, "truth": list_kinds(scene.kinds), "answers": answers}


def picture_url(scene: Scene, *, scale: int = 4) -> str:
    """The scene, drawn larger than the model sees it, as a data URL."""
    file = io.BytesIO()
    draw(scene, scale=scale).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _examples(data: PreferenceData) -> dict[str, Any]:
    """The first answer corrected by taking away, the first corrected by replacing, and the first of the longest ranked
    lists, read back from the files that the recipes were trained on."""
    from mmrlhf.data.images import open_image
    from mmrlhf.data.readers import read_groups

    firsts: dict[bool, dict[str, Any]] = {}
    for group in read_groups(data.corrected, root=data.root).groups:
        pair = group.preference_pairs()[0]
        gone, new = mark_changes(group.responses[pair.worse].text, group.responses[pair.better].text)
        replaces = any(mark for _, mark in new)
        if replaces not in firsts:
            firsts[replaces] = {"group": group, "gone": gone, "new": new}
    ranked = max(read_groups(data.ranked, root=data.root).groups, key=lambda group: len(group.responses))

    def url(group) -> str:
        picture = open_image(group.images[0], data.root)
        file = io.BytesIO()
        picture.save(file, format="PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")

    return {
        "corrected": [example | {"picture": url(example["group"])} for example in firsts.values()],
        "ranked": {
            "picture": url(ranked),
            "answers": sorted(ranked.responses, key=lambda answer: -(answer.score or 0.0)),
        },
    }


def write_chart(results: list[Result], path: Path) -> None:
    """The three panels as a picture for other documents, 150 dots an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from mmrlhf.demo.pipeline import NAMES

    figure = Figure(figsize=(10, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PANELS), sharey=True)
    colours = {"base": "#9aa0ac", "rlhf_v": "#2b63c9", "mm_dpo": "#c2571a", "sft": "#cfd3da"}
    places = list(range(len(results)))[::-1]
    for axis, (field, heading, _) in zip(axes, PANELS, strict=True):
        values = [100 * getattr(result.figures, field) for result in results]
        errors = [100 * result.figures.response_error for result in results]
        axis.barh(
            places,
            values,
            xerr=errors if field == "response_hallucination" else None,
            color=[colours[result.name] for result in results],
            ecolor="#4b505a",
            height=0.66,
        )
        for place, value, error in zip(places, values, errors, strict=True):
            shift = error if field == "response_hallucination" else 0.0
            axis.text(value + shift, place, f" {value:.1f} %", va="center", fontsize=9)
        axis.set_title(heading, fontsize=10, loc="left")
        axis.set_xlim(0, 122 if field == "recall" else 1.35 * max(1e-9, *values))
        axis.set_yticks(places, [NAMES[result.name] for result in results])
        axis.set_xticks([])
        for side in ("top", "right", "bottom"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
