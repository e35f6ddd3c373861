"""Features of a frozen vision tower, computed once for each prompt's pictures and kept on the disk.

    data.vision_cache/<first 16 digits of the key>/<hash of the pictures>.safetensors
        "image/list/0" [n, H] tokens, "image/list/1" … deepstack, "input/image_grid_thw" what positions are read from

A prompt whose file is there costs neither the tower nor the decoding of its pictures. The key is a hash over the
tower's weights and dtype, the model's config, library versions and kind of device; a file's name one over the bytes of
the pictures, their order, and the processor's settings. Files are whole or absent, checked by a content hash when read,
and computed again, with a warning, if damaged. While the tower is frozen every prompt's pictures go through it by
themselves (`vision.apart`), with a cache or without, so training is the same to the last bit either way.

Workers read, the processes that train write. Not covered: removing what is out of use (delete the folder); several
processes keep to the bound each by itself, counting what was there at the start and what it wrote.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import GroupBatch
from mmrlhf.config import TrainConfig
from mmrlhf.data.collate import EncodedGroup, collate
from mmrlhf.models import liger, parts, vision
from mmrlhf.train.files import FileSystem, discard, safetensors_chunks, write_atomic
from mmrlhf.train.reference import _LIBRARIES, _computed
from mmrlhf.train.state import fingerprint, text_fingerprint, versions

_FORMAT = "1"  # of the files and their key; part of it
logger = logging.getLogger(__name__)


def features_frozen(model: nn.Module, settings: TrainConfig) -> bool:
    """Whether nothing between pixels and decoder will be trained; asked before `setup.make_trainable`."""
    if settings.lora.enabled:
        return not any(
            "lora_" in name for _, part in parts.vision_modules(model) for name, _ in part.named_parameters()
        )
    if not settings.model.freeze_vision:
        return False
    between = len(parts.vision_parameters(model)) - len(parts.vision_parameters(model, projector=False))
    return settings.model.freeze_projector or between == 0


class VisionCache:
    """The folder of one tower. `limit`: bytes that all of `folder` may take, other towers' files included."""

    def __init__(self, folder: Path, key: str, *, limit: int, tokens: Mapping[str, int], fs: FileSystem | None = None):
        self.place, self.key, self.limit, self.tokens = folder / key[:16], key, limit, dict(tokens)
        self.fs = fs or FileSystem()
        self.place.mkdir(parents=True, exist_ok=True)
        self.used = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        self.written = 0  # prompts
        self._closed = False  # full, or the disk refuses

    def read(self, name: str, prefix_ids: Tensor) -> dict[str, Tensor] | None:
        """The tensors of a prompt with these pictures, or None if they are not there or not whole (which is said)."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {each: file.get_tensor(each) for each in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            self._damaged(path, str(error))
            return None
        if metadata.get("key") != f"{self.key} {name}" or metadata.get("content") != fingerprint(tensors):
            self._damaged(path, "it does not hold what its name says")
            return None
        for kind, token in self.tokens.items():
            rows = {each.shape[0] for at, each in tensors.items() if at.startswith(f"{kind}/")} or {0}
            if rows != {int((prefix_ids == token).sum())}:
                self._damaged(path, f"its {kind} features are not as many as the prompt's tokens")
                return None
        return tensors

    def wants(self, name: str) -> bool:
        """Whether `write` would keep these pictures' features."""
        return not self._closed and not self._path(name).exists()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a prompt's tensors, unless the cache is full or the disk refuses (each said once)."""
        path = self._path(name)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self.used + size > self.limit:
            self._closed = True
            logger.warning(
                "data.vision_cache is full: %d of data.vision_cache_bytes=%d bytes are used in %s. The pictures of "
                "further prompts are encoded every time; give it more bytes, or delete folders of other towers in it",
                *(self.used, self.limit, self.place.parent),
            )
            return
        metadata = {"key": f"{self.key} {name}", "content": fingerprint(tensors)}
        try:
            written, _ = write_atomic(path, safetensors_chunks(tensors, metadata=metadata), fs=self.fs)
        except OSError as error:
            self._closed = True
            logger.warning(
                "data.vision_cache: %s cannot be written (%s); nothing more is kept in this run", path, error
            )
            return
        self.used += written
        self.written += 1

    def _path(self, name: str) -> Path:
        return self.place / f"{name}.safetensors"

    def _damaged(self, path: Path, why: str) -> None:
        warnings.warn(f"{path} is damaged ({why}); it is computed again", stacklevel=3)
        discard(path, self.fs)


