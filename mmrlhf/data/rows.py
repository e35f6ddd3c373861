"""Containers: a file or folder -> rows, one at a time, each with where it came from. Nothing here knows a format.

JSON Lines is read line by line with a cap on the length of a line, JSON arrays whole below a cap, parquet by row group
and record batch, `datasets.save_to_disk` folders straight from their Arrow files (no `datasets` import, no image is
decoded here). A row that cannot be read is a BadRow in the stream, not the end of it.
Not read, because opening them can run code or unpack outside: pickles, torch files, loading scripts, archives.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mmrlhf.data import advice
from mmrlhf.data.images import container_of
from mmrlhf.data.schema import BadRow

Row = tuple[str, "dict[str, Any] | BadRow"]  # "file:line" or "file:row N", and what is there

MAX_LINE = 16 * 2**20  # bytes of a JSON line; a longer one is skipped without being held
MAX_JSON = 512 * 2**20  # bytes of a .json array, which is held whole
ROWS_AT_ONCE = 64  # rows of parquet or Arrow held at once: images of 1 MiB come to 64 MiB

REFUSED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz"), "pickles can run code"),
    **dict.fromkeys((".py", ".sh", ".ipynb"), "loading scripts are code"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst"), "unpack archives first"),
}
READABLE = (".jsonl", ".ndjson", ".json", ".parquet")
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "config.json")  # describe data that lies beside them
_MAGIC = ((b"PK\x03\x04", "a zip archive"), (b"\x1f\x8b", "a gzip file"), (b"\x80\x02", "a pickle"))


def iter_rows(path: str | Path) -> Iterator[Row]:
    """Rows of a .jsonl, .json or .parquet file, of a folder of them (by name), or of a save_to_disk folder.

    Raises FileNotFoundError, and BadRow for a container that is refused or is not what its name says.
    """
    if not str(path):
        raise FileNotFoundError("the path of the data is empty")
    path = Path(path)
    if path.is_dir():
        yield from _iter_folder(path)
        return
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    suffix = path.suffix.lower()
    if suffix in REFUSED:
        raise BadRow(str(path), f"{suffix} files are not read: {REFUSED[suffix]}")
    if suffix not in READABLE:
        wanted = f"a data file must end in {', '.join(READABLE)}, got {suffix or 'no ending'!r}"
        raise BadRow(str(path), wanted + advice.for_ending(suffix))
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadRow(str(path), "not a regular file")
    with open(path, "rb") as file:
        head = file.read(64)
        if advice.is_lfs_pointer(head):
            raise BadRow(str(path), advice.LFS)
        if suffix == ".parquet":
            yield from _iter_parquet(path)
            return
        for magic, name in _MAGIC:
            if head.startswith(magic):
                raise BadRow(str(path), f"named {suffix}, but it is {name}, which is not read")
        file.seek(0)
        begins = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        if begins.startswith((b"{\n", b"{\r")) and begins[1:].lstrip().startswith(b'"'):
            raise BadRow(
                str(path), "one JSON object over several lines; store a row a line, or a list of rows as .json"
            )
        if suffix == ".json" and begins.startswith(b"["):
            yield from _iter_json_array(path, file)
        elif begins.startswith(b"[") and begins[1:].lstrip()[:1] in (b"{", b""):
            raise BadRow(str(path), f"named {suffix}, but it is one JSON list of rows: name it .json")
        else:
            yield from _iter_lines(str(path), file)


def iter_objects(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows already in memory: a list of dicts, or a `datasets.Dataset`, whose images are taken as they are stored.

    What is not stored as bytes in one of `images.FORMATS` (a path, a TIFF) comes as the PIL image `datasets` makes.
    """
    for number, row in enumerate(_undecoded(rows) if _has_stored_images(rows) else rows):
        source = f"row {number}"
        yield source, dict(row) if isinstance(row, Mapping) else BadRow(source, f"must be a mapping, got {_type(row)}")


_IMAGE_COLUMNS = ("image", "images")


def _has_stored_images(rows: Any) -> bool:
    """Whether this is a `datasets.Dataset` with image columns, and no transform of the user's own makes its rows."""
    asked = ("column_names", "format", "select_columns", "remove_columns", "with_format", "__getitem__", "__len__")
    if not all(hasattr(rows, name) for name in asked) or rows.format["type"] == "custom":
        return False
    return any(name in _IMAGE_COLUMNS for name in rows.column_names)


def _undecoded(dataset: Any) -> Iterator[dict[str, Any]]:
    """Its rows; decoding a photograph and encoding it again without loss costs 100 ms a megapixel, reading it none."""
    columns = [name for name in _IMAGE_COLUMNS if name in dataset.column_names]
    stored = dataset.select_columns(columns).with_format("arrow")
    others = dataset.remove_columns(columns)
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        pictures = stored[start : start + ROWS_AT_ONCE].to_pylist()
        for number, row in enumerate(pictures, start):
            if all(_usable(item) for value in row.values() for item in _items(value)):
                yield {**(others[number] if others.column_names else {}), **row}
            else:
                yield dataset[number]


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _usable(item: Any) -> bool:
    """Whether a stored image can go on as it is: bytes in a format that is opened, a string, or none at all."""
    if not isinstance(item, Mapping) or set(item) != {"bytes", "path"}:
        return True
    return item["bytes"] is not None and container_of(item["bytes"]) is not None


