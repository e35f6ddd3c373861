"""What each process of test_shard runs: `torchrun --nproc_per_node 2 shard_worker.py JOBS.json` (gloo, CPU).

JOBS: a list of {"words": settings, "gone_after": steps, "poisoned": step, "held": file}, the last three as wanted.
One launch trains them all, one after another, in one process group.
"""

from __future__ import annotations

import json
import math
import sys
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.fsdp

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from mmrlhf import config  # noqa: E402
from mmrlhf.ops.sharded import is_dtensor, local_rows  # noqa: E402
from mmrlhf.train import shard  # noqa: E402
from mmrlhf.train.distributed import leave  # noqa: E402
from mmrlhf.train.loop import train  # noqa: E402
from mmrlhf.train.optim import Optimizer  # noqa: E402

FULLY_SHARD = torch.distributed.fsdp.fully_shard
STEP, TAKE, CLOSE, CUT = Optimizer.step, Optimizer.take_shards, Optimizer.close, shard.shard


class Gone(Exception):
    """What ends a run in the middle."""


def gone_after(steps: int | None):
    """`Optimizer.step`, but for the step after so many."""
    done = 0

    def step(self, **options):
        nonlocal done
        if done == steps:
            raise Gone
        done += 1
        STEP(self, **options)

    return step


def poisoned(at: int | None):
    """`Optimizer.take_shards`, with a NaN in one gradient of the second process alone, in one step."""
    done = 0

    def take(self):
        nonlocal done
        TAKE(self)
        done += 1
        if done == at and dist.get_rank() == 1:
            next(p.grad for p in self.stepped.values() if p.grad is not None and p.numel()).fill_(math.nan)

    return take


def noted(held: dict):
    """`shard.shard` and `Optimizer.close`, which leave the model and the optimiser in `held`."""

    def cut(model, *options):
        held["model"] = model
        before: list[weakref.ref] = []

        def fully_shard(module, **given):
            alive = [each for each in before if each() is not None]
            assert not alive, "what an earlier block was cut from is held on to, a second model in memory"
            kept = given["ignored_params"]
            before.extend(weakref.ref(p) for p in module.parameters() if p not in kept and not is_dtensor(p))
            return FULLY_SHARD(module, **given)

        torch.distributed.fsdp.fully_shard = fully_shard
        return CUT(model, *options)

    def close(self):
        held["optimizer"] = self
        CLOSE(self)

    return cut, close


def sizes(held: dict) -> dict[str, int]:
    """Bytes that this process keeps from step to step."""
    weights = [*held["model"].parameters(), *held["model"].buffers()]
    rows = [local_rows(each) if is_dtensor(each) else each for each in weights]
    stepped = held["optimizer"].stepped.values()
    return {
        "weights": sum(each.numel() * each.element_size() for each in rows),
        "moments": sum(
            held["optimizer"].adamw.state[each][key].numel() * 4
            for each in stepped
            for key in ("exp_avg", "exp_avg_sq")
        ),
        "gradients": sum(each.numel() * 4 for each in stepped),
    }


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for job in json.loads(path.read_text()):
        Optimizer.step, Optimizer.take_shards = gone_after(job.get("gone_after")), poisoned(job.get("poisoned"))
        held: dict = {}
        shard.shard, Optimizer.close = noted(held)
        try:
            train(config.load(None, job["words"]))
        except Gone:
            assert job.get("gone_after") is not None
        if "held" in job and dist.get_rank() == 0:
            Path(job["held"]).write_text(json.dumps(sizes(held)))
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
