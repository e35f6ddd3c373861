"""Checkpoints that are whole or absent, at any kill point, and that cannot run code.

    checkpoints/step-00001200/   model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

All is written into `step-….tmp-<pid>`, each file synced; the manifest (sizes and sha256) comes last; then the folder is
renamed and its parent synced. A folder counts only if its manifest is there and every file agrees with it, so a cut,
flipped or missing byte makes `latest` take the one before, and say so. Numbers are JSON, tensors are safetensors;
nothing is ever unpickled.

Not covered: shards of one model on several machines.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrlhf.train.files import FileSystem, discard, json_bytes, safetensors_chunks

SCHEMA = 1
MANIFEST = "MANIFEST.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or cannot be trusted. The message names the file and what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    model: dict[str, Tensor]  # on the CPU
    optimizer: dict[str, Tensor]  # see Optimizer.state
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
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    fs: FileSystem | None = None,
) -> Path:
    """Write one checkpoint under `folder`; returns its path.

    Raises OSError if the disk fails, with everything half written removed and the older checkpoints as they were.
    A whole checkpoint of the same step is left as it is (replacing it would need a moment without it); a damaged one
    makes room.
    """
    fs = fs or FileSystem()
    target = folder / f"step-{step:08d}"
    if target.exists() and verify(target) is None:
        return target
    beside = folder / f"{target.name}.tmp-{os.getpid()}"
    content: dict[str, Any] = {
        MODEL: safetensors_chunks(model),
        OPTIMIZER: safetensors_chunks(optimizer),
        STATE: [json_bytes({"schema": SCHEMA, **state})],
    }
    try:
        fs.remove(beside)
        beside.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        for name, chunks in content.items():
            size, digest = fs.write(beside / name, chunks)
            fs.fsync(beside / name)
            files[name] = {"bytes": size, "sha256": digest}
        fs.write(beside / MANIFEST, [json_bytes({"schema": SCHEMA, "step": step, "files": files})])
        fs.fsync(beside / MANIFEST)
        fs.fsync(beside)
        if target.exists():
            fs.remove(target)
        fs.rename(beside, target)
        fs.fsync(folder)
    except OSError:
        discard(beside, fs)
        raise
    return target


def verify(path: Path, *, content: bool = True) -> str | None:
    """Why a checkpoint cannot be used, or None if it is whole. Without `content`, only sizes are compared."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        schema, files = manifest["schema"], dict(manifest["files"])
        if schema != SCHEMA:
            return f"its schema is {schema!r}; this version reads {SCHEMA}"
        missing = sorted({MODEL, OPTIMIZER, STATE} - set(files))
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


def load(path: Path) -> Checkpoint:
    """Read one checkpoint. Raises CheckpointError naming what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    reason = verify(path)
    if reason is not None:
        raise CheckpointError(f"{path}: {reason}")
    try:
        model, optimizer = load_file(path / MODEL), load_file(path / OPTIMIZER)
        state = json.loads((path / STATE).read_bytes())
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if state.get("schema") != SCHEMA:
        raise CheckpointError(f"{path}: the schema of {STATE} is {state.get('schema')!r}; this version reads {SCHEMA}")
    return Checkpoint(path, model, optimizer, state)


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
