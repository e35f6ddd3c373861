"""What each process of test_dummy runs: `torchrun --nproc_per_node 2 tower_worker.py OUT` (gloo, CPU).

Rank 0 has pictures, rank 1 text alone, under `fully_shard` and under DDP, with a trained and with a frozen tower: the
loss of each and the mean gradients must be those of one process that runs both batches.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from mmrlhf.models import shared_prefix, vision  # noqa: E402
from mmrlhf.models.parts import decoder, inner_model, vision_modules  # noqa: E402
from mmrlhf.train.distributed import leave  # noqa: E402
from tiny import batch_of, tiny_groups, tiny_model  # noqa: E402


class Scored(nn.Module):
    """A forward that runs the packed path inside a wrapper's own, as the drop-ins do."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        hidden = shared_prefix.response_hidden(self.model, shared_prefix.prepare(self.model, batch))
        return hidden.pow(2).mean()


def sharded(module: Scored) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in decoder(module.model).layers:
        fully_shard(layer)
    for _, part in vision_modules(module.model):
        for block in getattr(part, "blocks", ()):
            fully_shard(block)
        fully_shard(part)
    fully_shard(module)
    return module


def check(family: str, wrap, *, trained: bool) -> int:
    """How many gradients were compared; raises where anything differs."""
    rank = dist.get_rank()
    model, processor = tiny_model(family)
    if not trained:
        vision.freeze(model)
    model.get_output_embeddings().requires_grad_(False)  # no head runs here
    batches = [batch_of(tiny_groups(processor, (2, 3), seed=4, images=images)) for images in ((1, 2), (0, 0))]
    alone = Scored(copy.deepcopy(model))
    calls: list[int] = []
    name = vision_modules(alone.model)[0][0]
    getattr(inner_model(alone.model), name).register_forward_hook(lambda *_: calls.append(1))
    dummy = vision.dummy.needed
    vision.dummy.needed = lambda model: False  # one process: text alone runs no tower
    want = [alone(batch) for batch in batches]
    vision.dummy.needed = dummy
    assert len(calls) == 1
    (sum(want) / 2).backward()

    module = wrap(Scored(model))
    for _ in range(2):  # a second step would meet what a first one left behind
        module.zero_grad()
        loss = module(batches[rank])
        loss.backward()
    torch.testing.assert_close(loss, want[rank], rtol=1e-5, atol=1e-7)
    compared = 0
    inside = module.module if wrap is not sharded else module
    tower = {f"model.{path}" for path, _ in model.named_parameters() if path.startswith(f"model.{name}")}
    for (path, ours), (_, true) in zip(inside.named_parameters(), alone.named_parameters(), strict=True):
        if true.grad is None:
            assert ours.grad is None or path not in tower or not trained, path
            continue
        grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        torch.testing.assert_close(grad, true.grad, rtol=1e-4, atol=1e-6, msg=path)
        compared += path in tower if trained else 1
    return compared


def main(out: Path) -> None:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo")
    for what, wrap, family, trained in (
        ("sharded-trained", sharded, "qwen3_vl", True),
        ("sharded-frozen", sharded, "qwen2_5_vl", False),
        ("ddp-trained", DistributedDataParallel, "qwen2_5_vl", True),
    ):
        compared = check(family, wrap, trained=trained)
        assert compared > 10, compared
        if dist.get_rank() == 0:
            (out / f"{what}.ok").write_text(str(compared))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
