"""Going on where a run stopped: what is saved, what is compared, and what is put back.

A checkpoint has the weights (LoRA: the adapters alone), AdamW's state (both whole, or in the rows of each process; what
one kind of run wrote the other reads), and in state.json the number of steps done, the counters, every random
generator, the settings, and hashes of the data and of the starting weights. The order of the data follows from the
seed and the step. Resuming with other settings, data or starting weights is refused with a list
of what differs, unless `resume_changed` says otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrlhf.config import TrainConfig
from mmrlhf.models import parts
from mmrlhf.ops.sharded import is_dtensor, local_rows
from mmrlhf.train import checkpoint, shard
from mmrlhf.train.checkpoint import Checkpoint, Rows, Tensors
from mmrlhf.train.distributed import World
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.run import RunFolder
from mmrlhf.train.state import differences, flat_settings, restore_rng, rng_state, seed_everything, versions

if TYPE_CHECKING:
    from mmrlhf.train.prepare import Ready


@dataclass
class Progress:
    """How far the run is; all of it goes into state.json."""

    step: int = 0  # optimiser steps done, skipped ones included
    skipped: int = 0  # of these, the ones whose loss or gradient was not finite
    skipped_in_a_row: int = 0
    tokens: int = 0  # through the decoder
    saved: int = -1  # step of the newest checkpoint

    def count(self, *, good: bool, tokens: int) -> None:
        """One more step."""
        self.step += 1
        self.tokens += tokens
        self.skipped += not good
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1


def find(run: RunFolder, settings: TrainConfig, world: World) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder, or None where a run is to start.

    Of several processes the first reads every byte to know which one is whole; the others take its word.

    Raises CheckpointError if there are checkpoints and none is whole, ValueError if there is one and `resume` is off.
    """
    if not settings.resume:
        if checkpoint.listed(run.checkpoints):
            raise ValueError(
                f"resume is false, but {run.path} already has checkpoints: choose another output, or remove them"
            )
        return None
    path, skipped = checkpoint.latest(run.checkpoints) if world.first else (None, [])
    for each, reason in skipped:
        run.note(f"checkpoint {each.name} is skipped: {reason}")
    path = world.gather(path)[0]
    if path is None:
        return None
    found = checkpoint.load(path, verified=True)
    run.facts["resumed_from"] = path.name
    run.note(f"resuming from {path.name}")
    return found


def check_same(
    found: Checkpoint, settings: TrainConfig, run: RunFolder, *, hashes: Mapping[str, str], processes: int = 1
) -> None:
    """Raise ValueError listing the differences to the checkpoint, or note them if `resume_changed` is set."""
    changed = differences(found.state["settings"], flat_settings(settings))
    if (before := len(found.state["rng"])) != processes:
        changed.append(f"processes: {before} -> {processes}")
    for name, now in hashes.items():
        before = found.state["hashes"].get(name)
        if before != now:
            changed.append(f"{name}: hash {str(before)[:12]} -> {now[:12]}")
    if not changed:
        return
    if not settings.resume_changed:
        raise ValueError(
            f"{found.path} belongs to a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nPut them back, choose another output, or set resume_changed=true to go on all the same"
        )
    for line in changed:
        run.note(f"resumed with a change: {line}")


