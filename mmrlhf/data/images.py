"""Pictures and videos from untrusted data: opened inside the data root only, measured before they are decoded.

A path is refused by its spelling first (absolute, "..", drive letters, URLs, NUL), then by where it really leads
(symbolic links are followed only if they end inside the root), then by what it is (a regular file of at most
`max_bytes`). Only then are its bytes read, its format chosen from `FORMATS`, its size taken from the header and, if it
fits `max_pixels` and `MAX_ASPECT`, its pixels decoded. Global PIL settings are read by PIL but never written here.

FORMATS leaves out what PIL could also open: EPS (starts Ghostscript), PSD, TIFF (deep chains of directories, many
codecs), SVG (not PIL's), PDF, and every raw or scientific format. Animated files give their first frame.
Not covered: bugs of libjpeg, libpng, libwebp and FFmpeg themselves; keep them updated.
"""

from __future__ import annotations

import base64
import io
import os
import re
import stat
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mmrlhf.data.advice import LFS, is_lfs_pointer
from mmrlhf.data.schema import BadRow, ImageRef, VideoRef

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_PIXELS = 89_478_485  # Pillow's own warning level: 1 GiB / 4 bytes / 3 channels
MAX_BYTES = 64 * 2**20  # of an encoded image; the largest photographs are near 40 MiB
MAX_ASPECT = 200.0  # the longest strip that Qwen-VL's processors accept; others resize it to nothing
MAX_VIDEO_BYTES = 4 * 2**30
MAX_VIDEO_FRAMES = 200_000  # packets looked at in a video file: about two hours at 30 a second
MAX_DATA_URI = 16 * 2**20  # characters

_MAGIC = (
    (0, b"\xff\xd8", "jpeg"),
    (0, b"\x89PNG", "png"),
    (8, b"WEBP", "webp"),
    (0, b"GIF8", "gif"),
    (0, b"BM", "bmp"),
)
_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_DATA_URI = re.compile(r"data:image/[A-Za-z0-9.+\-]+;base64,", re.IGNORECASE)
# First bytes of the only containers handed to FFmpeg, and the demuxer forced for each. Probing would also find
# playlists (HLS, concat, DASH), which open further files and addresses.
_VIDEO_MAGIC = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))


class MissingFile(BadRow):
    """The path is well formed and inside the root, but nothing is there."""


def check_path(path: str) -> str:
    """The path as it may be joined to a data root, or ValueError saying why it may not. Touches no file."""
    if not isinstance(path, str):
        raise ValueError(f"path must be a string, got {type(path).__name__}")
    if not path or path.isspace():
        raise ValueError("path is empty")
    if "\0" in path:
        raise ValueError("path holds a NUL byte")
    shown = path if len(path) <= 80 else path[:77] + "..."
    if _DRIVE.match(path):
        raise ValueError(f"{shown!r} names a drive; paths are relative to the data root")
    if "://" in path or (_SCHEME.match(path) and path.split(":", 1)[0].lower() in _SCHEMES):
        raise ValueError(f"{shown!r} is an address; nothing is fetched, download the files first")
    if path.startswith(("/", "\\", "~")):
        raise ValueError(f"{shown!r} is absolute; paths are relative to the data root")
    parts = path.replace("\\", "/").split("/")
    if ".." in parts:
        raise ValueError(f"{shown!r} climbs out with '..'; paths stay inside the data root")
    return path


_SCHEMES = ("http", "https", "ftp", "file", "local", "data", "s3", "gs", "hf", "oss", "mailto", "javascript")


def decode_data_uri(text: str, *, max_chars: int = MAX_DATA_URI) -> bytes:
    """The bytes of a `data:image/…;base64,…` address of at most `max_chars` characters, or ValueError."""
    head = _DATA_URI.match(text[:100])
    if head is None:
        raise ValueError(f"data address must be data:image/<type>;base64,…, got {text[:40]!r}")
    if len(text) > max_chars:
        raise ValueError(f"data address of {len(text)} characters, at most {max_chars} are accepted")
    try:
        return base64.b64decode(text[head.end() :], validate=True)
    except ValueError as error:  # binascii.Error is one
        raise ValueError(f"data address is not base64: {error}") from error


