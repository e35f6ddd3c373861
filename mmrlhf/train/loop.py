"""The training loop, to be read from top to bottom.

A step takes `groups_per_step` groups in micro-batches of at most `tokens_per_batch` tokens; the loss of each is
normalised by the totals of the step, so how the step is cut changes nothing. A step whose loss or gradient is not
finite leaves weights and moments as they were. SIGTERM ends the run after its step, saved, with exit code 143.
Resuming is exact: the order of the data follows from seed and step, all else lies in the checkpoint.

What comes before the first step is `prepare`. Under torchrun every process takes its share of each step's groups and
they meet at the gradients (`distributed`). Not covered: evaluation; the report (the command line writes it).
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from mmrlhf.config import TrainConfig
from mmrlhf.models import load
from mmrlhf.train import resume, setup
from mmrlhf.train.distributed import join
from mmrlhf.train.feed import feed
from mmrlhf.train.metrics import StepLog, tracker_starters
from mmrlhf.train.objective import Tally, Totals
from mmrlhf.train.optim import learning_rate
from mmrlhf.train.preempt import Preempted, Preemption
from mmrlhf.train.prepare import prepare
from mmrlhf.train.run import RunFolder
from mmrlhf.train.scoring import response_rows
from mmrlhf.train.state import flat_settings


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite. The weights are those of the last good one."""


def train(settings: TrainConfig, *, model: Any = None, processor: Any = None) -> Path:
    """Train as the settings say and return the run folder, `settings.output`.

    `model` and `processor`, if given, are used instead of what `settings.model.path` names (the model is trained in
    place). Raises ValueError for settings, data or a folder that cannot be used, FileNotFoundError for a model that is
    not there, BadRow for data, CheckpointError, NonFiniteError, OSError if the last save fails, and Preempted (a
    SystemExit) after a signal.
    """
    setup.check_paths(settings, model, processor)
    with (
        join(setup.pick_device(settings.device)) as world,
        RunFolder.of(settings, first=world.first) as run,
        Preemption() as preemption,
    ):
        trackers = tracker_starters(settings.trackers if world.first else (), run.path, flat_settings(settings))
        ready = prepare(settings, run, preemption, world, model, processor)
        model, plan, optimizer, progress = ready.model, ready.plan, ready.optimizer, ready.progress
        head = load.lm_head(model)
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
                tally = Tally(totals, tokens_per_batch=settings.tokens_per_batch)
                optimizer.zero_grad()
                for _ in plan[step]:
                    batch, hidden = response_rows(
                        model, next(batches), share_prefix=ready.share_prefix, keep=ready.keep
                    )
                    out = ready.objective(hidden, head, batch, totals)
                    out.loss.backward()
                    tally.add(out, batch)

                world.add_gradients(optimizer)
                numbers = tally.read(optimizer.grad_norm(), world)
                rate = learning_rate(step, plan.total, settings.optim)
                good = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
                if good:
                    optimizer.step(lr=rate, grad_norm=numbers["grad_norm"])
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
                if stop := world.largest(preemption.requested or 0, head.weight.device):
                    resume.save(run, ready, settings)
                    raise Preempted(stop, saved=True)

        resume.save(run, ready, settings)
        if world.first:
            setup.save_model(model, ready.processor, run)
            ready.samples.after(model, ready.processor)
        return run.path
