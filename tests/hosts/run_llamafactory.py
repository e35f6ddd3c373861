"""LLaMA-Factory's stage dpo in this process: data sets in its form, and a run recorded."""

from __future__ import annotations

import json
from pathlib import Path

from llamafactory.train.dpo import trainer as home
from llamafactory.train.tuner import run_exp
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from hosts.hostrun import Record, recording, write_json
from mmrlhf.integrations import llamafactory as ours

ORIGINAL = home.CustomDPOTrainer
TOWER = Qwen2_5_VisionTransformerPretrainedModel
COLUMNS = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", "images": "images"}


def write_set(folder: Path, name: str, rows: list[dict]) -> None:
    """Add the rows of `hostrun.pair_rows` to the folder's data sets."""
    images = any(row["images"] for row in rows)
    made = [
        {
            "conversations": [{"from": "human", "value": "<image>" * len(row["images"]) + row["prompt"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]},
            "rejected": {"from": "gpt", "value": row["rejected"]},
            **({"images": row["images"]} if images else {}),
        }
        for row in rows
    ]
    write_json(folder / f"{name}.json", made)
    index = folder / "dataset_info.json"
    info = json.loads(index.read_text(encoding="utf-8")) if index.exists() else {}
    columns = {key: value for key, value in COLUMNS.items() if images or key != "images"}
    info[name] = {"file_name": f"{name}.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    write_json(index, info)


def arguments(world: Path, out: Path, **more) -> dict:
    return {
        "model_name_or_path": str(world / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(world),
        "dataset": "pairs",
        "template": "qwen2_vl",
        "cutoff_len": 512,
        "overwrite_cache": True,
        "output_dir": str(out),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "use_cpu": True,
        "seed": 3,
        "image_max_pixels": 3136,
        "image_min_pixels": 784,
        "disable_gradient_checkpointing": True,
        **more,
    }


def run(world: Path, out: Path, mine: dict | None = None, **more) -> Record:
    """A run of the stage: LLaMA-Factory's own, or with mmrlhf's options `mine`."""
    home.CustomDPOTrainer = ORIGINAL
    if mine is not None:
        ours.install(**mine)
    with recording(ORIGINAL, TOWER) as record:
        run_exp(arguments(world, out, **more))
    return record
