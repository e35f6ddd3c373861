"""A whole training step of the installed TRL `DPOTrainer`: its collator, fused head, reference model and optimiser."""

from __future__ import annotations

import copy
import tempfile
import time
from itertools import combinations, pairwise
from typing import Any


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


class TrlStep:
    """`run(steps)` -> (seconds of each optimiser step from collation to update, logged losses, 0)."""

    def __init__(self, model, processor, records: list[dict], *, lr: float, beta: float, use_cpu: bool = True):
        from datasets import Dataset

        self.model = model
        self.reference = copy.deepcopy(model).requires_grad_(False).eval()
        self.processor = processor
        self.rows = Dataset.from_list(to_rows(records))
        self.settings = {"learning_rate": lr, "beta": beta, "use_cpu": use_cpu}
        self.micro_batch = 1

    def run(self, steps: int) -> tuple[list[float], list[float], int]:
        """One optimiser step is all pairs of all records, one pair a micro-batch (what its users must do for K > 2)."""
        from transformers import TrainerCallback
        from trl import DPOConfig, DPOTrainer

        marks: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                marks.append(time.perf_counter())

            def on_step_end(self, args, state, control, **kwargs):
                marks.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=self.micro_batch,
                gradient_accumulation_steps=len(self.rows) // self.micro_batch,
                max_steps=steps,
                max_length=None,
                bf16=False,
                gradient_checkpointing=False,
                lr_scheduler_type="constant",
                logging_steps=1,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **self.settings,
            )
            trainer = DPOTrainer(
                model=self.model,
                ref_model=self.reference,
                args=arguments,
                train_dataset=self.rows,
                processing_class=self.processor,
                callbacks=[Clock()],
            )
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [b - a for a, b in pairwise(marks)], losses, 0