def open_cache(model: nn.Module, settings: TrainConfig, *, fs: FileSystem | None = None) -> VisionCache | None:
    """The cache that `data.vision_cache` names, for this model. ValueError if what makes its features is trained."""
    wanted = settings.data
    if wanted.vision_cache is None:
        return None
    if not features_frozen(model, settings):
        raise ValueError(
            "data.vision_cache keeps the features of a frozen vision tower, and here they change with training: set "
            "model.freeze_vision=true and model.freeze_projector=true, or lora.enabled=true without adapters in the "
            "tower, or data.vision_cache=null"
        )
    folder = Path(wanted.vision_cache)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"data.vision_cache: {folder} is not a folder")
    tokens = parts.image_token_ids(parts.inner_model(model).config)
    return VisionCache(folder, tower_key(model), limit=wanted.vision_cache_bytes, tokens=tokens, fs=fs)


def tower_key(model: nn.Module) -> str:
    """A hash over all that turns pixels into features: weights (dtype included), config, libraries, device."""
    inner, whole = parts.inner_model(model), parts.base_model(model)
    weights = {name: p for name, p in inner.named_parameters(recurse=False)}
    for name, part in parts.vision_modules(model):
        weights |= {f"{name}.{at}": each for at, each in (*part.named_parameters(), *part.named_buffers())}
    libraries = {name: version for name, version in versions().items() if name in _LIBRARIES}
    return text_fingerprint(
        _FORMAT,
        type(whole).__qualname__,
        fingerprint(weights),
        json.dumps(_computed(whole.config.to_dict()), sort_keys=True, default=str),
        json.dumps(libraries, sort_keys=True),
        ",".join(liger.applied(model)),
        f"device={parts.parameter_device(model).type} cuda={torch.version.cuda}",
    )


class Batches:
    """Indices into the data -> GroupBatch on the CPU. `apart`: each prompt's pictures are kept to themselves."""

    def __init__(self, dataset: Any, *, apart: bool, cache: VisionCache | None = None):  # PreferenceDataset
        self.dataset, self.apart, self.cache = dataset, apart, cache
        self._index = {group.id: index for index, group in enumerate(dataset.groups)}

    def __call__(self, indices: Sequence[int]) -> GroupBatch:
        if not self.apart:
            return collate([self.dataset[index] for index in indices])
        encoded, prompts = zip(*map(self._prompt, indices), strict=True)
        batch = collate(encoded)
        return batch.replace(vision={**batch.vision, **vision.apart(prompts)})

    def keep(self, batch: GroupBatch, number: int, features: vision.VisionFeatures) -> None:
        """Prompt `number` of a batch went through the tower: put its features into the cache, if there is one."""
        if self.cache is None:
            return
        name = self.dataset.vision_hash(self._index[batch.ids[number]])
        if self.cache.wants(name):
            own = {key: batch.vision.get(f"prompt{number}/{key}") for key in vision.POSITION_INPUTS}
            inputs = {f"input/{key}": value.cpu() for key, value in own.items() if value is not None}
            self.cache.write(name, vision.pack(features) | inputs)

    def _prompt(self, index: int) -> tuple[EncodedGroup, dict[str, Tensor]]:
        """(the group, with what positions are read from as its only vision tensors; what `vision.apart` takes)."""
        text = self.dataset.text(index)
        found = None
        if self.cache is not None and text.images:
            found = self.cache.read(self.dataset.vision_hash(index), text.prefix_ids)
        if found is None:
            group = self.dataset[index]
            positions = {name: value for name, value in group.vision.items() if name in vision.POSITION_INPUTS}
            return dataclasses.replace(group, vision=positions), group.vision
        positions = {name.removeprefix("input/"): t for name, t in found.items() if name.startswith("input/")}
        features = {name: value for name, value in found.items() if not name.startswith("input/")}
        return dataclasses.replace(text, vision=positions), features
