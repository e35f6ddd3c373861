"""Checkpoints that are whole or absent, at any kill point, and that cannot run code.

    checkpoints/step-00001200/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.json
    of a model that is cut       model-00001-of-00008.safetensors  …  optimizer-00001-of-00008.safetensors  …

All is written into `step-….tmp-<pid>`, each file synced; the manifest (sizes and sha256) comes last; then the folder is
renamed and its parent synced. A folder counts only if its manifest is there and every file agrees with it, so a cut,
flipped or missing byte makes `latest` take the one before, and say so. Numbers are JSON, tensors are safetensors;
nothing is ever unpickled.

Each process writes its own rows of what is cut, and the manifest says where they begin; the first writes the rest. What
is read back is a tensor or any rows of it, so the number of processes may change. They need one storage for all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf.train.distributed import World
from mmrlhf.train.files import FileSystem, discard, json_bytes, safetensors_chunks

SCHEMA = 1
MANIFEST = "MANIFEST.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"(\w+)-(\d{5})-of-(\d{5})\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or cannot be trusted. The message names the file and what is wrong."""


@dataclass(frozen=True)
class Rows:
    """A process's rows [start, start + len(tensor)) of a tensor that has `total` along its first dimension."""

    tensor: Tensor
    start: int
    total: int


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, on the CPU, read when they are asked for: whole, or some rows.

    `files`: each file with {name: (first row, rows in all)} of what it has rows of. Raises CheckpointError where the
    rows of a tensor do not make it whole.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, Any]]):
        from safetensors import safe_open

        self._pieces: dict[str, list[tuple[int, int, Any]]] = {}  # (first row, row after the last, its file's slice)
        self._totals: dict[str, int | None] = {}
        for path, rows in files.items():
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - not a dict
                part = file.get_slice(name)
                start, total = rows.get(name, (0, None))
                count = part.get_shape()[0] if total is not None else 0
                self._pieces.setdefault(name, []).append((start, start + count, part))
                if self._totals.setdefault(name, total) != total:
                    raise CheckpointError(f"{path}: {name} is said to have {total} rows, and another number elsewhere")
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda piece: piece[:2])
            ends = [0, *(stop for _, stop, _ in pieces)]
            whole = [start for start, _, _ in pieces] == ends[:-1] and ends[-1] == (self._totals[name] or 0)
            if not whole or (self._totals[name] is None and len(pieces) > 1):
                raise CheckpointError(f"{path.parent}: the pieces of {name} do not make a whole")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        own, total = self._pieces[name][0][2].get_shape(), self._totals[name]
        return tuple(own) if total is None else (total, *own[1:])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor; only they are read."""
        if self._totals[name] is None:
            return self._pieces[name][0][2][start:stop]
        found = [
            part[max(start - first, 0) : min(stop, last) - first]
            for first, last, part in self._pieces[name]
            if first < stop and start < last
        ]
        return torch.cat(found) if found else self._pieces[name][0][2][:0]

    def __getitem__(self, name: str) -> Tensor:
        total = self._totals[name]
        return self._pieces[name][0][2][...] if total is None else self.rows(name, 0, total)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: Tensors
    optimizer: Tensors  # see Optimizer.state
    state: dict[str, Any]


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint (step-00000010)")
    return int(match.group(1))


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor | Rows],
    optimizer: Mapping[str, Tensor | Rows],
    state: Mapping[str, Any],
    fs: FileSystem | None = None,
    world: World | None = None,
) -> Path:
    """Write one checkpoint under `folder`; returns its path.

    Raises OSError if the disk fails, and whatever else went wrong, with everything half written removed and the older
    checkpoints as they were. A whole checkpoint of the same step is left as it is (replacing it would need a moment
    without it); a damaged one makes room. `world`: all its processes call, each with its own `Rows`, and all raise
    where one fails: see `together`.
    """
    fs, world = fs or FileSystem(), world or World()
    target = folder / f"step-{step:08d}"
    beside = folder / f"{target.name}.tmp-{os.getpid()}"
    there, beside = together(world, lambda: (world.first and target.exists() and verify(target) is None, beside))[0]
    if there:
        return target
    try:
        if world.first:
            together(world, lambda: _empty(beside, fs))
            files = together(world, lambda: _write_parts(beside, model, optimizer, fs, world))
            together(world, lambda: _publish(beside, target, step, state, files, fs))
        else:
            together(world, lambda: None)
            together(world, lambda: _write_parts(beside, model, optimizer, fs, world))
            together(world, lambda: None)
    except Exception:
        if world.first:
            discard(beside, fs)
        raise
    return target


def together(world: World, work: Callable[[], Any]) -> list[Any]:
    """What `work` gave in every process, by rank. Where it raised in one, all raise: none is left waiting.

    If nothing but disks failed, all raise an OSError. Anything else in any process (memory, a state that is no JSON) is
    raised there as it is and everywhere else, also where a disk failed, as a RuntimeError: who goes on after an OSError
    must not go on alone. Both say which process it was. KeyboardInterrupt and SystemExit are not waited for.
    """
    found, failed = None, None
    try:
        found = work()
    except Exception as error:
        failed = error
    wrong: tuple[int | None, str] | None = None
    if isinstance(failed, OSError):
        wrong = (failed.errno or 0, str(failed))
    elif failed is not None:
        wrong = (None, f"{type(failed).__name__}: {failed}")
    outcomes = world.gather((found, wrong))
    faults = {rank: wrong for rank, (_, wrong) in enumerate(outcomes) if wrong is not None}
    fatal = next((rank for rank, (code, _) in faults.items() if code is None), None)
    if failed is not None and (fatal is None or not isinstance(failed, OSError)):
        if world.size > 1 and hasattr(failed, "add_note"):  # Python 3.11
            failed.add_note(f"in process {world.rank} of {world.size}")
        raise failed
    if fatal is not None:
        raise RuntimeError(f"process {fatal}: {faults[fatal][1]}") from failed
    for rank, (code, text) in faults.items():
        raise OSError(code or 0, f"process {rank}: {text}")
    return [each for each, _ in outcomes]


def _empty(beside: Path, fs: FileSystem) -> None:
    fs.remove(beside)
    beside.mkdir(parents=True)


def _write_parts(
    beside: Path,
    model: Mapping[str, Tensor | Rows],
    optimizer: Mapping[str, Tensor | Rows],
    fs: FileSystem,
    world: World,
) -> dict[str, dict[str, Any]]:
    """This process's files, as the manifest lists them."""
    files: dict[str, dict[str, Any]] = {}
    for name, content in ((MODEL, model), (OPTIMIZER, optimizer)):
        mine, rows = dict[str, Tensor](), dict[str, tuple[int, int]]()
        for key, value in content.items():
            if isinstance(value, Rows):
                if value.tensor.shape[0]:
                    mine[key], rows[key] = value.tensor, (value.start, value.total)
            elif world.first:
                mine[key] = value
        if world.size > 1:
            name = f"{name.removesuffix('.safetensors')}-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
        size, digest = fs.write(beside / name, safetensors_chunks(mine))
        fs.fsync(beside / name)
        files[name] = {"bytes": size, "sha256": digest} | ({"rows": rows} if rows else {})
    return files


