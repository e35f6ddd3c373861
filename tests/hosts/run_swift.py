"""`swift rlhf --rlhf_type dpo` in this process: data sets in its form, and a run recorded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from swift.pipelines import rlhf_main
from swift.rlhf_trainers import DPOTrainer
from swift.template.templates.qwen import Qwen2VLTemplate
from swift.trainers.trainer_factory import TrainerFactory
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from hosts.hostrun import Record, recording
from mmrlhf.integrations import swift as ours

THEIRS = "swift.rlhf_trainers.DPOTrainer"


def use_ids_of(model: Path, max_pixels: int = 3136) -> None:
    """The template writes Qwen's own ids down; a tiny vocabulary has others. It reads sizes from the environment."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    Qwen2VLTemplate.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Qwen2VLTemplate.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    os.environ.update(MAX_PIXELS=str(max_pixels), MIN_PIXELS="784")


def write_set(folder: Path, name: str, rows: list[dict]) -> None:
    """Rows as `encoded` makes them, one a line."""
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def encoded(row: dict) -> dict:
    """A row of `hostrun.pair_rows` in ms-swift's form."""
    user = {"role": "user", "content": "<image>" * len(row["images"]) + row["prompt"]}
    answer = {"role": "assistant", "content": row["chosen"]}
    images = {"images": row["images"]} if row["images"] else {}
    return {"messages": [user, answer], "rejected_response": row["rejected"], **images}


def run(world: Path, out: Path, mine: dict | None = None, **more) -> Record:
    """A run of the command: ms-swift's own, or with mmrlhf's options `mine`."""
    TrainerFactory.TRAINER_MAPPING["dpo"] = THEIRS
    if mine is not None:
        ours.register(**mine)
    given = {
        "rlhf_type": "dpo",
        "model": world / "model",
        "model_type": "qwen2_5_vl",
        "template": "qwen2_5_vl",
        "tuner_type": "full",
        "dataset": world / f"{more.pop('data', 'pairs')}.jsonl",
        "torch_dtype": "float32",
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": "true",
        "report_to": "none",
        "gradient_checkpointing": "false",
        "dataloader_num_workers": 0,
        "split_dataset_ratio": 0,
        "seed": 3,
        "max_length": 512,
        "check_model": "false",
        "load_from_cache_file": "false",
        **more,
    }
    words: list[str] = []
    for name, value in given.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    with recording(DPOTrainer, Qwen2_5_VisionTransformerPretrainedModel) as record:
        rlhf_main(words)
    return record
