"""A processor that makes the tokens of pictures it has never seen: from their sizes alone.

The real processor runs, with its image processor replaced by one that remembers what came back for pictures of these
sizes, the pixels as zeros that take no memory. Sizes it has not met go to the real image processor once, as an empty
picture, without the arithmetic that changes values and no shape. That the tokens are the real ones is checked, not
assumed: see `encode.Encoder.measure` and `dataset.PreferenceDataset`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

MEMORY = 4096  # combinations of sizes remembered
_LARGE = 4096  # numbers; what token counts are read from (grids, sizes, numbers of tiles) has fewer
_CHEAP = {"do_rescale": False, "do_normalize": False, "resample": 0}  # 0 is the nearest pixel


def stand_in(processor: Any) -> Any:
    """A copy of `processor` that takes empty pictures of the right sizes for the real ones. TypeError if it cannot."""
    real = getattr(processor, "image_processor", None)
    if real is None or not callable(real):
        raise TypeError(f"{type(processor).__name__} has no image processor of its own")
    made = copy.copy(processor)
    made.image_processor = _Remembering(real)
    return made


def blank(width: int, height: int) -> Any:
    """A picture of this size whose pixels nobody has written: it takes memory only where they are read."""
    from PIL import Image

    return Image.new("RGB", (width, height), None)  # type: ignore[arg-type]  # None: not filled


class _Remembering:
    """An image processor in all but its values."""

    def __init__(self, real: Any):
        self._real, self._cheap = real, copy.copy(real)
        for name, value in _CHEAP.items():
            if hasattr(real, name):
                setattr(self._cheap, name, value)
        self._seen: OrderedDict[tuple, Any] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_real", "_cheap", "_seen"):
            raise AttributeError(name)
        return getattr(self._real, name)

    def __call__(self, images: Any = None, *args: Any, **words: Any) -> Any:
        key = (_sizes(images), repr(args), repr(sorted(words.items())))
        if key in self._seen:
            self._seen.move_to_end(key)
        else:
            self._seen[key] = _hollow(self._cheap(images, *args, **words))
            if len(self._seen) > MEMORY:
                self._seen.popitem(last=False)
        return _fresh(self._seen[key])


def _sizes(images: Any) -> Any:
    if isinstance(images, (list, tuple)):
        return tuple(map(_sizes, images))
    return images.size if hasattr(images, "mode") else getattr(images, "shape", repr(images))


def _hollow(value: Any) -> Any:
    """The same structure, large tensors and arrays replaced by zeros of their shape that take no memory."""
    if isinstance(value, torch.Tensor):
        return value.new_zeros(()).expand(value.shape) if value.numel() > _LARGE else value
    if isinstance(value, np.ndarray):
        return np.broadcast_to(np.zeros((), value.dtype), value.shape) if value.size > _LARGE else value
    if isinstance(value, (list, tuple)):
        return type(value)(map(_hollow, value))
    if hasattr(value, "data") and hasattr(value, "keys"):  # a BatchFeature
        made = copy.copy(value)
        made.data = {name: _hollow(each) for name, each in value.items()}
        return made
    if isinstance(value, dict):
        return {name: _hollow(each) for name, each in value.items()}
    return value


def _fresh(value: Any) -> Any:
    """A copy whose keys and lists may be taken out: processors pop what only they need."""
    if isinstance(value, list):
        return list(map(_fresh, value))
    if hasattr(value, "data") and hasattr(value, "keys"):
        made = copy.copy(value)
        made.data = {name: _fresh(each) for name, each in value.items()}
        return made
    if isinstance(value, dict):
        return {name: _fresh(each) for name, each in value.items()}
    return value
