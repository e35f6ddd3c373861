"""Kept: the tokens of groups on the disk, made once for all starts and all processes.

    FOLDER/tokens/<first 32 digits of the key>.npz      tokens, weights and pairs of up to BLOCK consecutive groups

Making them costs 5 to 12 ms of CPU time a group, reading them about 0.5 ms. The key is a hash over everything that
decides them: texts, preferences and segments, the sizes of the pictures, template, tokenizer, processor and settings,
the versions of the libraries, and the source of what makes them here. Another key is another file: nothing stale can be
read. Files are whole or absent; a damaged one is made again, with a warning, and the first CHECKED groups that are read
are made again in every process and compared. Several processes may fill one folder: each does its own blocks first.

Not kept: groups with videos, groups that are left out, slow tokenizers, a subclass of `Encoder` that does not name in
its `makers` the modules of its own that its tokens follow from. Not covered: removing what is out of use (delete the
folder).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrlhf.data import chat, encode, encoded, schema, segments, standin
from mmrlhf.data.encode import CHECKED, Encoder
from mmrlhf.data.encoded import EncodedGroup, same_tokens
from mmrlhf.data.looks import Look
from mmrlhf.data.schema import ImageRef, PreferenceGroup

BLOCK = 256  # groups in a file: 2 s of work, which is what two processes may do twice
_FORMAT = "2"  # of the files; part of their key
_MAKERS = (chat, encode, encoded, schema, segments, standin)  # the modules that tokens follow from
_LIBRARIES = ("mmrlhf", "transformers", "tokenizers", "jinja2", "numpy", "pillow")
_POOLS = {
    "ids": np.int32,
    "weights": np.float32,
    "pairs": np.int64,
    "margin": np.float32,
    "flags": np.bool_,
    "aligned": np.int64,
}
logger = logging.getLogger(__name__)


class Kept:
    """The folder of one encoder's tokens; blocks are named by `name`, groups in them by their positions."""

    def __init__(self, folder: Path, encoder: Encoder):
        self.place = folder / "tokens"
        self.compared = 0  # groups that were read and made again
        self._settings = _settings(encoder)
        self._makes = encoder.makes
        self._reads = self._writes = True

    def row(self, group: PreferenceGroup, looks: Mapping[ImageRef, Look]) -> str | None:
        """What tells a group from others, all its pictures looked at; None if it is not kept."""
        if group.videos or any(ref not in looks for ref in group.images):
            return None
        sizes = [(looks[ref].width, looks[ref].height) for ref in group.images]
        content = repr([group.prompt, group.responses, group.pairs, group.ties, sizes])
        return sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def name(self, rows: Sequence[str | None]) -> str:
        """The key of a block of these rows."""
        return sha256(json.dumps([self._settings, list(rows)]).encode()).hexdigest()

    def read(self, name: str, groups: Sequence[PreferenceGroup]) -> dict[int, EncodedGroup]:
        """Position -> group with its ids as int32, without vision; empty if not there or not whole (which is said)."""
        path = self._path(name)
        if not self._reads or not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as file:
                about = json.loads(file["about"].tobytes())
                arrays = {pool: file[pool] for pool in _POOLS}
            if about["key"] != name or about["content"] != _content(about["rows"], arrays):
                raise ValueError("it does not hold what its name says")
            return _unpack(about["rows"], arrays, groups, self._makes)
        except (OSError, EOFError, ValueError, TypeError, LookupError, zipfile.BadZipFile, zlib.error) as error:
            logger.warning("%s is damaged (%s); its tokens are made again", path, error)
            return {}

    def confirm(self, read: EncodedGroup, made: EncodedGroup) -> bool:
        """Whether a group that was read is as it was made, both compact; if not, that is said and no more is read."""
        self.compared += 1
        if not same_tokens(read, made):
            logger.warning("%s: the tokens of group %s are others now; all are made again", self.place, made.id)
            self._reads = False
        return self._reads

    @property
    def unproven(self) -> bool:
        """Whether what is read is still to be compared with what is made."""
        return self.compared < CHECKED

    def write(self, name: str, found: Mapping[int, EncodedGroup]) -> None:
        """Keep a block; a disk that refuses is told about once, and no more is written."""
        rows, pools = _pack(found)
        if not self._writes or not rows:
            return
        about = json.dumps({"key": name, "content": _content(rows, pools), "rows": rows}).encode()
        path = self._path(name)
        beside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}")  # pids repeat on other machines
        try:
            self.place.mkdir(parents=True, exist_ok=True)
            with open(beside, "xb") as file:
                np.savez_compressed(file, about=np.frombuffer(about, np.uint8), **pools)
            os.replace(beside, path)
        except OSError as error:
            logger.warning("tokens cannot be kept in %s: %s", self.place, error)
            self._writes = False
        finally:
            with suppress(OSError):
                beside.unlink()

    def _path(self, name: str) -> Path:
        return self.place / f"{name[:32]}.npz"


