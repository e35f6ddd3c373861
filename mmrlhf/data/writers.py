"""PreferenceGroups -> the published formats, so that what the library makes can be read by anything else (and by it).

Every file is written beside its place and renamed when whole. What a format cannot hold is an error, never left out:
pair formats take one user turn whose images come first, and lose scores and ranks by their nature.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from mmrlhf.data.fields import has_placeholder
from mmrlhf.data.images import container_of, image_bytes
from mmrlhf.data.schema import ImageRef, ListedPair, PreferenceGroup, Response


def write_dpo_pairs(groups: Iterable[PreferenceGroup], path: str | Path) -> int:
    """MM-RLHF's dpo_pairs.jsonl, a line a pair; critiques become chosen_reason and rejected_reason. Returns the pairs.

    Raises ValueError for what the format cannot hold: several turns, media after text, images without a path.
    """
    count = 0
    with _whole(path) as file:
        for group in groups:
            row: dict[str, Any] = {"id": group.id, **_media_paths(group)}
            row["prompt"] = _plain_prompt(group)
            for pair, better, worse in _pairs(group):
                line = {**row, "chosen": better.text, "rejected": worse.text}
                for key, response in (("chosen_reason", better), ("rejected_reason", worse)):
                    if response.critique is not None:
                        line[key] = response.critique
                if pair.margin is not None:
                    line["margin"] = pair.margin
                file.write(_json(line))
                count += 1
    return count


def write_ranked(groups: Iterable[PreferenceGroup], path: str | Path) -> int:
    """Our JSON Lines superset (format "mmrlhf"), a line a group, nothing lost. Returns the groups.

    Image bytes become data: addresses.
    """
    count = 0
    with _whole(path) as file:
        for group in groups:
            row: dict[str, Any] = {"id": group.id}
            if group.images:
                row["images"] = [r.path if r.path is not None else _data_uri(r) for r in group.images]
            if group.videos:
                row["videos"] = [v.path for v in group.videos]
            row["prompt"] = [{"role": m.role, "content": [_part(p) for p in m.content]} for m in group.prompt]
            if _is_plain(group):
                row["prompt"] = _plain_prompt(group)
            row["responses"] = [_response(r) for r in group.responses]
            if group.pairs is not None:
                row["pairs"] = [[p.better, p.worse] + ([] if p.margin is None else [p.margin]) for p in group.pairs]
            if group.ties:
                row["ties"] = [list(tie) for tie in group.ties]
            if group.meta:
                row["meta"] = group.meta
            file.write(_json(row))
            count += 1
    return count


def unpack_images(groups: Iterable[PreferenceGroup], folder: str | Path) -> list[PreferenceGroup]:
    """The groups with embedded images stored in `folder`, a file a distinct image, and referred to by name.

    Parquet sets carry their images inside, and every process that reads one copies them to a temporary file (12 GB for
    RLAIF-V). Unpacked once and written with `write_ranked(groups, folder / "data.jsonl")`, nothing is copied again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for group in groups:
        images = []
        for ref in group.images:
            data = ref.embedded()
            if data is not None:
                name = f"{hashlib.sha256(data).hexdigest()[:32]}.{_kind(data)}"
                if not (folder / name).exists():
                    with _beside(folder / name) as beside:
                        beside.write_bytes(data)
                ref = ImageRef(path=name)
            images.append(ref)
        out.append(dataclasses.replace(group, images=tuple(images)))
    return out


def _kind(data: bytes) -> str:
    return container_of(data) or "jpeg"