def _publish(
    beside: Path, target: Path, step: int, state: Mapping[str, Any], parts: list[dict[str, Any]], fs: FileSystem
) -> None:
    """State and manifest beside the parts of all processes; then the folder gets its name."""
    files = {name: facts for each in parts for name, facts in each.items()}
    for name in files:
        if not (beside / name).exists():
            raise OSError(
                errno.ENOENT, f"{name} was written by another process and is not in {beside}: they need one storage"
            )
    size, digest = fs.write(beside / STATE, [json_bytes({"schema": SCHEMA, **state})])
    fs.fsync(beside / STATE)
    files[STATE] = {"bytes": size, "sha256": digest}
    fs.write(beside / MANIFEST, [json_bytes({"schema": SCHEMA, "step": step, "files": files})])
    fs.fsync(beside / MANIFEST)
    fs.fsync(beside)
    if target.exists():
        fs.remove(target)
    fs.rename(beside, target)
    fs.fsync(target.parent)


def verify(path: Path, *, content: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None if it is whole. Without `content`, only sizes are compared."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        schema, files = manifest["schema"], dict(manifest["files"])
        if schema != SCHEMA:
            return f"its schema is {schema!r}; this version reads {SCHEMA}"
        missing = sorted(_expected(files) - set(files))
        if missing:
            return f"{MANIFEST} does not list {missing[0]}"
        for name, expected in files.items():
            if Path(name).name != name:
                return f"{MANIFEST} names a file outside its folder: {name!r}"
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} bytes, {MANIFEST} says {expected['bytes']}"
            if content and _sha256(path / name) != expected["sha256"]:
                return f"{name} does not have the sha256 in {MANIFEST}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged: {error!r}"
    return None


