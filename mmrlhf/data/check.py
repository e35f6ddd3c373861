"""`mmrlhf data check PATH`: what a file holds, what of it can be used, and what a pair-by-pair trainer would repeat.

Reads everything, trains nothing. With a processor, every group is encoded as training would, and lengths are tokens.
Exit status: 0 every row can be used (image files that are merely absent are reported, but may be elsewhere),
1 rows or images that cannot be used, 2 nothing could be read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrlhf.data.advice import to_unpack
from mmrlhf.data.images import MAX_PIXELS, MissingFile, frame_names, open_image, open_video
from mmrlhf.data.readers import GroupSet, read_groups, summary
from mmrlhf.data.schema import PAIR_MODES, BadRow, ImageRef, PreferenceGroup, VideoRef

MAX_LISTED = 200  # lines of a list in the text; the report's fields hold them all


@dataclass(frozen=True)
class Spread:
    """Smallest, median, 95th percentile and largest of some whole numbers."""

    low: int
    median: int
    high95: int
    high: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread | None:
        if not values:
            return None
        ordered = sorted(values)
        at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
        return cls(ordered[0], at(0.5), at(0.95), ordered[-1])

    def __str__(self) -> str:
        return f"min {self.low:,}  median {self.median:,}  p95 {self.high95:,}  max {self.high:,}"


@dataclass
class Report:
    """What `check` found. Counts are of usable rows unless a name says otherwise."""

    path: str
    format: str = ""
    rows: int = 0
    groups: int = 0
    pairs: int = 0
    responses: int = 0  # unique texts, summed over the groups
    group_sizes: dict[int, int] = field(default_factory=dict)  # K -> groups
    prompt_chars: Spread | None = None
    response_chars: Spread | None = None
    prompt_tokens: Spread | None = None  # images included
    group_tokens: Spread | None = None
    ties: int = 0  # pairs of responses of equal level in ranked groups, and rows marked as ties
    margins: int = 0  # pairs with a reward margin
    contradicting_margins: int = 0  # pairs whose margin is negative: the worse response scores higher
    critiques: int = 0
    images: int = 0  # distinct images and videos
    image_sizes: Spread | None = None  # pixels
    largest_image: str = ""
    missing: list[str] = field(default_factory=list)  # absent files, "path (first used by file:line)"
    unpack: list[str] = field(default_factory=list)  # archives in the data root that hold absent files, a sentence each
    bad_images: list[BadRow] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)  # rows, and with a processor groups that cannot be encoded
    categories: dict[str, tuple[int, int]] = field(default_factory=dict)  # first folder of the path -> groups, pairs
    response_slots: int = 0  # responses a pair-by-pair trainer would run
    image_slots: int = 0  # images it would encode
    without_pairs: list[str] = field(default_factory=list)
    contradictions: int = 0
    duplicate_pairs: int = 0
    duplicate_ids: int = 0
    ignored_columns: dict[str, int] = field(default_factory=dict)
    error: str = ""  # why nothing could be read

    @property
    def status(self) -> int:
        """0 usable, 1 rows or images that cannot be used, 2 nothing could be read."""
        if self.error or not self.groups:
            return 2
        return int(bool(self.bad_rows or self.bad_images))

    def text(self) -> str:
        """The report as plain text."""
        return "\n".join(_lines(self))


def check(
    path: str | Path,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    processor: Any = None,
    pairs: str = "all",
    max_group_tokens: int = 8192,
    max_image_pixels: int = MAX_PIXELS,
    video_frames: int = 8,
) -> Report:
    """Read `path` and say what it holds. Never raises for what the file holds; see `Report.status`.

    Args:
        format, root: as for `read_groups`.
        processor: with one, every group is encoded with it and lengths are given in tokens.
        pairs: which pairs to count: "all", "adjacent" or "best_vs_rest", as training would have them.
        max_group_tokens, max_image_pixels, video_frames: as training would have them.
    Raises ValueError for `pairs` or `format` that is none of theirs, and for a chat template that no row can pass.
    """
    if pairs not in PAIR_MODES:
        raise ValueError(f"pairs must be one of {', '.join(PAIR_MODES)}, got {pairs!r}")
    report = Report(path=str(path))
    try:
        found = read_groups(path, format=format, root=root, on_bad_row="skip", max_bad_rows=1.0)
    except (BadRow, FileNotFoundError) as error:
        report.error = str(error)
        return report
    _count(report, found, pairs)
    usable = _look_at_images(report, found, max_image_pixels)
    usable = [group for group in usable if group.preference_pairs(pairs)]  # type: ignore[arg-type]
    if processor is not None:
        from mmrlhf.data.encode import Encoder

        encoder = Encoder(
            processor,
            root=found.root,
            pairs=pairs,  # type: ignore[arg-type]
            max_group_tokens=max_group_tokens,
            max_image_pixels=max_image_pixels,
            video_frames=video_frames,
        )
        _measure_tokens(report, usable, encoder)
    return report


def _count(report: Report, found: GroupSet, mode: str) -> None:
    for name in ("format", "rows", "without_pairs", "contradictions", "duplicate_pairs", "duplicate_ids"):
        setattr(report, name, getattr(found, name))
    report.bad_rows, report.ignored_columns, report.ties = list(found.bad_rows), found.ignored_columns, found.tied_pairs
    groups = found.groups
    report.groups = len(groups)
    report.group_sizes = dict(sorted(Counter(len(g.responses) for g in groups).items()))
    prompts = [sum(len(p.text) for m in g.prompt for p in m.content) for g in groups]
    report.prompt_chars = Spread.of(prompts)
    report.response_chars = Spread.of([len(r.text) for g in groups for r in g.responses])
    for group in groups:
        listed = group.preference_pairs(mode)  # type: ignore[arg-type]
        if not listed:
            report.bad_rows.append(BadRow(group.source, group.why_no_pairs(mode)))  # type: ignore[arg-type]
        media = len(group.images) + len(group.videos)
        report.pairs += len(listed)
        report.responses += len(group.responses)
        report.margins += sum(p.margin is not None for p in listed)
        report.contradicting_margins += sum(p.margin is not None and p.margin < 0 for p in listed)
        report.critiques += sum(r.critique is not None for r in group.responses)
        report.response_slots += 2 * len(listed)
        report.image_slots += 2 * len(listed) * media
        if group.pairs is None:
            size = len(group.responses)
            report.ties += size * (size - 1) // 2 - len(group.preference_pairs())
        category = category_of(group)
        if category:
            before = report.categories.get(category, (0, 0))
            report.categories[category] = (before[0] + 1, before[1] + len(listed))


def category_of(group: PreferenceGroup) -> str:
    """The first folder of the group's first image or video path: MM-RLHF's splits are told by nothing else."""
    paths = [r.path for r in group.images if r.path] + [v.path for v in group.videos]
    first = paths[0].replace("\\", "/").split("/") if paths else []
    return first[0] if len(first) > 1 else ""


def _look_at_images(report: Report, found: GroupSet, max_pixels: int) -> list[PreferenceGroup]:
    """Decode every distinct image once; the groups whose media are all there and whole."""
    verdict: dict[object, bool] = {}
    pixels: list[tuple[int, str]] = []
    usable = []
    for group in found.groups:
        fine = True
        refs: tuple[ImageRef | VideoRef, ...] = (*group.images, *group.videos)
        for ref in refs:
            key: object = ref if isinstance(ref, VideoRef) else ref.identity
            if key not in verdict:
                verdict[key] = _one_image(report, ref, found.root, group.source, max_pixels, pixels)
            fine &= verdict[key]
        if fine:
            usable.append(group)
    report.unpack = to_unpack([line.rpartition(" (first used by ")[0] for line in report.missing], found.root)
    report.images = len(verdict)
    report.image_sizes = Spread.of([count for count, _ in pixels])
    report.largest_image = max(pixels, default=(0, ""))[1]
    return usable


def _one_image(
    report: Report, ref: ImageRef | VideoRef, root: Path, source: str, max_pixels: int, pixels: list
) -> bool:
    try:
        if isinstance(ref, ImageRef):
            opened = [open_image(ref, root, max_pixels=max_pixels, source=source)]
        elif frame_names(ref, root, source=source) is None:
            opened = open_video(ref, root, frames=1, max_pixels=max_pixels, source=source)
        else:
            names = frame_names(ref, root, source=source) or []
            opened = [open_image(ImageRef(path=n), root, max_pixels=max_pixels, source=source) for n in names]
    except MissingFile:
        report.missing.append(f"{ref.path} (first used by {source})")
        return False
    except BadRow as error:
        report.bad_images.append(error)
        return False
    except ImportError as error:
        report.bad_images.append(BadRow(source, str(error)))
        return False
    pixels += [(image.width * image.height, f"{image.width}x{image.height}") for image in opened]
    return True


def _measure_tokens(report: Report, groups: Sequence[PreferenceGroup], encoder) -> None:
    prefixes, totals = [], []
    for group in groups:
        try:
            encoded = encoder.encode(group)
        except BadRow as error:
            report.bad_rows.append(error)
            continue
        prefixes.append(encoded.prefix_ids.numel())
        totals.append(encoded.num_tokens)
    report.prompt_tokens, report.group_tokens = Spread.of(prefixes), Spread.of(totals)


def _lines(report: Report):
    if report.error:
        yield f"{report.path}: cannot be read"
        yield f"  {report.error}"
        return
    yield f"{report.path}: format {report.format}, {report.rows:,} rows"
    if not report.groups:
        bad, without = len(report.bad_rows), len(report.without_pairs)
        yield f"  none of them can be used ({bad:,} bad, {without:,} without any pair)"
        yield from _bad_lines(report)
        return
    yield f"  {report.pairs:,} pairs in {report.groups:,} groups with {report.responses:,} unique responses"
    sizes = ", ".join(f"K={size}: {count:,}" for size, count in report.group_sizes.items())
    yield f"  responses a group    {sizes}"
    yield f"  prompt characters    {report.prompt_chars}"
    yield f"  response characters  {report.response_chars}"
    if report.group_tokens is not None:
        yield f"  prompt tokens        {report.prompt_tokens}"
        yield f"  group tokens         {report.group_tokens}"
    yield f"  ties {report.ties:,}, pairs with a margin {report.margins:,}, critiques {report.critiques:,}"
    for name, (groups, pairs) in sorted(report.categories.items()):
        yield f"  {'category ' + name:<20} {groups:,} groups, {pairs:,} pairs"
    yield from _image_lines(report)
    if report.responses and report.pairs:
        saved = report.response_slots / report.responses
        unique = f"{report.responses:,} unique ({saved:.1f}x)"
        yield f"  pair by pair         {report.response_slots:,} responses for {unique}"
        if report.images:
            twice = report.image_slots / report.images
            yield f"{'':23}{report.image_slots:,} image encodings for {report.images:,} images ({twice:.1f}x)"
    for name, what in (
        ("contradictions", "pairs ordered both ways (dropped)"),
        ("contradicting_margins", "pairs whose scores say the opposite (they train as they are ordered)"),
        ("duplicate_pairs", "pairs stated again (counted once)"),
        ("duplicate_ids", "ids used for another prompt (renamed)"),
    ):
        if getattr(report, name):
            yield f"  {getattr(report, name):,} {what}"
    if report.without_pairs:
        yield f"  {len(report.without_pairs):,} groups without any pair (ties or contradictions only), left out"
    if report.ignored_columns:
        columns = ", ".join(f"{name} ({count:,})" for name, count in report.ignored_columns.items())
        yield f"  columns not read: {columns}"
    yield from _bad_lines(report)
    if report.status:
        yield "  some of it cannot be used: see above"
    elif report.missing:
        yield f"  every row is sound; {len(report.missing):,} images or videos are missing"
    else:
        yield "  every row can be used"


def _bad_lines(report: Report):
    yield from _listing("bad rows", [str(row) for row in report.bad_rows])
    if len(report.bad_rows) > 1:
        yield "  reasons"
        yield from ("  " + line for line in summary(report.bad_rows).splitlines())


def _image_lines(report: Report):
    if not report.images:
        yield "  no images"
        return
    there = report.images - len(report.missing) - len(report.bad_images)
    yield (
        f"  images and videos    {report.images:,} distinct: {there:,} fine, {len(report.missing):,} missing, "
        f"{len(report.bad_images):,} bad"
    )
    if report.image_sizes is not None:
        yield f"  pixels               {report.image_sizes} ({report.largest_image})"
    yield from (f"  {line}" for line in report.unpack)
    if report.missing and not there:
        how = "" if report.unpack else "; name their folder with --root"
        yield f"  none of the images is here (first: {report.missing[0]}){how}"
    else:
        yield from _listing("missing images", report.missing)
    yield from _listing("bad images", [str(row) for row in report.bad_images])


def _listing(title: str, items: Sequence[str]):
    if not items:
        return
    yield f"  {len(items):,} {title}"
    yield from (f"    {item}" for item in items[:MAX_LISTED])
    if len(items) > MAX_LISTED:
        yield f"    and {len(items) - MAX_LISTED:,} more"