def _inside(real: str, root: str) -> bool:
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def resolve(path: str, root: str | Path, *, source: str = "") -> str:
    """Where `path` really leads, after symbolic links: an absolute path inside `root`. BadRow if it leads outside."""
    where = source or path[:80]
    try:
        check_path(path)
    except ValueError as error:
        raise BadRow(where, str(error)) from error
    real_root = os.path.realpath(root)
    try:
        real = os.path.realpath(os.path.join(real_root, path))
    except (OSError, ValueError) as error:
        raise BadRow(where, f"{path!r}: {error}") from error
    if not _inside(real, real_root):
        raise BadRow(where, f"{path!r} is a link that leaves the data root")
    return real


@contextmanager
def open_inside(path: str, root: str | Path, *, max_bytes: int, source: str = "") -> Iterator[BinaryIO]:
    """A regular file of at most `max_bytes` inside `root`, open for reading.

    Checked before it is opened (no device, pipe or link out is ever opened) and again on the open descriptor, so a
    file swapped in between is refused too. BadRow names the path and the reason; MissingFile if nothing is there.
    """
    where = source or path[:80]
    real = resolve(path, root, source=source)
    try:
        before = os.lstat(real)
        if not stat.S_ISREG(before.st_mode):
            raise BadRow(where, f"{path!r} is {_kind(before.st_mode)}, not a regular file")
        # O_NONBLOCK: opening a pipe that took the file's place must not wait for a writer
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(real, flags)
    except FileNotFoundError as error:
        raise MissingFile(where, f"{path!r} is not in {os.fspath(root)}") from error
    except NotADirectoryError as error:
        raise MissingFile(where, f"{path!r} is not in {os.fspath(root)}") from error
    except OSError as error:
        raise BadRow(where, f"{path!r} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        after = os.fstat(descriptor)
        if not os.path.samestat(before, after) or not stat.S_ISREG(after.st_mode):
            raise BadRow(where, f"{path!r} changed while it was opened")
        link = f"/proc/self/fd/{descriptor}"
        if sys.platform == "linux" and os.path.islink(link) and not _inside(os.readlink(link), os.path.realpath(root)):
            raise BadRow(where, f"{path!r} left the data root while it was opened")
        if after.st_size > max_bytes:
            raise BadRow(where, f"{path!r} has {after.st_size} bytes, at most {max_bytes} are accepted")
        yield file


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "something else"


def container_of(data: bytes) -> str | None:
    """The format in FORMATS, in lower case, that the first bytes announce; None for any other."""
    return next((kind for at, magic, kind in _MAGIC if data[at : at + len(magic)] == magic), None)


def image_bytes(ref: ImageRef, root: str | Path, *, max_bytes: int = MAX_BYTES, source: str = "") -> bytes:
    """The encoded bytes of an image, at most `max_bytes` of them. Raises BadRow."""
    embedded = ref.embedded()
    if embedded is not None:
        if len(embedded) > max_bytes:
            raise BadRow(source or "image", f"{len(embedded)} bytes, at most {max_bytes} are accepted")
        return embedded
    assert ref.path is not None
    with open_inside(ref.path, root, max_bytes=max_bytes, source=source) as file:
        return read_all(file, ref.path, max_bytes=max_bytes, source=source)


def read_all(file: BinaryIO, path: str, *, max_bytes: int = MAX_BYTES, source: str = "") -> bytes:
    """What an open file holds. BadRow if that is more than `max_bytes`, whatever its size was when it was opened."""
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadRow(source or path, f"{path!r} grew past {max_bytes} bytes while it was read")
    return data


def open_image(
    ref: ImageRef,
    root: str | Path,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    source: str = "",
) -> Image:
    """The picture as upright RGB, decoded in full.

    Transparency is laid over white, 16-bit grey is scaled to 8, CMYK and palettes are converted, and the EXIF
    orientation is applied, so the same file always gives the same pixels. Raises BadRow for anything that is not a
    whole picture in one of FORMATS within `max_bytes` (encoded), `max_pixels` and MAX_ASPECT.
    """
    data = image_bytes(ref, root, max_bytes=max_bytes, source=source)
    return _decode(data, source or ref.path or "image", max_pixels=max_pixels)


def image_size(ref: ImageRef, root: str | Path, *, max_bytes: int = MAX_BYTES, source: str = "") -> tuple[int, int]:
    """Width and height from the header, before orientation is applied; nothing is decoded. Raises BadRow."""
    name = source or ref.path or "image"
    with _header(image_bytes(ref, root, max_bytes=max_bytes, source=source), name) as image:
        return image.size


@contextmanager
def _header(data: bytes, name: str) -> Iterator[Image]:
    """The image behind its header; every way a decoder can fail, until the block ends, is a BadRow."""
    from PIL import Image as pillow

    if not data:
        raise BadRow(name, "the image is empty (0 bytes)")
    try:
        with pillow.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except BadRow:
        raise
    except pillow.UnidentifiedImageError as error:
        what = f"it is {LFS}" if is_lfs_pointer(data) else f"begins {data[:8]!r}"
        raise BadRow(name, f"not an image in one of {', '.join(FORMATS)} ({what})") from error
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise BadRow(name, f"too many pixels: {error}") from error
    except (
        OSError,  # truncated or unreadable streams
        ValueError,  # bad chunks, oversized text
        SyntaxError,  # what PIL's PNG reader raises for a broken chunk
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        NotImplementedError,
        MemoryError,
        struct.error,
        zlib.error,
    ) as error:
        raise BadRow(name, f"broken image: {type(error).__name__}: {error}") from error


def _decode(data: bytes, name: str, *, max_pixels: int) -> Image:
    with _header(data, name) as image:
        check_size(*image.size, name, max_pixels=max_pixels)
        image.load()
        return to_rgb(image)


def check_size(width: int, height: int, name: str, *, max_pixels: int = MAX_PIXELS) -> None:
    """BadRow for a picture of no pixels, of more than `max_pixels`, or narrower than MAX_ASPECT."""
    if width < 1 or height < 1:
        raise BadRow(name, f"{width}x{height} is no picture")
    if width * height > max_pixels:
        raise BadRow(name, f"{width}x{height} has more than max_pixels = {max_pixels}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadRow(name, f"{width}x{height} is narrower than 1:{MAX_ASPECT:g}")


def upright_size(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what `open_image` would give, and BadRow wherever it would raise it.

    All bytes go through the decoder, since a file's end can be missing; a JPEG is decoded to an eighth of its size
    (3 ms a megapixel of CPU time, against 5 to 16 in full).
    """
    with _header(data, name) as image:
        width, height = image.size
        check_size(width, height, name, max_pixels=max_pixels)
        image.draft("RGB", (1, 1))  # nothing for formats other than JPEG
        image.load()
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # as ImageOps.exif_transpose reads it
        to_rgb(image)
    return (height, width) if turned else (width, height)


def to_rgb(image: Image) -> Image:
    """Any PIL image as upright 8-bit RGB; transparency over white."""
    from PIL import Image as pillow
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: PIL's own conversion clips at 255 for some of these modes
        import numpy as np

        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        image = pillow.fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")


def natural_key(name: str) -> tuple:
    """Sort key in which frame_9 comes before frame_10."""
    return tuple((0, int(piece), piece) if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name))


def uniform_indices(count: int, frames: int) -> list[int]:
    """At most `frames` of 0 .. count - 1, evenly spaced, first and last included; all of them if there are fewer."""
    if count <= frames:
        return list(range(count))
    if frames == 1:
        return [count // 2]
    return [round(i * (count - 1) / (frames - 1)) for i in range(frames)]


def frame_names(ref: VideoRef, root: str | Path, *, source: str = "") -> list[str] | None:
    """The frame files of a video that is a directory, in natural order and relative to `root`; None for a file.

    Raises MissingFile if nothing is there, BadRow if the directory holds no image.
    """
    where = source or ref.path[:80]
    real = resolve(ref.path, root, source=source)
    if not os.path.lexists(real):
        raise MissingFile(where, f"{ref.path!r} is not in {os.fspath(root)}")
    if not os.path.isdir(real):
        return None
    try:
        names = [n for n in os.listdir(real) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    except OSError as error:
        raise BadRow(where, f"{ref.path!r} cannot be listed: {error.strerror}") from error
    if not names:
        raise BadRow(where, f"{ref.path!r} holds no frames ({', '.join(SUFFIXES)})")
    return [f"{ref.path.rstrip('/')}/{name}" for name in sorted(names, key=natural_key)]


def open_video(
    ref: VideoRef,
    root: str | Path,
    *,
    frames: int,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_VIDEO_BYTES,
    source: str = "",
) -> list[Image]:
    """At most `frames` RGB pictures, evenly spaced, from a directory of frame images or from a video file.

    Files (MP4/MOV, Matroska/WebM, AVI) need the extra `video` (PyAV). `max_pixels` holds for every frame,
    `max_bytes` for a video file. Raises BadRow, or ImportError naming the extra.
    """
    if frames < 1:
        raise ValueError(f"frames must be positive, got {frames}")
    names = frame_names(ref, root, source=source)
    if names is not None:
        picked = [names[i] for i in uniform_indices(len(names), frames)]
        return [open_image(ImageRef(path=n), root, max_pixels=max_pixels, source=source) for n in picked]
    with open_inside(ref.path, root, max_bytes=max_bytes, source=source) as file:
        return _video_frames(file, source or ref.path, frames, max_pixels)


def _video_frames(file: BinaryIO, name: str, frames: int, max_pixels: int) -> list[Image]:
    head = file.read(16)
    file.seek(0)
    demuxer = next((d for at, magic, d in _VIDEO_MAGIC if head[at : at + len(magic)] == magic), None)
    if demuxer is None:
        raise BadRow(name, f"not an MP4, Matroska/WebM or AVI file (begins {head[:8]!r})")
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video files needs PyAV: pip install 'mmrlhf[video]'") from error
    try:
        count = _count_frames(av, file, demuxer, name, max_pixels)
        file.seek(0)
        return _pick_frames(av, file, demuxer, uniform_indices(count, frames))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(name, f"broken video: {type(error).__name__}: {error}") from error


def _count_frames(av, file: BinaryIO, demuxer: str, name: str, max_pixels: int) -> int:
    """Packets of the video stream (one a frame); the headers' own counts are hints that may lie."""
    with av.open(file, format=demuxer) as container:
        if not container.streams.video:
            raise BadRow(name, "the file has no video stream")
        stream = container.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels or width < 1 or height < 1:
            raise BadRow(name, f"frames of {width}x{height}; 1 to max_pixels = {max_pixels} are accepted")
        count = 0
        for packet in container.demux(stream):
            count += packet.size > 0
            if count > MAX_VIDEO_FRAMES:
                raise BadRow(name, f"more than {MAX_VIDEO_FRAMES} frames")
    if not count:
        raise BadRow(name, "the video has no frames")
    return count


def _pick_frames(av, file: BinaryIO, demuxer: str, wanted: Sequence[int]) -> list[Image]:
    pictures: dict[int, Image] = {}
    last = None
    with av.open(file, format=demuxer) as container:
        for index, frame in enumerate(container.decode(video=0)):
            last = frame
            if index in wanted:
                pictures[index] = frame.to_image().convert("RGB")
            if index >= wanted[-1]:
                break
    if last is None:
        raise ValueError("no frame could be decoded")
    missing = [i for i in wanted if i not in pictures]
    if missing:  # decoders may give fewer frames than packets; the last one stands for those past the end
        tail = last.to_image().convert("RGB")
        pictures.update(dict.fromkeys(missing, tail))
    return [pictures[i] for i in wanted]
