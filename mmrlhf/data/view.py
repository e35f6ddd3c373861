"""`mmrlhf data view PATH`: the data as one HTML page, to be looked at before anything is trained on it.

Each group is a card: picture, prompt, and its responses side by side, best first, with ranks, scores, critiques, pairs
and margins. What was corrected is coloured: explicit segments where the data has them, else the words that differ
(as `segments` "paper" finds them) between the best response and each other one; the best is compared with the worst of
those closest to it in wording. The page is self-contained: pictures are small JPEG data addresses, nothing is fetched,
no script runs, and all text of the data is escaped.
"""

from __future__ import annotations

import base64
import difflib
import io
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mmrlhf.data.images import MAX_PIXELS, MissingFile, open_image, open_video
from mmrlhf.data.readers import GroupSet, read_groups, summary
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, PreferenceGroup, VideoRef
from mmrlhf.data.segments import changed_spans

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_ALIKE = 0.35  # below this similarity two answers are different texts, and marking words would colour everything
_MAX_WORDS = 3000

Piece = tuple[str, str]  # ("", "new" or "gone"), text


def view(
    path: str | Path,
    output: str | Path | None = None,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    limit: int = 100,
    image_size: int = 480,
    max_image_pixels: int = MAX_PIXELS,
) -> Path:
    """Write the page and return its path.

    Args:
        output: the page; by default beside `path`, with the ending .html.
        limit: groups shown, from the first.
        image_size: longest side of the embedded pictures, in pixels.
    Bad rows are left out (the page's head counts them). Raises what `read_groups` raises when nothing
    can be read, BadRow when no row is left.
    """
    for name, value in (("limit", limit), ("image_size", image_size)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    path = Path(path)
    target = Path(output) if output is not None else path.with_name(path.name + ".html")
    found = read_groups(path, format=format, root=root, on_bad_row="skip", max_bad_rows=1.0)
    if not found.groups:
        raise BadRow(str(path), f"none of its {found.rows:,} rows can be shown:\n{summary(found.bad_rows)}")
    page = render(found, title=path.name, limit=limit, image_size=image_size, max_image_pixels=max_image_pixels)
    beside = target.with_name(target.name + ".part")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, target)
    return target


