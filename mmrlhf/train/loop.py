"""The training loop, to be read from top to bottom.

A step takes `groups_per_step` groups in micro-batches of at most `tokens_per_batch` tokens; the loss of each is
normalised by the totals of the step, so how the step is cut changes nothing. A step whose loss or gradient is not
finite leaves weights and moments as they were. SIGTERM ends the run after its step, saved, with exit code 143.
Resuming is exact: the order of the data follows from seed and step, all else lies in the checkpoint.

What comes before the first step is `prepare`. Under torchrun every process takes its share of each step's groups; they
meet at the gradients (`distributed`), or at every layer of a model that is cut (`shard`). Not covered: evaluation; the
report (the command line writes it).
"""

from __future__ import annotations

import functools
import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrlhf.batch import GroupBatch
from mmrlhf.config import TrainConfig
from mmrlhf.models import load
from mmrlhf.train import resume, setup
from mmrlhf.train.distributed import join
from mmrlhf.train.feed import feed
from mmrlhf.train.metrics import StepLog, tracker_starters
from mmrlhf.train.objective import Objective, Tally, Totals
from mmrlhf.train.optim import learning_rate
from mmrlhf.train.preempt import Preempted, Preemption
from mmrlhf.train.prepare import Ready, prepare
from mmrlhf.train.run import RunFolder
from mmrlhf.train.scoring import response_rows
from mmrlhf.train.state import flat_settings


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. The weights are those of the last good one."""


def train(
    settings: TrainConfig, *, model: Any = None, processor: Any = None, objective: Objective | None = None
) -> Path:
    """Train as the settings say and return the run folder, `settings.output`.

    `model` and `processor`, if given, are used instead of what `settings.model.path` names (the model is trained in
    place; under `shard: full` it is cut, and left so). `objective`: what the steps minimise; preferences, as
    `settings.loss` says, unless it is given (a reward model's is `reward.train`). Raises ValueError for settings, data
    or a folder that cannot be used, FileNotFoundError for a model that is not there, BadRow for data, CheckpointError,
    NonFiniteError, OSError if the last save fails, and Preempted (a SystemExit) after a signal.
    """
    setup.check_objective(settings, objective)
    setup.check_paths(settings, model, processor)
    with (
        join(setup.pick_device(settings.device)) as world,
        RunFolder.of(settings, first=world.first) as run,
        Preemption() as preemption,
    ):
        trackers = tracker_starters(settings.trackers if world.first else (), run.path, flat_settings(settings))
        ready = prepare(settings, run, preemption, world, model, processor, objective)
        model, plan, optimizer, progress = ready.model, ready.plan, ready.optimizer, ready.progress
        device = load.lm_head(model).weight.device
        steps = range(progress.step, plan.total)
        jobs = (indices for step in steps for indices in plan[step])
        model.train()
        with (
            closing(optimizer),
            closing(feed(jobs, ready.make_batch, workers=settings.data.workers)) as batches,
            StepLog(run.path, trackers, done=progress.step, total=plan.total, first=world.first) as log,
        ):
            for step in steps:
                started = time.perf_counter()
                totals = Totals.of(ready.dataset, plan.whole(step))
                tally = ready.objective.tally(totals, tokens_per_batch=settings.tokens_per_batch)
                optimizer.zero_grad()
                own, count = plan.own(step), len(plan[step])
                for at in range(count):
                    ready.shards.reduce(at + 1 == count or settings.sync_each_batch)
                    noted = tally if at < own else None
                    ready.shards.run(micro_batch, ready, next(batches), totals, noted).backward()

                world.add_gradients(optimizer)
                numbers = tally.read(world.grad_norm(optimizer), world)
                rate = learning_rate(step, plan.total, settings.optim)
                good = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
                if good:
                    still = () if tally.images else ready.shards.pictured
                    optimizer.step(lr=rate, grad_norm=numbers["grad_norm"], without=still)
                progress.count(good=good, tokens=tally.tokens)

                if progress.step % settings.log_every == 0 or progress.step == plan.total or not good:
                    place = {"step": progress.step, "epoch": progress.step / plan.steps_per_epoch}
                    rest = {"learning_rate": rate, "skipped_steps": progress.skipped}
                    log.log(place | numbers | tally.counts() | rest | {"seconds": time.perf_counter() - started})
                log.show(numbers)
                if progress.skipped_in_a_row >= settings.max_bad_steps:
                    raise NonFiniteError(
                        f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; the "
                        f"last: loss {numbers['loss']}, gradient norm {numbers['grad_norm']}, groups {tally.names()}"
                    )
                if settings.save_every and progress.step % settings.save_every == 0:
                    resume.save_or_warn(run, ready, settings)
                if stop := world.largest(preemption.requested or 0, device):
                    resume.save(run, ready, settings)
                    raise Preempted(stop, saved=True)

        resume.save(run, ready, settings)
        finish(run, ready, settings)
        return run.path


def micro_batch(ready: Ready, batch: GroupBatch, totals: Totals, tally: Tally | None) -> Tensor:
    """The loss of one micro-batch, a 0-d tensor, noted in `tally`; without one it is a filler and counts 0 times."""
    tokens = setup.decoder_tokens(batch, share_prefix=ready.share_prefix)
    batch, hidden = response_rows(
        ready.model, batch, share_prefix=ready.share_prefix, keep=ready.keep, touch=ready.shards.touch
    )
    out = ready.objective(hidden, load.lm_head(ready.model), batch, totals)
    if tally is None:
        return out.loss * 0.0
    tally.add(out, batch, tokens)
    return out.loss


def finish(run: RunFolder, ready: Ready, settings: TrainConfig) -> None:
    """Write the trained model and its answers. The first process does; the others help where the model is cut."""
    first, shards, save = ready.world.first, ready.shards, ready.objective.save
    if not first and shards.root is None:
        return
    state = shards.whole(ready.model, adapters_only=settings.lora.enabled, keep=first)
    with shards.gathered():
        if first:
            write = save if state is None else functools.partial(save, state=state)
            setup.save_model(ready.model, ready.processor, run, write=write)
        ready.samples.after(ready.model, ready.processor, write=first)