def _iter_folder(folder: Path) -> Iterator[Row]:
    if (folder / "dataset_dict.json").exists():
        splits = sorted(p.parent.name for p in folder.glob("*/state.json"))
        raise BadRow(
            str(folder), f"a DatasetDict: name one of its splits, {', '.join(f'{folder}/{s}' for s in splits)}"
        )
    if (folder / "state.json").exists():
        yield from _iter_save_to_disk(folder)
        return
    meant = advice.for_download(folder)
    if meant is not None:
        raise BadRow(str(folder), meant)
    listed = sorted(folder.iterdir())
    names = [p for p in listed if p.suffix.lower() in READABLE and p.is_file() and p.name not in _NOT_DATA]
    for suffix in (".parquet", ".jsonl", ".ndjson", ".json"):
        files = [p for p in names if p.suffix.lower() == suffix]
        if files:
            for file in files:
                yield from iter_rows(file)
            return
    refused = sorted({p.suffix.lower() for p in listed} & set(REFUSED))
    why = f"; {', '.join(refused)} are not read" if refused else ""
    why += advice.for_folder(folder, READABLE)
    raise BadRow(str(folder), f"the folder holds no {', '.join(READABLE)} file and is no save_to_disk folder{why}")


def _iter_lines(name: str, file: BinaryIO) -> Iterator[Row]:
    number = 0
    while True:
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        number += 1
        source = f"{name}:{number}"
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(2**20)):
                size += len(line)
            yield source, BadRow(source, f"a line of {size} bytes, at most {MAX_LINE} are accepted")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield source, parse_json(line.rstrip(), source)


def parse_json(line: bytes, source: str) -> dict[str, Any] | BadRow:
    """One JSON object, strictly: UTF-8, no NaN or Infinity, nesting within Python's limit; else the BadRow."""

    def no_constant(word: str):
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(line.decode("utf-8"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        return BadRow(source, f"not UTF-8: {error.reason} at byte {error.start}")
    except RecursionError:
        return BadRow(source, "nested too deeply")
    except ValueError as error:
        return BadRow(source, f"not JSON: {error}")
    if not isinstance(value, dict):
        return BadRow(source, f"must be a JSON object, got {_type(value)}")
    return value


def _iter_json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_JSON:
        raise BadRow(str(path), f"a JSON array of {size} bytes, at most {MAX_JSON}; store it as JSON Lines")
    wrapped = parse_json(b'{"rows":' + file.read(MAX_JSON).removeprefix(b"\xef\xbb\xbf") + b"}", str(path))
    if isinstance(wrapped, BadRow):
        raise wrapped
    for number, row in enumerate(wrapped["rows"]):
        source = f"{path}:row {number}"
        yield source, row if isinstance(row, dict) else BadRow(source, f"must be a JSON object, got {_type(row)}")


def _iter_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from _arrow_rows(str(path), batch, number)
                number += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        # whatever stops the container stops the run: the rows that follow cannot be counted
        raise BadRow(f"{path}:row {number}", f"not readable as parquet: {_first_line(error)}") from error


def _iter_save_to_disk(folder: Path) -> Iterator[Row]:
    import pyarrow

    state = parse_json((folder / "state.json").read_bytes()[:MAX_LINE], str(folder / "state.json"))
    if isinstance(state, BadRow):
        raise state
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise BadRow(str(folder), "saved with an index mapping; call flatten_indices() before save_to_disk")
    names = [entry.get("filename") for entry in state.get("_data_files") or [] if isinstance(entry, dict)]
    if not names:
        raise BadRow(str(folder / "state.json"), "lists no data files")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise BadRow(str(folder / "state.json"), f"data file {name!r} is not a plain name in this folder")
        number = 0
        try:
            with pyarrow.memory_map(str(folder / name)) as source, pyarrow.ipc.open_stream(source) as reader:
                for batch in reader:
                    for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                        yield from _arrow_rows(str(folder / name), batch.slice(start, ROWS_AT_ONCE), number + start)
                    number += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise BadRow(f"{folder / name}:row {number}", f"not readable as Arrow: {_first_line(error)}") from error


def _arrow_rows(name: str, batch, start: int) -> Iterator[Row]:
    import pyarrow

    for offset in range(batch.num_rows):
        source = f"{name}:row {start + offset}"
        try:
            yield source, batch.slice(offset, 1).to_pylist()[0]
        except (pyarrow.ArrowException, UnicodeDecodeError, ValueError) as error:
            yield source, BadRow(source, f"not readable: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _type(value: object) -> str:
    return "null" if value is None else type(value).__name__
