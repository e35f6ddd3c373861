"""Image and video columns of a row -> ImageRef and VideoRef, whatever spelling the format uses.

An image may be a path inside the data root, a `data:image/…;base64,` address, {"bytes", "path"} (bytes win), raw bytes,
or a PIL image (a `datasets` row); a video is a path. Paths are judged by their spelling here, so that a bad one is
reported with its line; `images` judges where they really lead when it opens them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from mmrlhf.data.images import check_path, decode_data_uri
from mmrlhf.data.schema import ImageRef, VideoRef

MAX_MEDIA = 64  # images, or videos, of one row


def images_of(row: Mapping) -> tuple[ImageRef, ...]:
    """The images of a row, from `images` or `image`. ValueError naming what cannot be used."""
    return tuple(image_ref(item) for item in _listed(row, "image"))


def videos_of(row: Mapping) -> tuple[VideoRef, ...]:
    """The videos of a row, from `videos` or `video`: paths inside the data root."""
    refs = []
    for item in _listed(row, "video"):
        if isinstance(item, Mapping):
            item = item.get("path")
        if not isinstance(item, str):
            raise ValueError(f"a video must be a path, got {type(item).__name__}")
        refs.append(VideoRef(check_path(item)))
    return tuple(refs)


def audio_in(row: Mapping) -> bool:
    return any(row.get(key) for key in ("audio", "audios"))


def _listed(row: Mapping, kind: str) -> list[Any]:
    plural, single = row.get(kind + "s"), row.get(kind)
    if plural is not None and single is not None and plural != single:
        raise ValueError(f"both {kind + 's'!r} and {kind!r} are given")
    value = plural if plural is not None else single
    if value is None:
        return []
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(items) > MAX_MEDIA:
        raise ValueError(f"{len(items)} {kind}s, at most {MAX_MEDIA} are accepted")
    return items


def image_ref(item: Any) -> ImageRef:
    """One image of a row, or ValueError saying what came and what is allowed."""
    if isinstance(item, str):
        if item[:5].lower() == "data:":
            return ImageRef(data=decode_data_uri(item))
        return ImageRef(path=check_path(item))
    if isinstance(item, (bytes, bytearray, memoryview)):
        return ImageRef(data=bytes(item))
    if isinstance(item, Mapping):
        data, path = item.get("bytes"), item.get("path")
        if data is not None:
            if not isinstance(data, (bytes, bytearray, memoryview)):
                raise ValueError(f"image bytes must be bytes, got {type(data).__name__}")
            return ImageRef(data=bytes(data))
        if isinstance(path, str):
            return image_ref(path)
        raise ValueError("image has neither bytes nor path")
    if hasattr(item, "save") and hasattr(item, "mode"):  # a PIL image, already decoded by `datasets`
        return ImageRef(data=_encode(item))
    got = "null" if item is None else type(item).__name__
    raise ValueError(f"an image must be a path, a data address, bytes, {{bytes, path}} or a PIL image, got {got}")


def _encode(image: Any) -> bytes:
    """A PIL image as encoded bytes, pixels unchanged: BMP, or PNG where that is larger than MAX_BYTES.

    A megapixel takes 6 ms as BMP and 87 ms as PNG (of a photograph, compression 1), and 4 ms and 35 ms to decode. The
    bytes it was stored in cost neither, but a PIL image no longer has them: `rows.iter_objects` asks the data set.
    """
    from mmrlhf.data.images import MAX_BYTES, to_rgb

    buffer = io.BytesIO()
    upright = to_rgb(image)
    if 54 + upright.height * (3 * upright.width + 3) <= MAX_BYTES:
        upright.save(buffer, format="BMP")
    else:
        upright.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
