"""All before the first step, in order: rows, model, data, resume check, reference, answers before, optimiser.

What can be refused is refused early: a changed setting before the reference is computed, a missing margin or a prefix
that does not compare before the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.batch import GroupBatch
from mmrlhf.config import TrainConfig
from mmrlhf.models import liger
from mmrlhf.train import resume, setup, shard
from mmrlhf.train.distributed import World
from mmrlhf.train.objective import Objective
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.preempt import Preemption
from mmrlhf.train.reference import reference_key
from mmrlhf.train.resume import Progress
from mmrlhf.train.run import RunFolder
from mmrlhf.train.samples import Samples
from mmrlhf.train.scoring import Keep, reference_scores
from mmrlhf.train.shard import Shards
from mmrlhf.train.state import seed_everything, text_fingerprint
from mmrlhf.train.vision_cache import Batches, features_frozen, open_cache


@dataclass(frozen=True)
class Ready:
    """A run that can take its next step."""

    model: Any
    processor: Any
    dataset: Any  # PreferenceDataset
    plan: setup.Plan
    objective: Objective
    optimizer: Optimizer
    progress: Progress
    samples: Samples
    make_batch: Callable[[Sequence[int]], GroupBatch]  # indices into the data -> a batch on the CPU, reference included
    keep: Keep  # features that a step computed go to the cache
    share_prefix: bool
    hashes: dict[str, str]  # of the data and of where the run started
    world: World
    shards: Shards


def prepare(
    settings: TrainConfig,
    run: RunFolder,
    preemption: Preemption,
    world: World,
    model: Any,
    processor: Any,
    given: Objective | None = None,
) -> Ready:
    """Everything up to the first step, or the step after the newest checkpoint. Raises as `loop.train` does."""
    found = resume.find(run, settings, world)
    seed_everything(settings.seed)
    objective = given or Objective(settings.loss, backend=settings.backend)
    rows = setup.read_rows(settings)
    rows.groups = objective.groups(rows.groups)
    preemption.check()
    model, processor = setup.load_model(settings, model, processor)
    setup.refuse_float16(model, settings)
    cache = open_cache(model, settings, fs=run.fs)
    if cache is not None:
        run.facts["vision_cache"] = {"folder": str(cache.place), "key": cache.key, "bytes_before": cache.used}
    preemption.check()
    dataset = setup.read_data(settings, processor, run, rows=rows, encoder=objective.encoder)
    preemption.check()
    share_prefix = setup.prefix_sharing(model, settings, run)
    lengths = setup.decoder_lengths(dataset, settings, share_prefix=share_prefix, run=run)
    objective.check_groups(dataset.groups, settings.data.pairs)
    batches = Batches(dataset, apart=features_frozen(model, settings), cache=cache)
    key = _reference_key(model, settings, share_prefix=share_prefix, apart=batches.apart)
    hashes = {
        "the data or the processor": text_fingerprint(*(dataset.row_hash(index) for index in range(len(dataset)))),
        "the starting model, the libraries, the backend or the device": key,
    }
    if found is not None:
        resume.check_same(found, settings, run, hashes=hashes, processes=world.size)
    run.begin()

    # The reference is the model as it starts: before LoRA, and before the weights of a checkpoint.
    reference = None
    if objective.needs_reference:
        reference = reference_scores(
            *(model, batches, settings),
            key=key,
            lengths=lengths,
            share_prefix=share_prefix,
            between=preemption.check,
            fs=run.fs,
            world=world,
        )
        run.facts["reference"] = {"key": key, "shards_read": reference.reused, "shards_computed": reference.computed}
    samples = Samples(run.path, dataset.groups, dataset.encoder.root, settings)
    if world.first:
        samples.before(model, processor, keep=found is not None)

    def make_batch(indices: Sequence[int]) -> GroupBatch:
        batch = objective.batch(batches(indices), dataset, indices)
        return batch if reference is None else reference.attach(batch, indices)

    model = setup.make_trainable(model, settings, run)
    objective.attach(model)
    world.spread_weights(model)
    plan = setup.Plan(lengths, settings, world)
    setup.self_check(model, make_batch(plan.whole(0)[0]), settings, run)
    shards = shard.shard(model, settings, world, shard.picture_kinds(dataset) if settings.shard != "none" else ())
    optimizer = Optimizer(model.named_parameters(), settings.optim, rounded=shards.rounded)
    with contextlib.ExitStack() as undo:
        undo.callback(optimizer.close)  # a model that was given is given back without hooks
        progress = resume.restore(found, model, optimizer, settings, world)
        run.facts.update(steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total, processes=world.size)
        run.write()
        undo.pop_all()
    return Ready(
        *(model, processor, dataset, plan, objective, optimizer, progress, samples),
        *(make_batch, batches.keep, share_prefix, hashes, world, shards),
    )


def _reference_key(model: Any, settings: TrainConfig, *, share_prefix: bool, apart: bool) -> str:
    """`reference_key`, and what this run adds to how the numbers are made."""
    key = reference_key(model, share_prefix=share_prefix, backend=settings.backend)
    return text_fingerprint(key, f"apart={apart}", *liger.applied(model))


def cache_only(settings: TrainConfig) -> Path:
    """`mmrlhf reference`: compute and keep the reference of a recipe, and nothing else. Returns its folder."""
    setup.single_process("mmrlhf reference")
    setup.check_objective(settings, None, command="reference")
    if not Objective(settings.loss).needs_reference:
        raise ValueError(f"loss.kind {settings.loss.kind} compares with no reference: there is none to compute")
    setup.check_paths(settings)
    rows = setup.read_rows(settings)
    model, processor = setup.load_model(settings, None, None)
    cache = open_cache(model, settings)
    dataset = setup.read_data(settings, processor, rows=rows)
    share_prefix = setup.prefix_sharing(model, settings)
    batches = Batches(dataset, apart=features_frozen(model, settings), cache=cache)
    key = _reference_key(model, settings, share_prefix=share_prefix, apart=batches.apart)
    lengths = setup.decoder_lengths(dataset, settings, share_prefix=share_prefix)
    with Preemption() as preemption:
        found = reference_scores(
            model,
            batches,
            settings,
            key=key,
            lengths=lengths,
            share_prefix=share_prefix,
            between=preemption.check,
        )
    return found.folder