def render(found: GroupSet, *, title: str, limit: int, image_size: int, max_image_pixels: int = MAX_PIXELS) -> str:
    """The page of a GroupSet as text."""
    import jinja2

    groups = found.groups
    pairs = [p for g in groups for p in g.preference_pairs()]
    facts = [
        (f"{len(groups):,}", "groups"),
        (f"{sum(len(g.responses) for g in groups):,}", "responses"),
        (f"{len(pairs):,}", "pairs"),
        (f"{sum(p.margin is not None for p in pairs):,}", "pairs with a margin"),
        (f"{len({r for g in groups for r in (*g.images, *g.videos)}):,}", "images"),
    ]
    if found.bad_rows:
        facts.append((f"{len(found.bad_rows):,}", "bad rows left out"))
    source = resources.files("mmrlhf.data").joinpath("view.html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    explicit = any(r.segments is not None for g in groups[:limit] for r in g.responses)
    return template.render(
        title=title,
        format=f"format {found.format}",
        facts=facts,
        groups=len(groups),
        shown=min(limit, len(groups)),
        legend="the segments of the data" if explicit else "the words that differ",
        cards=[_card(g, found.root, image_size, max_image_pixels) for g in groups[:limit]],
    )


def _card(group: PreferenceGroup, root: Path, image_size: int, max_pixels: int) -> dict[str, Any]:
    listed = group.preference_pairs()
    order = best_first(len(group.responses), listed)
    letter = {index: chr(ord("A") + place % 26) + "'" * (place // 26) for place, index in enumerate(order)}
    marked = mark_group(group, order)
    beaten = {p.worse for p in listed}
    answers = []
    for index in order:
        response = group.responses[index]
        tags = [f"rank {response.rank}"] if response.rank is not None else []
        tags += [f"score {response.score:g}"] if response.score is not None else []
        answers.append(
            {
                "letter": letter[index],
                "best": index not in beaten and any(p.better == index for p in listed),
                "tags": tags,
                "pieces": marked[index],
                "critique": response.critique,
            }
        )
    refs: tuple[ImageRef | VideoRef, ...] = (*group.images, *group.videos)
    turns = [{"role": m.role, "parts": m.content} for m in group.prompt]
    kinds = [p.type for p in group.prompt[0].content] if group.prompt else []
    return {
        "id": group.id,
        "source": group.source.rsplit("/", 1)[-1],
        "meta": list(group.meta.items())[:4],
        "media": [_media(ref, root, image_size, max_pixels) for ref in refs],
        "turns": turns,
        "leading": next((i for i, kind in enumerate(kinds) if kind == "text"), len(kinds)),
        "answers": answers,
        "pairs": [
            (f"{letter[p.better]} > {letter[p.worse]}", f"{p.margin:+.3g}" if p.margin is not None else "")
            for p in listed
        ],
    }


def best_first(count: int, pairs: Sequence[ListedPair]) -> list[int]:
    """Responses by how many more they beat than they lose to; equal ones in the data's order."""
    worth = [0] * count
    for pair in pairs:
        worth[pair.better] += 1
        worth[pair.worse] -= 1
    return sorted(range(count), key=lambda i: -worth[i])


def mark_group(group: PreferenceGroup, order: Sequence[int]) -> dict[int, list[Piece]]:
    """The text of each response in pieces, corrected ones named: "new" in the best response, "gone" in the others."""
    texts = [r.text for r in group.responses]
    marked: dict[int, list[Piece]] = {i: [("", text)] for i, text in enumerate(texts)}
    best = order[0]
    alike = [i for i in order[1:] if _similar(texts[best], texts[i])]
    for index in alike:
        marked[index], _ = mark_words(texts[index], texts[best])
    if alike:  # the best is shown against the one that is closest to it
        closest = max(alike, key=lambda i: difflib.SequenceMatcher(None, texts[i], texts[best]).quick_ratio())
        _, marked[best] = mark_words(texts[closest], texts[best])
    for index, response in enumerate(group.responses):
        if response.segments is not None:
            marked[index] = mark_spans(response.text, response.segments, "new" if index == best else "gone")
    return marked


def _similar(a: str, b: str) -> bool:
    words = _WORDS.findall(a), _WORDS.findall(b)
    if max(map(len, words)) > _MAX_WORDS:
        return False
    return difflib.SequenceMatcher(None, *words, autojunk=False).ratio() >= _ALIKE


def mark_words(rejected: str, chosen: str) -> tuple[list[Piece], list[Piece]]:
    """Both texts in pieces, words that differ marked "gone" and "new"."""
    a, b = _WORDS.findall(rejected), _WORDS.findall(chosen)
    spans = changed_spans(a, b)
    left = _bridge(a, [(i1, i2) for i1, i2, _, _ in spans])
    right = _bridge(b, [(j1, j2) for _, _, j1, j2 in spans])
    return _cut(a, left, "gone"), _cut(b, right, "new")


def _bridge(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Marked words with nothing but white space between them, as one."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if start == end:
            continue
        if joined and not "".join(words[joined[-1][1] : start]).strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _cut(words: Sequence[str], spans: Sequence[tuple[int, int]], kind: str) -> list[Piece]:
    pieces: list[Piece] = []
    at = 0
    for start, end in (*spans, (len(words), len(words))):
        pieces += [("", "".join(words[at:start])), (kind, "".join(words[start:end]))]
        at = end
    return [piece for piece in pieces if piece[1]]


def mark_spans(text: str, spans: Sequence[tuple[int, int]], kind: str) -> list[Piece]:
    """A text in pieces, the given [start, end) characters marked (spans may touch or overlap)."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return _cut(text, joined, kind)


def _media(ref: ImageRef | VideoRef, root: Path, size: int, max_pixels: int) -> dict[str, str]:
    """A picture as a small JPEG data address, or the reason why it cannot be shown."""
    name = ref.path or "embedded image"
    try:
        if isinstance(ref, VideoRef):
            image = open_video(ref, root, frames=1, max_pixels=max_pixels)[0]
            name += " (one frame)"
        else:
            image = open_image(ref, root, max_pixels=max_pixels)
    except MissingFile:
        return {"uri": "", "name": f"{name}: not found"}
    except (BadRow, ImportError) as error:
        return {"uri": "", "name": f"{name}: {error.reason if isinstance(error, BadRow) else error}"}
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    return {"uri": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), "name": name}
