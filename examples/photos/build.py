"""Build a small preference data set of real photographs: python examples/photos/build.py OUT

The photographs ship inside the scikit-image and scikit-learn wheels; nothing is downloaded. The texts stand in
texts.yaml beside this file, written by hand for each picture. OUT receives

    images/                one file a photograph, copied as it is, or scaled down to --max-side
    ranked.jsonl           one prompt with 3 to 5 ranked, scored and criticised responses a line   (format mmrlhf)
    dpo_pairs.jsonl        every pair of different rank of those lists, with reasons               (format of MM-RLHF)
    corrections.jsonl      answers and their minimal corrections, with the corrected spans         (format mmrlhf)
    rlhf_v.parquet         the same corrections, pictures inside                                   (format of RLHF-V)
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmrlhf.data.schema import ImageRef, Message, Part, PreferenceGroup, Response
from mmrlhf.data.writers import write_dpo_pairs, write_ranked, write_rlhf_v_parquet

TEXTS = Path(__file__).with_name("texts.yaml")
FOLDERS = {
    "skimage": ("data", "scikit-image"),
    "sklearn": ("datasets/images", "scikit-learn"),
}  # in the wheel, its name
CORRECTION = re.compile(r"\{([^{}|]*)\|([^{}|]*)\}")  # {wrong|right}, either side may be empty


def find_picture(picture: str) -> Path:
    """The file "PACKAGE/FILE" inside the installed package, found without importing it.

    Raises ModuleNotFoundError naming the package to install, FileNotFoundError where this version of the package does
    not ship the file (it is never fetched).
    """
    package, name = picture.split("/", 1)
    folder, distribution = FOLDERS[package]
    spec = util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the photographs come from {distribution}: pip install {distribution}", name=package)
    path = Path(spec.origin).parent / folder / name
    if not path.is_file():
        version = metadata.version(distribution)
        raise FileNotFoundError(
            f"{distribution} {version} has no {folder}/{name} in its wheel; "
            "every picture of texts.yaml is in scikit-image 0.24 to 0.26 and scikit-learn 1.5 to 1.9"
        )
    return path


def copy_picture(source: Path, folder: Path, name: str, max_side: int) -> str:
    """Put a picture into `folder` and return its file name. Byte for byte, unless a side is over `max_side` pixels."""
    target = folder / f"{name}{source.suffix}"
    with Image.open(source) as picture:
        if max(picture.size) <= max_side:
            shutil.copyfile(source, target)
        else:
            picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            picture.save(target, **({"quality": 92} if picture.format == "JPEG" or source.suffix == ".jpg" else {}))
    return target.name


def split_correction(text: str) -> tuple[Response, Response]:
    """A text with {wrong|right} marks as (rejected, chosen), each with the character spans that were corrected.

    A side that is empty leaves no span: an insertion has none in the rejected text, a deletion none in the chosen one.
    """
    sides: tuple[list[str], list[str]] = ([], [])
    spans: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    at = 0
    for mark in CORRECTION.finditer(text):
        for side, pieces in enumerate(sides):
            pieces.append(text[at : mark.start()])
            start = sum(map(len, pieces))
            pieces.append(mark.group(side + 1))
            if pieces[-1]:
                spans[side].append((start, start + len(pieces[-1])))
        at = mark.end()
    rejected, chosen = ("".join([*pieces, text[at:]]) for pieces in sides)
    if at == 0 or "{" in rejected or "}" in rejected:
        raise ValueError(f"no correction of the form {{wrong|right}}, or a broken one, in {text!r}")
    return Response(rejected, rank=2, segments=tuple(spans[0])), Response(chosen, rank=1, segments=tuple(spans[1]))


def _prompt(text: str) -> tuple[Message, ...]:
    return (Message("user", (Part("image"), Part("text", text))),)


def ranked_group(entry: dict[str, Any], image: str) -> PreferenceGroup:
    """The ranked list of a picture."""
    responses = tuple(
        Response(r["text"], score=float(r["score"]), rank=r["rank"], critique=r["critique"])
        for r in entry["ranked"]["responses"]
    )
    return PreferenceGroup(
        id=f"photos/{entry['id']}",
        prompt=_prompt(entry["ranked"]["prompt"]),
        responses=responses,
        images=(ImageRef(path=image),),
        source=f"texts.yaml:{entry['id']}",
    )


def correction_groups(entry: dict[str, Any], image: str) -> list[PreferenceGroup]:
    """The corrected answers of a picture, each a group of two: the chosen one first."""
    distribution = FOLDERS[entry["picture"].split("/")[0]][1]
    groups = []
    for number, correction in enumerate(entry["corrections"]):
        rejected, chosen = split_correction(correction["text"])
        groups.append(
            PreferenceGroup(
                id=f"photos/{entry['id']}/correction-{number}",
                prompt=_prompt(correction["prompt"]),
                responses=(chosen, rejected),
                images=(ImageRef(path=image),),
                source=f"texts.yaml:{entry['id']}",
                meta={
                    "ds_name": "mmrlhf-photos",
                    "origin_dataset": distribution,
                    "origin_split": json.dumps({"model": "hand-written", "type": correction["type"]}),
                    "image_path": image,
                },
            )
        )
    return groups


def build(output: Path, *, max_side: int = 768) -> dict[str, int]:
    """Write the data set into `output` (made if absent) and return its counts."""
    entries = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    ranked: list[PreferenceGroup] = []
    corrected: list[PreferenceGroup] = []
    for entry in entries:
        name = copy_picture(find_picture(entry["picture"]), images, entry["id"], max_side)
        ranked.append(ranked_group(entry, f"images/{name}"))
        corrected += correction_groups(entry, f"images/{name}")
    write_ranked(ranked, output / "ranked.jsonl")
    write_dpo_pairs(ranked, output / "dpo_pairs.jsonl")
    write_ranked(corrected, output / "corrections.jsonl")
    write_rlhf_v_parquet(corrected, output / "rlhf_v.parquet", output)
    return {
        "pictures": len(entries),
        "responses": sum(len(group.responses) for group in ranked),
        "pairs": sum(len(group.preference_pairs()) for group in ranked),
        "corrections": len(corrected),
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the photos data set from the pictures of two installed wheels.")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--max-side", type=int, default=768, help="longest side of a picture in pixels (default 768)")
    settings = parser.parse_args(words)
    if settings.max_side < 32:
        parser.error(f"--max-side must be 32 or more, got {settings.max_side}")
    counts = build(settings.output, max_side=settings.max_side)
    print(", ".join(f"{count} {name}" for name, count in counts.items()), "in", settings.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
