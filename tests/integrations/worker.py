"""What each process of test_distributed runs: `torchrun --nproc_per_node N worker.py ddp|fsdp OUT` (gloo, CPU)."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

from dporows import logged, model_and_processor, run, trl_rows  # noqa: E402
from mmrlhf.train.distributed import leave  # noqa: E402


def ddp(out: Path) -> None:
    """Four global rows a step, whatever the number of processes; the trained weights and what was logged."""
    from datasets import Dataset

    from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{**row, "margin": 0.5 + index} for index, row in enumerate(trl_rows(7))]
    uneven = [_ranked(row, 2 + index % 2) for index, row in enumerate(rows)]
    for name, options in {
        "live": {"segments": "paper", "gamma": 3.0, "beta_mode": "margin"},
        "cached": {"precompute_ref_log_probs": True, "gradient_checkpointing": True},
        "lora": {"peft": True, "reduction": "mean"},
        "accumulated": {"gradient_accumulation_steps": 2},
    }.items():
        at_once = 4 // options.get("gradient_accumulation_steps", 1)
        model, processor = model_and_processor("llava_onevision")
        _, trainer = run(
            PreferenceTrainer,
            PreferenceConfig,
            model,
            processor,
            Dataset.from_list(uneven if name == "accumulated" else rows),
            out / name,
            steps=4,
            per_device_train_batch_size=at_once // world,
            dataloader_drop_last=True,
            **options,
        )
        if trainer.accelerator.num_processes != world:
            raise RuntimeError(f"{trainer.accelerator.num_processes} processes, wanted {world}")
        if trainer.is_world_process_zero():
            names = ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "rewards/accuracies", "entropy")
            log = {key: logged(trainer, key) for key in names}
            weights = {k: v for k, v in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()}
            torch.save({"log": log, "weights": weights}, out / f"{name}-{world}.pt")
    if dist.is_initialized():  # by the trainer, which leaves it so
        leave()


def _ranked(row: dict, count: int) -> dict:
    """The row's two responses, or those and a third: one pair, or three."""
    texts = [row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")]
    responses, scores = [*texts, "a dog"][:count], [2.0, 1.0, 0.0][:count]
    return {"images": row["images"], "prompt": row["prompt"], "responses": responses, "scores": scores}


def fsdp(out: Path) -> None:
    """Loss and full gradients of two batches under `fully_shard`, a rank each, against one process that runs both."""
    from torch.distributed.fsdp import fully_shard

    from mmrlhf.integrations.forward import add_forward
    from mmrlhf.integrations.objective import LossSettings, objective
    from mmrlhf.integrations.rows import BATCH, PreferenceCollator

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    settings = LossSettings(beta=0.3, reduction="mean")
    for family, trained_head, own_unit in (
        ("qwen2_5_vl", True, False),
        ("llava_onevision", False, False),
        ("llava_onevision", True, True),
    ):
        model, processor = model_and_processor(family)
        model.get_output_embeddings().requires_grad_(trained_head)
        alone = copy.deepcopy(model)
        collator = PreferenceCollator(processor, segments="paper", gamma=2.0)
        halves = [trl_rows(2), trl_rows(2, seed=5, images=trained_head)]  # or a rank without a picture

        def loss_of(module, half, collator=collator):
            packed = collator(half)[BATCH]
            logp = module(**{BATCH: packed})["logp"]
            return objective(logp, packed, torch.full_like(logp.detach(), -4.0), settings).loss

        add_forward(alone)
        want = [loss_of(alone, half) for half in halves]
        (sum(want) / 2).backward()

        add_forward(model)
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        if own_unit:  # its weight is then a DTensor where the loss reads it
            fully_shard(model.get_output_embeddings())
        fully_shard(model)
        got = loss_of(model, halves[rank])
        got.backward()
        torch.testing.assert_close(got, want[rank], rtol=1e-5, atol=1e-6)
        compared = 0
        for (name, ours), (_, true) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            assert (ours.grad is None) == (true.grad is None), name
            if true.grad is not None:
                torch.testing.assert_close(ours.grad.full_tensor(), true.grad, rtol=1e-4, atol=1e-6, msg=name)
                compared += 1
        assert compared > 20
        if rank == 0:
            (out / f"{family}{'-unit' * own_unit}.ok").write_text(str(compared))
    leave()


if __name__ == "__main__":
    {"ddp": ddp, "fsdp": fsdp}[sys.argv[1]](Path(sys.argv[2]))