def write_rlhf_v_parquet(groups: Iterable[PreferenceGroup], path: str | Path, root: str | Path) -> int:
    """RLHF-V-Dataset's parquet, a row a pair, the images' bytes inside. Returns the pairs.

    `root` is where the images' paths lead. Raises ValueError for what the format cannot hold (it takes exactly one
    image), BadRow for an image that cannot be read.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    text = pyarrow.string()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    schema = pyarrow.schema(
        [
            ("ds_name", text),
            ("image", image),
            ("text", text),
            ("origin_dataset", text),
            ("origin_split", text),
            ("idx", pyarrow.int64()),
            ("image_path", text),
        ]
    )
    count, rows = 0, []
    with _beside(path) as beside, parquet.ParquetWriter(beside, schema) as writer:
        for group in groups:
            if len(group.images) != 1 or group.videos:
                raise ValueError(f"{group.id}: the RLHF-V format holds exactly one image a row and no video")
            data = image_bytes(group.images[0], root, source=group.source or group.id)
            for _, better, worse in _pairs(group):
                rows.append(_rlhf_v_row(group, data, better, worse, count))
                count += 1
            if len(rows) >= 64:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return count


def _rlhf_v_row(group: PreferenceGroup, data: bytes, better: Response, worse: Response, number: int) -> dict[str, Any]:
    text = {"question": _plain_prompt(group), "chosen": better.text, "rejected": worse.text}
    return {
        "ds_name": group.meta.get("ds_name", "mmrlhf"),
        "image": {"bytes": data, "path": None},
        "text": json.dumps(text, ensure_ascii=False),
        "origin_dataset": group.meta.get("origin_dataset", ""),
        "origin_split": group.meta.get("origin_split", "{}"),
        "idx": number,
        "image_path": group.images[0].path or "",
    }


def _pairs(group: PreferenceGroup) -> Iterator[tuple[ListedPair, Response, Response]]:
    for pair in group.preference_pairs():
        yield pair, group.responses[pair.better], group.responses[pair.worse]


def _is_plain(group: PreferenceGroup) -> bool:
    """One user turn: images, then videos, then one text without a placeholder, as `fields.user` builds it."""
    if len(group.prompt) != 1 or group.prompt[0].role != "user":
        return False
    kinds = [p.type for p in group.prompt[0].content]
    wanted = ["image"] * len(group.images) + ["video"] * len(group.videos) + ["text"]
    return kinds == wanted and not has_placeholder(group.prompt[0].content[-1].text)


def _plain_prompt(group: PreferenceGroup) -> str:
    if not _is_plain(group):
        raise ValueError(
            f"{group.id}: this format holds one user turn, media first, then one text without <image> or <video>; "
            "use write_ranked"
        )
    return group.prompt[0].content[-1].text


def _media_paths(group: PreferenceGroup) -> dict[str, Any]:
    if any(ref.path is None for ref in group.images):
        raise ValueError(f"{group.id}: this format holds images as paths; store the bytes in files first")
    paths = [ref.path for ref in group.images]
    out: dict[str, Any] = {}
    if paths:
        out["image"] = paths[0] if len(paths) == 1 else paths
    if len(group.videos) > 1:
        raise ValueError(f"{group.id}: this format holds one video, got {len(group.videos)}; use write_ranked")
    if group.videos:
        out["video"] = group.videos[0].path
    return out


def _response(response: Response) -> dict[str, Any]:
    out: dict[str, Any] = {"text": response.text}
    for key in ("score", "rank", "critique"):
        if getattr(response, key) is not None:
            out[key] = getattr(response, key)
    if response.segments is not None:
        out["segments"] = [list(s) for s in response.segments]
    return out


def _part(part) -> dict[str, str]:
    return {"type": "text", "text": part.text} if part.type == "text" else {"type": part.type}


def _data_uri(ref: ImageRef) -> str:
    data = ref.embedded()
    assert data is not None
    return f"data:image/{_kind(data)};base64," + base64.b64encode(data).decode()


def _json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


@contextmanager
def _beside(path: str | Path) -> Iterator[Path]:
    """A name to write to; it takes the place of `path` when all went well, and is removed otherwise."""
    path = Path(path)
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _whole(path: str | Path) -> Iterator[IO[str]]:
    """A text file that appears under its name only when it is whole."""
    with _beside(path) as beside, open(beside, "w", encoding="utf-8", newline="\n") as file:
        yield file
