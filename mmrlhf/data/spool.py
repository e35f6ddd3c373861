"""A spool: images that came inside a data set, in one temporary file instead of in memory.

What is appended is read again by place (`os.pread`, so forked workers may read at the same time). The file has no name
once it is open: it goes with the process, however that ends, and nobody else can open it. It lies where the
standard library puts temporary files: set TMPDIR to a disk with room (on many systems /tmp is memory).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field


class Spool:
    """One such file, made when the first bytes come. Raises OSError, naming the folder, when it is full."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="mmrlhf-images-", buffering=0)  # noqa: SIM115 - open as long as we are
        self.size = 0

    def add(self, data: bytes, digest: bytes | None = None) -> Spooled:
        """Append `data`; `digest` is its sha256, if that is known."""
        start, left = self.size, memoryview(data)
        try:
            while left:
                written = os.pwrite(self._file.fileno(), left, self.size)
                self.size, left = self.size + written, left[written:]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror} after {start:,} bytes of the data's images in {tempfile.gettempdir()}; set TMPDIR "
                "to a disk with room for all of them",
            ) from error
        return Spooled(hashlib.sha256(data).digest() if digest is None else digest, self, start, len(data))

    def read(self, start: int, length: int) -> bytes:
        parts = []
        while length:
            part = os.pread(self._file.fileno(), length, start)
            if not part:
                raise OSError(f"the temporary file of images ends {length} bytes early")
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)


@dataclass(frozen=True)
class Spooled:
    """One image of a spool; equal to another one if the bytes are."""

    digest: bytes  # sha256
    spool: Spool = field(compare=False, repr=False)
    start: int = field(compare=False)
    length: int = field(compare=False)

    def read(self) -> bytes:
        return self.spool.read(self.start, self.length)
