"""What `integrations.trl` checks before it takes over a trainer, and the sums its metrics are made of.

Each check raises ValueError that names the option, says why it cannot be honoured, and what to do instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrlhf.batch import GroupBatch
from mmrlhf.integrations.objective import Result
from mmrlhf.integrations.rows import PackedRows

# Metric -> what its sum is divided by.
WEIGHT_OF = {
    "entropy": "scored",
    "logits/chosen": "chosen tokens",
    "logits/rejected": "rejected tokens",
    "mean_token_accuracy": "chosen tokens",
    "rewards/chosen": "pairs",
    "rewards/rejected": "pairs",
    "rewards/accuracies": "pairs",
    "rewards/margins": "pairs",
    "logps/chosen": "pairs",
    "logps/rejected": "pairs",
    "beta/mean": "pairs",
}


# Every field that DPOConfig adds to TrainingArguments, and who answers for it: "trl" reads it as always, "mmrlhf" gives
# it the meaning it has in TRL, "nothing" has no part in a packed batch, "refused" is looked at by `check_settings`.
FIELDS = {
    "model_init_kwargs": "trl",
    "trust_remote_code": "trl",
    "router_aux_loss_coef": "refused",
    "disable_dropout": "trl",
    "dataset_num_proc": "nothing",  # rows are encoded where they are collated: dataloader_num_workers
    "max_length": "mmrlhf",
    "truncation_mode": "refused",
    "padding_free": "nothing",  # nothing is padded
    "pad_to_multiple_of": "refused",
    "precompute_ref_log_probs": "mmrlhf",
    "precompute_ref_batch_size": "mmrlhf",
    "loss_type": "mmrlhf",
    "loss_weights": "mmrlhf",
    "ld_alpha": "mmrlhf",
    "f_divergence_type": "mmrlhf",
    "f_alpha_divergence_coef": "mmrlhf",
    "label_smoothing": "mmrlhf",
    "beta": "mmrlhf",
    "use_weighting": "mmrlhf",
    "discopop_tau": "mmrlhf",
    "activation_offloading": "trl",
    "sync_ref_model": "trl",
    "ref_model_mixup_alpha": "trl",
    "ref_model_sync_steps": "trl",
    "pad_token": "nothing",  # nothing is padded
}


def _unknown_fields(args: Any) -> list[str]:
    """Fields of a later TRL than those above that are set to something: they might change the loss."""
    from transformers import TrainingArguments
    from trl import DPOConfig

    known = {field.name for field in dataclasses.fields(TrainingArguments)} | set(FIELDS)
    found = []
    for field in dataclasses.fields(DPOConfig):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in known and getattr(args, field.name) != default:
            found.append(field.name)
    return found


class Processes:
    """What `cached.with_reference` asks of an accelerator."""

    def __init__(self, accelerator: Any):
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        # One process a machine: folders of different machines may be different ones.
        self.writes = accelerator.is_local_main_process

    def gather(self, items: list) -> list:
        """The items of all processes, in the order of their ranks."""
        from accelerate.utils import gather_object

        return gather_object(items)


def weigh_pairs(step: Sequence[PackedRows], accelerator: Any) -> None:
    """Let every pair of an optimiser step weigh the same, in whatever micro-batch and process it lies.

    Micro-batches are averaged, as TRL does, and the pairs in each. That is the same thing where every row is one pair;
    where rows have several, a micro-batch's share goes by its pairs. One sum over the processes, of three numbers.
    """
    totals = [sum(packed.batch.pairs.shape[0] for packed in step), sum(packed.batch.num_groups for packed in step)]
    totals.append(len(step))
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(torch.tensor(totals, device=accelerator.device), reduction="sum").tolist()
    pairs, rows, parts = totals
    if pairs != rows:
        for packed in step:
            packed.share = packed.batch.pairs.shape[0] * parts / pairs


@torch.no_grad()
def metric_sums(out: dict[str, Tensor], batch: GroupBatch, result: Result) -> tuple[Tensor, list[str]]:
    """Sums of this process, [n] float64, and their names. A response counts once for each of its pairs, as in TRL."""
    better, worse = batch.pairs[:, 0], batch.pairs[:, 1]
    times = torch.zeros(2, batch.num_responses, dtype=torch.float64, device=better.device)
    for side, members in zip(times, (better, worse), strict=True):
        side.index_add_(0, members, torch.ones_like(members, dtype=torch.float64))
    lengths = batch.cu_seqlens.diff()
    chosen, rejected = (side.repeat_interleave(lengths, output_size=batch.num_scored) for side in times)  # [N]
    sums = {
        "tokens": torch.as_tensor(batch.num_tokens, device=better.device),
        "pairs": torch.as_tensor(better.numel(), device=better.device),
        "chosen tokens": chosen.sum(),
        "rejected tokens": rejected.sum(),
        "scored": (chosen + rejected).sum(),
        "rewards/chosen": result.chosen_rewards.sum(),
        "rewards/rejected": result.rejected_rewards.sum(),
        "rewards/accuracies": (result.chosen_rewards > result.rejected_rewards).sum(),
        "rewards/margins": (result.chosen_rewards - result.rejected_rewards).sum(),
        "logps/chosen": result.chosen_logps.sum(),
        "logps/rejected": result.rejected_logps.sum(),
        "beta/mean": result.beta.sum(),
    }
    if "entropy" in out:
        sums["entropy"] = (out["entropy"] * (chosen + rejected)).sum()
        sums["logits/chosen"] = (out["mean_logit"] * chosen).sum()
        sums["logits/rejected"] = (out["mean_logit"] * rejected).sum()
        sums["mean_token_accuracy"] = (out["top1"] * chosen).sum()
    return torch.stack([value.double() for value in sums.values()]), list(sums)


def check_settings(args: Any, data_collator: Any, compute_metrics: Any) -> None:
    """Options of a DPOConfig and arguments of a DPOTrainer."""
    for name in _unknown_fields(args):
        raise ValueError(
            f"{name} = {getattr(args, name)!r} is not supported by mmrlhf, which does not know this field of "
            "DPOConfig; leave it at its default, or use TRL's own DPOTrainer"
        )
    compiled = args.torch_compile
    stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0)
    lengths = (
        getattr(args, "group_by_length", False) or getattr(args, "train_sampling_strategy", "") == "group_by_length"
    )
    refused = {
        "data_collator": (
            data_collator is not None,
            "rows are encoded by mmrlhf's own; leave it None and put what you add into the rows",
        ),
        "compute_metrics": (
            compute_metrics is not None,
            "it is given logits, which are never built; leave it None, TRL's metrics are logged for evaluation too",
        ),
        "truncation_mode": (
            args.max_length is not None and args.truncation_mode == "keep_end",
            "a cut from the front would go through pictures; use keep_start, or max_length None",
        ),
        "pad_to_multiple_of": (args.pad_to_multiple_of is not None, "nothing is padded; leave it None"),
        "torch_compile": (compiled, "the packed forward changes shape with each batch; set it to False"),
        "deepspeed": (
            stage == 3,
            "ZeRO-3 shards the lm_head, which is read outside its module; use ZeRO-1 or 2, or FSDP2",
        ),
        "group_by_length": (lengths, "rows have no length before they are encoded; use the random sampler"),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"{name} = {getattr(args, name, 'given')!r} is not supported by mmrlhf: {why}")


def check_trainer(trainer: Any) -> None:
    """What is known only when model, PEFT and accelerator are there."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            "router_aux_loss_coef is not supported by mmrlhf: the packed forward returns no router logits; set it to "
            "0.0 to train the experts without that term"
        )
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(
            "fsdp version 1 is not supported by mmrlhf: it flattens the lm_head; set fsdp_version 2 in fsdp_config"
        )
    devices = {str(device) for device in (getattr(trainer.model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise ValueError(
            f"device_map splits the model over {', '.join(sorted(devices))}, which is not supported by mmrlhf: load it "
            "on one device a process, or shard it with FSDP2"
        )
    parallel = trainer.accelerator.parallelism_config
    sizes = {name: getattr(parallel, name, 1) for name in ("tp_size", "cp_size", "sp_size")}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(
            f"parallelism_config {sizes} is not supported by mmrlhf: a packed batch is not cut across ranks; use data "
            "parallelism (DDP, FSDP2)"
        )
