"""Reference log-probabilities: computed once, by the model as it starts, and kept on disk token by token.

    reference/<first 16 digits of the key>/<shard key>.safetensors     {"0": [n_0], "1": [n_1], …}  float32, nats

The reference is the model before training, so no second copy of it is ever in memory. A shard holds up to SHARD_GROUPS
consecutive groups, always computed in the same batches, so a run that was killed halfway ends with bitwise the same
numbers. Its name is a hash over everything the numbers depend on: weights, model config, library versions, ops backend,
kind of device, batch plan, and each group's text, pictures, processor (image backend included) and encoding. Another
key is another file: nothing stale can be read.

Not covered: several runs filling one cache together (the processes of one run do).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf.batch import GroupBatch
from mmrlhf.models import load
from mmrlhf.ops.backend import choose
from mmrlhf.train.distributed import World
from mmrlhf.train.files import FileSystem, safetensors_chunks, write_atomic
from mmrlhf.train.state import fingerprint, text_fingerprint, versions

SHARD_GROUPS = 256  # lost at most by a kill
_FORMAT = "3"  # of the shards and their key; part of it
# What a config says besides how the model computes; dtypes are those of the weights.
_NOT_COMPUTED = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_LIBRARIES = ("torch", "transformers", "tokenizers", "pillow")


@dataclass(frozen=True)
class ReferenceScores:
    """The cache of one data set: `scores[i]` is [n_i] float32, nats, the response tokens of group i in batch order."""

    folder: Path
    key: str  # 64 hex digits
    tokens: tuple[Tensor, ...]
    reused: int  # shards read from the disk
    computed: int  # shards computed now, by any process

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]

    def attach(self, batch: GroupBatch, indices: Sequence[int]) -> GroupBatch:
        """The batch of these groups, in this order, with its `reference_logp` [N]."""
        reference_logp = torch.cat([self.tokens[index] for index in indices])
        if reference_logp.numel() != batch.num_scored:
            raise RuntimeError(
                f"the reference of groups {', '.join(batch.ids)} has {reference_logp.numel()} tokens, "
                f"the batch scores {batch.num_scored}"
            )
        return batch.replace(reference_logp=reference_logp)


def cache_reference(
    score: Callable[[GroupBatch], Tensor],  # batch on the CPU -> [N] log-probabilities
    make_batch: Callable[[Sequence[int]], GroupBatch],
    dataset: Any,  # PreferenceDataset
    folder: Path,
    *,
    key: str,
    lengths: Sequence[int],  # tokens of each group through the decoder
    tokens_per_batch: int,
    between: Callable[[], None] = lambda: None,
    fs: FileSystem | None = None,
    world: World | None = None,
) -> ReferenceScores:
    """Read what the cache has, compute and write what it lacks. Of several processes each fills every size-th shard.

    `key` stands for the model (see `reference_key`); data and processor are added here, row by row. `between` runs
    after every batch and may raise to stop; whole shards stay. Raises ValueError naming the group if the model gives a
    log-probability that is not finite.
    """
    from tqdm import tqdm

    fs, world = fs or FileSystem(), world or World()
    place = folder / key[:16]
    place.mkdir(parents=True, exist_ok=True)
    shards = [range(at, min(at + SHARD_GROUPS, len(dataset))) for at in range(0, len(dataset), SHARD_GROUPS)]
    with tqdm(total=len(dataset), desc="reference", unit="group", leave=False, disable=None) as bar:

        def filled(shard: range) -> tuple[list[Tensor], bool]:
            """The groups of a shard, and whether they were computed now."""
            rows = [dataset.row_hash(index) for index in shard]
            shard_key = text_fingerprint(key, str(tokens_per_batch), *rows)
            path = place / f"{shard_key[:32]}.safetensors"
            found = read_shard(path, shard_key, len(shard))
            if found is not None:
                bar.update(len(shard))
                return found, False
            found = []
            for indices in _batches(shard, lengths, tokens_per_batch):
                found.extend(_score_groups(score, make_batch(indices)))
                bar.update(len(indices))
                between()
            write_shard(path, shard_key, found, fs=fs)
            return found, True

        computed: set[int] = set()
        if world.size > 1:  # then all are there, or (folders that are not shared) each computes what it lacks
            own = range(world.rank, len(shards), world.size)
            computed.update(*world.gather({number for number in own if filled(shards[number])[1]}))
            bar.reset()
        everything = [filled(shard) for shard in shards]
    computed |= {number for number, (_, new) in enumerate(everything) if new}
    tokens = tuple(values for found, _ in everything for values in found)
    return ReferenceScores(place, key, tokens, len(shards) - len(computed), len(computed))


def _batches(indices: Iterable[int], lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Consecutive groups up to the token budget; a longer group goes alone."""
    batches: list[list[int]] = []
    filled = 0
    for index in indices:
        if not batches or filled + lengths[index] > tokens_per_batch:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += lengths[index]
    return batches


