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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrlhf.config import TrainConfig
from mmrlhf.models import parts
from mmrlhf.ops.sharded import is_dtensor, local_rows
from mmrlhf.train import checkpoint, shard
from mmrlhf.train.checkpoint import Checkpoint, Rows, Tensors
from mmrlhf.train.distributed import World
from mmrlhf.train.optim import MASTER, Optimizer
from mmrlhf.train.run import RunFolder
from mmrlhf.train.state import (
    check_rng,
    differences,
    flat_settings,
    restore_rng,
    rng_state,
    seed_everything,
    versions,
)

if TYPE_CHECKING:
    from mmrlhf.train.prepare import Ready


MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter: all of it, or none


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

    Each process draws from its own generators: one dropout mask would otherwise fall on every share of a step. Raises
    ValueError for a checkpoint that does not fit in any of its parts; then none of them is changed, in any process.
    """
    if found is None:
        seed_everything(settings.seed + world.rank)
        return Progress()
    saved = saved_tensors(model, adapters_only=settings.lora.enabled)
    device = parts.parameter_device(model)
    progress: Progress = checkpoint.together(world, lambda: _check_fits(found, saved, optimizer, device, world))[
        world.rank
    ]
    stored, ranges = found.model, {}
    with torch.no_grad():
        for name, tensor in saved.items():
            if is_dtensor(tensor):
                local, (start, _) = local_rows(tensor), shard.row_range(tensor)
                ranges[name] = (start, start + local.shape[0])
                local.copy_(stored.rows(name, *ranges[name]))
            else:
                tensor.copy_(stored[name])
    state = {key: _own(found.optimizer, key, ranges) for key in found.optimizer}
    for name, stepped in optimizer.stepped.items():
        # A float32 run that goes on in bfloat16 (`resume_changed`) left no masters; they start as the saved weights,
        # or the first step would go back to those of the start.
        if stepped.dtype != optimizer.named[name].dtype and f"{name}/{MASTER}" not in state:
            state[f"{name}/{MASTER}"] = stored[name]
    optimizer.load_state(state)
    # What `resume_changed` lets through: another number of processes, or another kind of device.
    seed_everything(settings.seed + world.rank + world.size * progress.step)
    generators = found.state["rng"]
    if len(generators) == world.size:
        restore_rng(generators[world.rank], device)
    return progress


def _check_fits(
    found: Checkpoint, saved: Mapping[str, Tensor], optimizer: Optimizer, device: torch.device, world: World
) -> Progress:
    """How far a checkpoint is whose every name, shape and state fits this process; ValueError for another."""
    stored = found.model
    if set(saved) != set(stored):
        odd = sorted(set(saved) ^ set(stored))
        raise ValueError(f"{found.path} does not fit the model: {len(odd)} tensors differ, for example {odd[0]}")
    for name, tensor in saved.items():
        if tuple(tensor.shape) != stored.shape(name):
            raise ValueError(
                f"{found.path} does not fit the model: {name} is {stored.shape(name)} there and "
                f"{tuple(tensor.shape)} here"
            )
    _check_optimizer(found, optimizer)
    try:
        progress, generators = Progress(**found.state["progress"]), found.state["rng"]
        if any(type(count) is not int for count in dataclasses.astuple(progress)):
            raise TypeError(f"progress is {found.state['progress']}")
        if len(generators) == world.size:
            check_rng(generators[world.rank], device)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{found.path}: {checkpoint.STATE} does not say how to go on: {error}") from error
    return progress


def _check_optimizer(found: Checkpoint, optimizer: Optimizer) -> None:
    """ValueError for a state of other parameters or shapes, or one that lacks a part of what AdamW needs."""
    owners: dict[str, set[str]] = {}
    for key in found.optimizer:
        name, _, what = key.rpartition("/")
        owners.setdefault(name, set()).add(what)
    foreign = sorted(set(owners) - set(optimizer.named))
    if foreign:
        raise ValueError(
            f"{found.path} does not fit the optimiser: {len(foreign)} parameters are not trained here, for example "
            f"{foreign[0]}"
        )
    for name, parts_of in owners.items():
        if (parts_of - {MASTER}) not in (set(), set(MOMENTS)):
            raise ValueError(f"{found.path} does not fit the optimiser: {name} has {', '.join(sorted(parts_of))}")
        for what in parts_of:
            there = found.optimizer.shape(f"{name}/{what}")
            here = () if what == "step" else tuple(optimizer.named[name].shape)
            if there != here:
                raise ValueError(
                    f"{found.path} does not fit the optimiser: {name}/{what} is {there} there and {here} here"
                )


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

    Of several processes the first writes, and each its own rows of a model that is cut; whatever fails in one, all
    raise (`checkpoint.together`). The others tell the first where their random generators are.
    """
    progress, world, shards = ready.progress, ready.world, ready.shards
    if progress.saved == progress.step:
        return
    content: dict[str, dict[str, Tensor | Rows]] = {}

    def collect() -> dict[str, Any]:
        content.update(_content(ready, settings))
        return rng_state(parts.parameter_device(ready.model))

    generators = checkpoint.together(world, collect)

    def write(world: World | None = None) -> None:
        checkpoint.save(
            run.checkpoints,
            progress.step,
            model=content["model"],
            optimizer=content["optimizer"],
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

    def note() -> None:
        run.facts.update(steps=progress.step, skipped_steps=progress.skipped, tokens=progress.tokens)
        run.write()
        if world.first:
            checkpoint.prune(run.checkpoints, keep_last=settings.keep_last, fs=run.fs)

    if shards.root is not None:
        write(world)
    else:
        checkpoint.together(world, write if world.first else lambda: None)
    progress.saved = progress.step
    checkpoint.together(world, note)


def _content(ready: Ready, settings: TrainConfig) -> dict[str, dict[str, Tensor | Rows]]:
    """What this process has of the tensors of a checkpoint: nothing here waits for another."""
    tensors = saved_tensors(ready.model, adapters_only=settings.lora.enabled)
    ranges = {name: shard.row_range(tensor) for name, tensor in tensors.items() if is_dtensor(tensor)}
    optimizer: dict[str, Tensor | Rows] = {}
    for key, value in ready.optimizer.state().items():
        own = ranges.get(key.rpartition("/")[0])
        optimizer[key] = value if own is None or value.dim() == 0 else Rows(value, *own)
    return {
        "model": {name: ready.shards.stored(name, tensor) for name, tensor in tensors.items()},
        "optimizer": optimizer,
    }


def save_or_warn(run: RunFolder, ready: Ready, settings: TrainConfig) -> None:
    """The same for a save in the middle of a run: a full disk is told about and counted, and the run goes on."""
    try:
        save(run, ready, settings)
    except OSError as error:
        run.facts["failed_saves"] = run.facts.get("failed_saves", 0) + 1
        run.note(f"step {ready.progress.step} is not saved: {error}. The checkpoints before it are as they were")
