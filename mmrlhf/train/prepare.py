"""All before the first step, in order: rows, model, data, resume check, reference, answers before, optimiser.

What can be refused is refused early: a changed setting before the reference is computed, a missing margin or a prefix
that does not compare before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.batch import GroupBatch
from mmrlhf.config import TrainConfig
from mmrlhf.data.collate import collate
from mmrlhf.train import resume, setup
from mmrlhf.train.objective import Objective
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.preempt import Preemption
from mmrlhf.train.reference import reference_key
from mmrlhf.train.resume import Progress
from mmrlhf.train.run import RunFolder
from mmrlhf.train.samples import Samples
from mmrlhf.train.scoring import reference_scores
from mmrlhf.train.state import seed_everything, text_fingerprint


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
    share_prefix: bool
    hashes: dict[str, str]  # of the data and of where the run started


def prepare(settings: TrainConfig, run: RunFolder, preemption: Preemption, model: Any, processor: Any) -> Ready:
    """Everything up to the first step, or the step after the newest checkpoint. Raises as `loop.train` does."""
    found = resume.find(run, settings)
    seed_everything(settings.seed)
    rows = setup.read_rows(settings)
    preemption.check()
    model, processor = setup.load_model(settings, model, processor)
    setup.refuse_float16(model, settings)
    preemption.check()
    dataset = setup.read_data(settings, processor, run, rows=rows)
    preemption.check()
    share_prefix = setup.prefix_sharing(model, settings, run)
    objective = Objective(settings.loss, backend=settings.backend)
    objective.check_groups(dataset.groups, settings.data.pairs)
    key = reference_key(model, share_prefix=share_prefix, backend=settings.backend)
    hashes = {
        "the data or the processor": text_fingerprint(*(dataset.row_hash(index) for index in range(len(dataset)))),
        "the starting model, the libraries, the backend or the device": key,
    }
    if found is not None:
        resume.check_same(found, settings, run, hashes=hashes)
    run.begin()

    # The reference is the model as it starts: before LoRA, and before the weights of a checkpoint.
    reference = None
    if objective.needs_reference:
        reference = reference_scores(
            model, dataset, settings, key=key, share_prefix=share_prefix, between=preemption.check, fs=run.fs
        )
        run.facts["reference"] = {"key": key, "shards_read": reference.reused, "shards_computed": reference.computed}
    samples = Samples(run.path, dataset.groups, dataset.encoder.root, settings)
    samples.before(model, processor, keep=found is not None)

    def make_batch(indices: Sequence[int]) -> GroupBatch:
        batch = collate([dataset[index] for index in indices])
        return batch if reference is None else reference.attach(batch, indices)

    model = setup.make_trainable(model, settings, run)
    plan = setup.Plan(dataset.lengths, settings)
    setup.self_check(model, make_batch(plan[0][0]), settings, run)
    optimizer = Optimizer(model.named_parameters(), settings.optim)
    progress = resume.restore(found, model, optimizer, settings)
    run.facts.update(steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total)
    run.write()
    return Ready(
        model, processor, dataset, plan, objective, optimizer, progress, samples, make_batch, share_prefix, hashes
    )


def cache_only(settings: TrainConfig) -> Path:
    """`mmrlhf reference`: compute and keep the reference of a recipe, and nothing else. Returns its folder."""
    setup.single_process()
    setup.check_paths(settings)
    rows = setup.read_rows(settings)
    model, processor = setup.load_model(settings, None, None)
    dataset = setup.read_data(settings, processor, rows=rows)
    share_prefix = setup.prefix_sharing(model, settings)
    key = reference_key(model, share_prefix=share_prefix, backend=settings.backend)
    with Preemption() as preemption:
        found = reference_scores(model, dataset, settings, key=key, share_prefix=share_prefix, between=preemption.check)
    return found.folder