def _expected(files: Mapping[str, Any]) -> set[str]:
    """What a checkpoint with some of these files must have: of one part of a set, the others."""
    counts = {int(match[3]) for name in files if (match := _PART.fullmatch(name))}
    if not counts:
        return {MODEL, OPTIMIZER, STATE}
    kinds = (name.removesuffix(".safetensors") for name in (MODEL, OPTIMIZER))
    return {STATE} | {f"{k}-{i + 1:05d}-of-{n:05d}.safetensors" for k in kinds for n in counts for i in range(n)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def listed(folder: Path) -> list[Path]:
    """Everything under the name of a checkpoint, newest first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def latest(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint, and those that were skipped with the reason.

    (None, []) if there is none at all. Raises CheckpointError if there are some and none is whole: starting again
    from nothing is for the user to decide.
    """
    skipped: list[tuple[Path, str]] = []
    for path in listed(folder):
        reason = verify(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    if skipped:
        told = "; ".join(f"{path.name}: {reason}" for path, reason in skipped)
        raise CheckpointError(f"no checkpoint in {folder} is whole ({told}). Remove them to start from nothing.")
    return None, []


def load(path: Path, *, verified: bool = False) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError naming what is wrong with it. `verified`: only sizes are compared."""
    from safetensors import SafetensorError

    reason = verify(path, content=not verified)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}")
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        parts = []
        for kind in (MODEL, OPTIMIZER):
            stem = kind.removesuffix(".safetensors")
            own = [name for name in files if name == kind or ((m := _PART.fullmatch(name)) and m[1] == stem)]
            parts.append(Tensors({path / name: files[name].get("rows", {}) for name in own}))
        state = json.loads((path / STATE).read_bytes())
    except (SafetensorError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: the schema of {STATE} is {state.get('schema')!r}; this version reads {SCHEMA}")
    return Checkpoint(path, model=parts[0], optimizer=parts[1], state=state)


def prune(folder: Path, *, keep_last: int, fs: FileSystem | None = None) -> list[Path]:
    """Remove all but the newest `keep_last` whole checkpoints, and what killed saves left. Returns what is gone.

    A damaged one never counts as kept, so the last whole one always stays. A removal that fails is a warning.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    fs = fs or FileSystem()
    checkpoints = listed(folder)
    # Sizes only: reading every byte of every checkpoint after each save would cost more than the save.
    whole = [path for path in checkpoints if verify(path, content=False) is None]
    kept = set(whole[:keep_last])
    newest_whole = step_of(whole[0]) if whole else -1
    doomed = [path for path in checkpoints if path not in kept and step_of(path) < newest_whole]
    doomed += [path for path in folder.iterdir() if ".tmp-" in path.name or ".gone-" in path.name]
    gone: list[Path] = []
    for path in doomed:
        try:
            # Renamed first: a removal that is cut short must not leave something that looks like a checkpoint.
            away = path.with_name(f"{path.name.split('.')[0]}.gone-{os.getpid()}")
            if path.name != away.name:
                fs.rename(path, away)
            fs.remove(away)
            gone.append(path)
        except OSError as error:
            warnings.warn(f"cannot remove the old checkpoint {path}: {error}", stacklevel=2)
    return gone
