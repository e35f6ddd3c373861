"""A whole training step of the installed TRL `DPOTrainer`: its collator, fused head, reference model and optimiser.

The same with mmrlhf's `PreferenceTrainer` in its place, which keeps TRL's loop and replaces collator, forward and loss.
"""

from __future__ import annotations

import copy
import tempfile
from itertools import combinations
from typing import Any

import torch


def to_rows(records: list[dict]) -> list[dict[str, Any]]:
    """TRL's vision preference rows: every pair of every record, best first."""
    rows = []
    for record in records:
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}]
        for better, worse in combinations(record["responses"], 2):
            rows.append(
                {
                    "images": [record["image"]],
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": better}]}],
                    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": worse}]}],
                }
            )
    return rows


def to_ranked_rows(records: list[dict]) -> list[dict[str, Any]]:
    """The drop-in's ranked rows: one a record, its answers best first."""
    return [
        {
            "id": record["id"],
            "images": [record["image"]],
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["prompt"]}]}],
            "responses": list(record["responses"]),
            "ranks": list(range(1, len(record["responses"]) + 1)),
        }
        for record in records
    ]


class TrlStep:
    """`run(steps)` -> step_sides.Run. One optimiser step is all pairs of all records, one row a micro-batch.

    `drop_in` takes mmrlhf's trainer, on ranked rows where there are more than two answers; `cached` its reference
    scores from before the run. With `lora`, adapters are put on `model`, and the reference is the model without them.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        records: list[dict],
        *,
        lr: float = 1e-5,
        beta: float = 0.1,
        lora: bool = False,
        drop_in: bool = False,
        cached: bool = False,
        micro_batch: int = 1,
        workers: int = 0,
    ):
        from datasets import Dataset

        if cached and not drop_in:
            raise ValueError("cached: TRL's own trainer has no cached reference for pictures")
        self.model, self.processor, self.lora, self.drop_in = model, processor, lora, drop_in
        self.reference = None if lora or cached else copy.deepcopy(model).requires_grad_(False).eval()
        ranked = drop_in and any(len(record["responses"]) > 2 for record in records)
        self.rows = Dataset.from_list((to_ranked_rows if ranked else to_rows)(records))
        self.device = next(model.parameters()).device
        self.micro_batch = micro_batch
        self.settings = {
            "learning_rate": lr,
            "beta": beta,
            "use_cpu": self.device.type == "cpu",
            # TRL's default where it can, and faster with adapters: they stay float32 and multiply in bfloat16.
            "bf16": self.device.type == "cuda" and model.dtype == torch.bfloat16,
            "dataloader_num_workers": workers,
            "precompute_ref_log_probs": cached,
        }

    def run(self, steps: int) -> Any:
        from benchmarks.step_sides import Run

        run = Run()
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(folder, steps, run)
            trainer.train()
            run.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return run

    def trainer(self, folder: str, steps: int, run: Any) -> Any:
        """The trainer, which marks `run`."""
        from transformers import PrinterCallback
        from trl import DPOConfig, DPOTrainer

        from benchmarks.step_models import lora_config, seed_adapters

        kind, config = DPOTrainer, DPOConfig
        if self.drop_in:
            from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer

            kind, config = PreferenceTrainer, PreferenceConfig
        arguments = config(
            output_dir=folder,
            per_device_train_batch_size=self.micro_batch,
            gradient_accumulation_steps=len(self.rows) // self.micro_batch,
            max_steps=steps,
            max_length=None,
            gradient_checkpointing=False,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **self.settings,
        )
        made = kind(
            model=self.model,
            ref_model=self.reference,
            args=arguments,
            train_dataset=self.rows,
            processing_class=self.processor,
            callbacks=[clock(run, self.device)],
            **({"peft_config": lora_config()} if self.lora else {}),
        )
        made.remove_callback(PrinterCallback)
        if self.lora:
            seed_adapters(made.model)
        return made


def clock(run: Any, device: Any) -> Any:
    """A callback that marks the start of training and the end of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            run.mark(device)

        def on_step_end(self, args, state, control, **kwargs):
            run.mark(device)

    return Clock()
