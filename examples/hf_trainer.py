"""MM-DPO in transformers.Trainer: `python examples/hf_trainer.py` (seconds on one core)."""

import copy

from small import small_model, small_rows
from transformers import Trainer, TrainingArguments

from mmrlhf.integrations.hf_trainer import PreferenceLossFunction, TrainerCollator

model, processor = small_model()
loss = PreferenceLossFunction(
    model,
    reference=copy.deepcopy(model),
    beta_mode="margin",  # a beta for each pair, from its rows' margin
    loss_type=("sigmoid", "sft"),
    loss_weights=(1.0, 0.25),
)
args = TrainingArguments(
    output_dir="runs/hf_trainer",
    per_device_train_batch_size=8,
    max_steps=12,
    learning_rate=3e-5,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,  # rows keep their columns until the collator reads them
)
Trainer(
    model, args, train_dataset=small_rows(32), data_collator=TrainerCollator(processor), compute_loss_func=loss
).train()