def open_kept(encoder: Encoder) -> Kept | None:
    """The tokens of this encoder in its folder, or None if it has none or what it makes is not kept."""
    if encoder.folder is None or _makers(encoder) is None or not encoder.chat.tokenizer.is_fast:
        return None
    return Kept(encoder.folder, encoder)


def _makers(encoder: Encoder) -> tuple[Any, ...] | None:
    """The modules that its tokens follow from; None where its class does not say which are its own."""
    own = () if type(encoder) is Encoder else vars(type(encoder)).get("makers")
    return None if own is None else (*_MAKERS, *own)


def _settings(encoder: Encoder) -> list[str]:
    """All that decides tokens besides the groups themselves."""
    tokenizer = encoder.chat.tokenizer
    tokenizer("", add_special_tokens=False)  # leaves the padding of its file behind, which the fingerprint would see
    told = {k: v for k, v in tokenizer.init_kwargs.items() if k not in ("name_or_path", "tokenizer_file", "vocab_file")}
    kinds = [type(each).__qualname__ for each in (encoder.processor, tokenizer)]
    facts = [*kinds, tokenizer.model_input_names, tokenizer.special_tokens_map, encoder.chat.markers, told]
    facts += [getattr(tokenizer, "split_special_tokens", None), len(tokenizer)]
    source = sha256(b"".join(Path(str(maker.__file__)).read_bytes() for maker in _makers(encoder) or ())).hexdigest()
    return [_FORMAT, source, encoder.fingerprint, repr(facts), *map(_version, _LIBRARIES)]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _pack(found: Mapping[int, EncodedGroup]) -> tuple[list[list[Any]], dict[str, Any]]:
    """Lengths of each group's tensors, and the tensors one after another."""
    pools: dict[str, list[Tensor]] = {pool: [] for pool in _POOLS}
    rows: list[list[Any]] = []
    for position, each in found.items():
        if any(value.dtype != torch.int64 or value.ndim != 1 for value in each.aligned.values()):
            continue
        pools["ids"] += [each.prefix_ids, *each.response_ids]
        pools["weights"] += each.weights
        pools["pairs"].append(each.pairs.reshape(-1))
        pools["margin"].append(each.margin)
        pools["flags"] += [getattr(each, name) for name in each.flags]
        pools["aligned"] += each.aligned.values()
        slots = [len(ids) for ids in each.response_ids]
        rows.append([position, len(each.prefix_ids), slots, list(each.responses), each.num_pairs, list(each.aligned)])
    joined = {pool: np.concatenate([np.empty(0, t), *(x.numpy() for x in pools[pool])]) for pool, t in _POOLS.items()}
    return rows, {pool: values.astype(_POOLS[pool], copy=False) for pool, values in joined.items()}


def _content(rows: Sequence[Any], pools: Mapping[str, np.ndarray]) -> str:
    """Hash of a block's contents; zip's own sums are not looked at by all readers."""
    digest = sha256(json.dumps(rows).encode())
    for pool, dtype in _POOLS.items():
        if pools[pool].dtype != dtype or pools[pool].ndim != 1:
            raise ValueError(f"{pool} are {pools[pool].dtype}, not {np.dtype(dtype)}")
        digest.update(np.ascontiguousarray(pools[pool]).data)
    return digest.hexdigest()


def _unpack(
    rows: Sequence[Sequence[Any]],
    arrays: Mapping[str, np.ndarray],
    groups: Sequence[PreferenceGroup],
    makes: type[EncodedGroup],
) -> dict[int, EncodedGroup]:
    pools = {pool: torch.from_numpy(values) for pool, values in arrays.items()}
    at = dict.fromkeys(pools, 0)

    def take(pool: str, length: int) -> Tensor:
        start = at[pool]
        at[pool] += length
        if not 0 <= start <= at[pool] <= len(pools[pool]):
            raise ValueError("it ends early")
        return pools[pool][start : at[pool]]

    found = {}
    for position, prefix, slots, responses, pairs, aligned in rows:
        group = groups[position]
        flags: dict[str, Any] = {name: take("flags", pairs) for name in makes.flags}
        found[position] = makes(
            id=group.id,
            prefix_ids=take("ids", prefix),
            response_ids=tuple(take("ids", length) for length in slots),
            weights=tuple(take("weights", length) for length in slots),
            responses=tuple(responses),
            pairs=take("pairs", 2 * pairs).view(-1, 2),
            margin=take("margin", pairs),
            aligned={name: take("aligned", prefix) for name in aligned},
            images=len(group.images),
            **flags,
        )
    return found
