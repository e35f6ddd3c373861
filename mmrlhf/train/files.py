"""Files that are whole or absent: four calls to the file system, and what is built from them.

Everything that must survive a kill goes through `FileSystem`: write, fsync, rename, remove. Tests hand in one that
fails or exits at the n-th call. A file is written beside its place, synced, renamed, and its folder synced; a
safetensors file is streamed tensor by tensor, so that saving never needs a second copy of the model in memory.

Not covered: network file systems on which rename is not atomic.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor


class FileSystem:
    """The calls that change the disk. Each does one thing; a test may let the n-th of them fail."""

    def write(self, path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
        """Write `chunks` to a new file. Returns (bytes, sha256 of what was handed to the system)."""
        digest, size = hashlib.sha256(), 0
        with open(path, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    def fsync(self, path: Path) -> None:
        """Force a file, or a folder's entries, to the disk."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder with all it holds; nothing there is no error."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview], *, fs: FileSystem | None = None) -> tuple[int, str]:
    """Write a file so that its name always stands for a whole file. Returns (bytes, sha256)."""
    fs = fs or FileSystem()
    # Not by the process alone: in containers on one storage the first of each may have the same number.
    beside = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        written = fs.write(beside, chunks)
        fs.fsync(beside)
        fs.rename(beside, path)
        fs.fsync(path.parent)
    except OSError:
        discard(beside, fs)
        raise
    return written


def write_json(path: Path, value: object, *, fs: FileSystem | None = None) -> tuple[int, str]:
    """`value` as JSON, atomically. A NaN or infinity is a ValueError: JSON has none."""
    return write_atomic(path, [json_bytes(value)], fs=fs)


def json_bytes(value: object) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def discard(path: Path, fs: FileSystem) -> bool:
    """Remove what a failed write left; a failing removal is no new error (the leftover's name says that it is one)."""
    try:
        fs.remove(path)
    except OSError:
        return False
    return True


_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def safetensors_chunks(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time: 8 bytes of header length, a JSON header, the data.

    Widest elements first, so that every tensor stays aligned. Raises TypeError for a dtype the format does not have.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise TypeError(f"{name}: {tensor.dtype} cannot be saved as safetensors")
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in row order, as bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