def restore(
    found: Checkpoint | None, model: nn.Module, optimizer: Optimizer, settings: TrainConfig, world: World
) -> Progress:
    """Weights, optimiser state and random generators of the checkpoint, or the seed where there is none.

    Each process draws from its own generators: one dropout mask would otherwise fall on every share of a step.
    """
    if found is None:
        seed_everything(settings.seed + world.rank)
        return Progress()
    stored, ranges = found.model, {}
    saved = saved_tensors(model, adapters_only=settings.lora.enabled)
    if set(saved) != set(stored):
        odd = sorted(set(saved) ^ set(stored))
        raise ValueError(f"{found.path} does not fit the model: {len(odd)} tensors differ, for example {odd[0]}")
    with torch.no_grad():
        for name, tensor in saved.items():
            if tuple(tensor.shape) != stored.shape(name):
                raise ValueError(
                    f"{found.path} does not fit the model: {name} is {stored.shape(name)} there and "
                    f"{tuple(tensor.shape)} here"
                )
            if is_dtensor(tensor):
                local, (start, _) = local_rows(tensor), shard.row_range(tensor)
                ranges[name] = (start, start + local.shape[0])
                local.copy_(stored.rows(name, *ranges[name]))
            else:
                tensor.copy_(stored[name])
    optimizer.load_state({key: _own(found.optimizer, key, ranges) for key in found.optimizer})
    progress = Progress(**found.state["progress"])
    # What `resume_changed` lets through: another number of processes, or another kind of device.
    seed_everything(settings.seed + world.rank + world.size * progress.step)
    generators = found.state["rng"]
    if len(generators) == world.size:
        restore_rng(generators[world.rank], parts.parameter_device(model))
    return progress


def _own(stored: Tensors, key: str, ranges: Mapping[str, tuple[int, int]]) -> Tensor:
    """This process's part of AdamW's state: its rows of what has rows, all of a step count."""
    own = ranges.get(key.rpartition("/")[0])
    return stored[key] if own is None or not stored.shape(key) else stored.rows(key, *own)


def saved_tensors(model: nn.Module, *, adapters_only: bool) -> dict[str, Tensor]:
    """What model.safetensors holds: parameters (a tied one once) and lasting buffers, or the trained ones alone."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or not adapters_only}
    if adapters_only:
        return parameters
    lasting = set(model.state_dict(keep_vars=True))
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in lasting}


def save(run: RunFolder, ready: Ready, settings: TrainConfig) -> None:
    """Write a checkpoint of this moment, unless it has one, and drop the oldest. Raises OSError if the disk fails.

    Of several processes the first writes, and each its own rows of a model that is cut; all raise if one fails. The
    others tell the first where their random generators are.
    """
    progress, world, shards = ready.progress, ready.world, ready.shards
    if progress.saved == progress.step:
        return
    generators = world.gather(rng_state(parts.parameter_device(ready.model)))

    def write(world: World | None = None) -> None:
        tensors = saved_tensors(ready.model, adapters_only=settings.lora.enabled)
        ranges = {name: shard.row_range(tensor) for name, tensor in tensors.items() if is_dtensor(tensor)}
        optimizer: dict[str, Tensor | Rows] = {}
        for key, value in ready.optimizer.state().items():
            own = ranges.get(key.rpartition("/")[0])
            optimizer[key] = value if own is None or value.dim() == 0 else Rows(value, *own)
        checkpoint.save(
            run.checkpoints,
            progress.step,
            model={name: shards.stored(name, tensor) for name, tensor in tensors.items()},
            optimizer=optimizer,
            state={
                "progress": dataclasses.asdict(progress) | {"saved": progress.step},
                "rng": generators,
                "settings": flat_settings(settings),
                "hashes": ready.hashes,
                "versions": versions(),
            },
            fs=run.fs,
            world=world,
        )

    if shards.root is not None:
        write(world)
    else:
        checkpoint.together(world, write if world.first else lambda: None)
    progress.saved = progress.step
    run.facts.update(steps=progress.step, skipped_steps=progress.skipped, tokens=progress.tokens)
    run.write()
    if world.first:
        checkpoint.prune(run.checkpoints, keep_last=settings.keep_last, fs=run.fs)


def save_or_warn(run: RunFolder, ready: Ready, settings: TrainConfig) -> None:
    """The same for a save in the middle of a run: a full disk is told about and counted, and the run goes on."""
    try:
        save(run, ready, settings)
    except OSError as error:
        run.facts["failed_saves"] = run.facts.get("failed_saves", 0) + 1
        run.note(f"step {ready.progress.step} is not saved: {error}. The checkpoints before it are as they were")