def _score_groups(score: Callable[[GroupBatch], Tensor], batch: GroupBatch) -> list[Tensor]:
    """One [n] tensor a group of the batch."""
    sizes = [0] * batch.num_groups
    for length, group in zip(batch.response_len.tolist(), batch.response_group.tolist(), strict=True):
        sizes[group] += length
    groups = list(score(batch).detach().to("cpu", torch.float32).split(sizes))
    for name, values in zip(batch.ids, groups, strict=True):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"group {name}: the starting model gives log-probabilities that are not finite")
    return [values.clone() for values in groups]


def write_shard(path: Path, shard_key: str, groups: Sequence[Tensor], *, fs: FileSystem | None = None) -> None:
    """One [n] float32 tensor a group, under a name that always stands for a whole file."""
    tensors = {str(position): values for position, values in enumerate(groups)}
    metadata = {"key": shard_key, "content": fingerprint(tensors)}
    write_atomic(path, safetensors_chunks(tensors, metadata=metadata), fs=fs)


def read_shard(path: Path, shard_key: str, count: int) -> list[Tensor] | None:
    """The groups of a shard, or None if it is not there or not whole (which is said)."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        warnings.warn(f"{path} is damaged ({error}); it is computed again", stacklevel=2)
        return None
    names = [str(position) for position in range(count)]
    if (
        metadata.get("key") != shard_key
        or metadata.get("content") != fingerprint(tensors)
        or set(names) != set(tensors)
    ):
        warnings.warn(f"{path} does not hold what its name says; it is computed again", stacklevel=2)
        return None
    return [tensors[name] for name in names]


def reference_key(
    model: torch.nn.Module, *, share_prefix: bool, backend: str | None = None, adapter: bool = True
) -> str:
    """A hash over the weights, the config and what runs them; the processor is in every group's `row_hash`.

    Two models of the same weights that compute differently (an epsilon, the vision layer that is read, a soft cap, the
    scaling of an adapter) have different keys; where a model was loaded from does not matter. `backend`: as for
    `linear_logp`; the one that would run counts, and RuntimeError is raised where none can. `adapter=False`: the key of
    the model with its PEFT adapters switched off, whatever their weights are.
    """
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    if not adapter:
        weights = _without_adapters(model, weights)
    libraries = {name: version for name, version in versions().items() if name in _LIBRARIES}
    head = load.lm_head(model)
    whole = load.base_model(model)
    adapters = {
        name: [module.scaling, list(module.active_adapters), module.disable_adapters]
        for name, module in model.named_modules()
        if adapter and isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "active_adapters")  # peft
    }
    return text_fingerprint(
        _FORMAT,
        type(whole).__qualname__,
        fingerprint(weights),
        json.dumps([_computed(whole.config.to_dict()), adapters], sort_keys=True, default=str),
        json.dumps(libraries, sort_keys=True),
        f"share_prefix={share_prefix}",
        f"backend={choose('linear_logp', head.weight, requested=backend).name}",
        f"device={head.weight.device.type}",
    )


def _without_adapters(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that a model has without PEFT: `base_layer` and `original_module`, not what lies beside them."""
    kept = dict(weights)
    for name, module in model.named_modules():
        inside = next((part for part in ("base_layer", "original_module") if hasattr(module, part)), None)
        if inside is not None:
            own = f"{name}.{inside}."
            kept = {key: value for key, value in kept.items() if not key.startswith(f"{name}.") or key.startswith(own)}
    return kept


def _computed(value: Any) -> Any:
    """A config's dict without what does not change the numbers, at any depth, with the keys JSON would give it."""
    if isinstance(value, dict):
        return {str(key): _computed(item) for key, item in value.items() if key not in _NOT_COMPUTED}
    if isinstance(value, (list, tuple)):
        return [_computed(item) for item in value]
    return value
