"""What to say to somebody whose file cannot be read as it is: which file was meant, what to unpack, what is missing.

Only sentences are made here. What is known of the published sets: MM-RLHF's download holds dpo_pairs.jsonl (its pairs),
data.jsonl (all labelled information, in columns that nobody has described) and long, short, mcq, safety and video as
.zip files, each of which unpacks to the folder that the paths in dpo_pairs.jsonl begin with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

PAIRS_FILE, LABELS_FILE = "dpo_pairs.jsonl", "data.jsonl"  # of MM-RLHF
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")
_LFS = b"version https://git-lfs"
_CONVERT = {
    **dict.fromkeys(
        (".csv", ".tsv", ".xlsx"), "save the table as JSON Lines: pandas' to_json(orient='records', lines=True)"
    ),
    **dict.fromkeys((".arrow", ".feather"), "name the folder that save_to_disk wrote, not the file in it"),
    ".txt": "a row is a JSON object; name the file .jsonl if its lines are that",
}
_LISTS = ("messages", "conversations", "images", "videos")  # of objects, in one row
_NEEDED = "a row needs chosen and rejected, or responses with scores or ranks"


def is_lfs_pointer(head: bytes) -> bool:
    return head.startswith(_LFS)


LFS = "a Git LFS pointer, not the file itself: run `git lfs pull` where it was cloned"


def for_ending(suffix: str) -> str:
    """What to do with a file of this ending, as the end of a sentence; "" if nothing is known."""
    return f"; {_CONVERT[suffix]}" if suffix in _CONVERT else ""


def for_columns(row: Mapping[str, Any], path: str) -> str:
    """What a row of no known format seems to be, and what to use instead."""
    names = {str(name) for name in row}
    lower = {name.lower().strip(): name for name in names}
    file = Path(path)
    if file.name == LABELS_FILE and (file.with_name(PAIRS_FILE).exists() or "answer" in names):
        where = file.with_name(PAIRS_FILE)
        there = str(where) if where.exists() else f"{PAIRS_FILE} of the same download"
        return (
            f"this is MM-RLHF's file of all labelled information, which nobody has described; its pairs are in {there}"
        )
    misspelt = [lower[name] for name in ("chosen", "rejected", "prompt") if name in lower and name not in names]
    if misspelt:
        return f"columns are written in lower case and without spaces around them, not {', '.join(map(repr, misspelt))}"
    inside = next((name for name, value in row.items() if _is_rows(value) and name not in _LISTS), None)
    if inside is not None and len(names) <= 3:
        return f"the rows lie in {inside!r}: store that list by itself"
    if "label" in names and ("completion" in names or "response" in names):
        return "rows with a label each (as for KTO) compare no two answers; " + _NEEDED
    one = next((name for name in ("chosen", "rejected") if name in names), None)
    if one is not None:
        return f"there is {one!r} and no {'rejected' if one == 'chosen' else 'chosen'!r}"
    if names & {"messages", "output", "answer", "response", "completion"}:
        return "rows with one answer each (as for fine-tuning) compare nothing; " + _NEEDED
    return _NEEDED


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value[:3])


def for_download(folder: Path) -> str | None:
    """Which file of MM-RLHF's download to name, if this is its folder."""
    if not ((folder / PAIRS_FILE).is_file() and (folder / LABELS_FILE).is_file()):
        return None
    return (
        f"MM-RLHF's download holds its pairs in {PAIRS_FILE} and other things in {LABELS_FILE}: "
        f"name {folder / PAIRS_FILE}" + _and_unpack(folder)
    )


def _and_unpack(folder: Path) -> str:
    packed = [p.name for p in _archives(folder) if not (folder / _stem(p)).is_dir()]
    return f", and unpack {', '.join(packed)} beside it" if packed else ""


def for_folder(folder: Path, readable: Sequence[str]) -> str:
    """What a folder without rows holds instead."""
    listed = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not listed:
        return "; it is empty"
    inner = [p for p in listed if p.is_dir() and any(q.suffix.lower() in readable for q in p.iterdir() if q.is_file())]
    if inner:
        return f"; name one of its folders that do: {', '.join(map(str, inner[:8]))}"
    endings = Counter(p.suffix.lower() or "no ending" for p in listed if p.is_file())
    there = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(4))
    return f"; there is {there}" if there else ""


def to_unpack(missing: Iterable[str], root: Path) -> list[str]:
    """For absent files, a line for each folder of them whose archive lies in the data root, and where it must go."""
    folders = Counter(path.replace("\\", "/").split("/")[0] for path in missing if "/" in path.replace("\\", "/"))
    packed = {_stem(path): path for path in _archives(root)} if root.is_dir() else {}
    lines = []
    for name, count in sorted(folders.items()):
        if name in packed:
            how = "is not unpacked" if not (root / name).is_dir() else "is unpacked in part"
            lines.append(
                f"{packed[name]} {how}: {count:,} files of it are missing; unpack it so that {root / name}/ holds them"
            )
    return lines


def _archives(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.lower().endswith(ARCHIVES) and p.is_file())


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
