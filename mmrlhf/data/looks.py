"""Looks: what must be known of a picture before a step needs its pixels: that it is whole, how large, and its hash.

A look reads the bytes once, hashes them and lets the decoder see them all, at an eighth of its size for a JPEG; the
processor, which costs ten times as much, is left out. Looks are kept by where the bytes lie (path, size, time of change
to the nanosecond) or, for embedded images, by their hash; with a folder also on the disk, so that the next run, and
every other process, opens the file and reads nothing. A file that changed less than RACY seconds before it was looked
at is looked at again: it may change once more without its time telling. Only sound pictures are kept.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from mmrlhf.data.images import MAX_BYTES, MAX_PIXELS, check_size, image_bytes, open_inside, read_all, upright_size
from mmrlhf.data.schema import ImageRef

RACY = 2.0  # seconds: the coarsest time a file system keeps (FAT's)
_NAME = "pictures.jsonl"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    width: int  # of the upright picture, pixels
    height: int
    digest: bytes  # sha256 of the encoded bytes


class Looks:
    """Looks at the pictures of one data root; threads may share it.

    Args:
        root: folder that paths are relative to.
        max_pixels: a picture with more raises BadRow, seen before or not.
        folder: where looks are kept between runs; None keeps them in memory only.
    """

    def __init__(self, root: str | Path, *, max_pixels: int = MAX_PIXELS, folder: str | Path | None = None):
        self.root, self.max_pixels = Path(root), max_pixels
        self._file = None if folder is None else Path(folder) / _NAME
        self._seen: dict[tuple, Look] = {}
        self._written = 0
        self._stamp: tuple[int, ...] | None = None  # of the file as it was read
        self.refresh()
        self.decoded = 0  # pictures that were not known yet

    def __call__(self, ref: ImageRef, source: str = "") -> Look:
        """Raises BadRow as `images.open_image` does."""
        name = source or ref.path or "image"
        if ref.path is None:
            digest = ref.identity
            assert isinstance(digest, bytes)
            key = (digest.hex(),)
            found = self._seen.get(key)
            if found is None:
                found = self._look(image_bytes(ref, self.root, source=source), digest, name)
            keep = True
        else:
            with open_inside(ref.path, self.root, max_bytes=MAX_BYTES, source=source) as file:
                key, keep = self._place(ref.path, file)
                found = self._seen.get(key)
                if found is None:
                    data = read_all(file, ref.path, source=source)
                    found = self._look(data, sha256(data).digest(), name)
        check_size(found.width, found.height, name, max_pixels=self.max_pixels)
        if keep:
            self._seen[key] = found
        return found

    def digest(self, ref: ImageRef, source: str = "") -> bytes:
        """The sha256 of an image's bytes, read only where they were not seen. Raises BadRow."""
        if ref.path is None:
            digest = ref.identity
            assert isinstance(digest, bytes)
            return digest
        with open_inside(ref.path, self.root, max_bytes=MAX_BYTES, source=source) as file:
            found = self._seen.get(self._place(ref.path, file)[0])
            return found.digest if found is not None else sha256(read_all(file, ref.path, source=source)).digest()

    def _place(self, path: str, file: BinaryIO) -> tuple[tuple, bool]:
        """What an open file is kept under, and whether it may be kept at all."""
        about = os.fstat(file.fileno())
        key = (os.path.abspath(self.root / path), about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        return key, time.time() - max(about.st_mtime, about.st_ctime) >= RACY

    def _look(self, data: bytes, digest: bytes, name: str) -> Look:
        self.decoded += 1
        return Look(*upright_size(data, name, max_pixels=self.max_pixels), digest)

    def refresh(self) -> None:
        """Add what other processes have kept since the file was read; not while other threads look."""
        stamp = None if self._file is None else _stamp(self._file)
        if stamp is None or stamp == self._stamp or self._file is None:
            return
        new = len(self._seen) - self._written
        self._seen = _read(self._file) | self._seen
        self._written, self._stamp = len(self._seen) - new, stamp

    def save(self) -> None:
        """Keep what was seen on the disk, if there is a folder and anything new; a disk that refuses is told about."""
        if self._file is None or len(self._seen) == self._written:
            return
        beside = self._file.with_name(f"{_NAME}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            known = _read(self._file) | self._seen  # another process may have seen other pictures
            with open(beside, "w", encoding="utf-8") as file:
                file.write(json.dumps(_header()) + "\n")
                for key, look in known.items():
                    width, height, digest = astuple(look)
                    file.write(json.dumps([*key, width, height, digest.hex()]) + "\n")
            os.replace(beside, self._file)
            self._written = len(self._seen)
        except OSError as error:
            logger.warning("what is known of the pictures cannot be kept in %s: %s", self._file.parent, error)
        finally:
            with suppress(OSError):
                beside.unlink()


def _stamp(path: Path) -> tuple[int, ...] | None:
    with suppress(OSError):
        about = path.stat()
        return about.st_ino, about.st_size, about.st_mtime_ns
    return None


def _header() -> dict[str, str]:
    """Other libraries may find other pictures whole."""
    import PIL

    return {"pillow": PIL.__version__, "version": "1"}


def _read(path: Path) -> dict[tuple, Look]:
    """The looks of a file; none, and a warning, if it is not whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0]) != _header():
            return {}
        seen = {}
        for line in lines[1:]:
            *key, width, height, digest = json.loads(line)
            if not (type(width) is int and type(height) is int and len(bytes.fromhex(digest)) == 32):
                raise ValueError(f"not a picture: {line[:80]}")
            seen[tuple(key)] = Look(width, height, bytes.fromhex(digest))
        return seen
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, IndexError) as error:
        logger.warning("%s is damaged (%s); all pictures are looked at again", path, error)
        return {}
