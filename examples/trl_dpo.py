"""RLHF-V and MM-DPO together in TRL's trainer: `python examples/trl_dpo.py` (seconds on one core; needs trl>=1.15)."""

from datasets import Dataset
from peft import LoraConfig
from small import small_model, small_rows

from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer

model, processor = small_model()
args = PreferenceConfig(
    output_dir="runs/trl_dpo",
    per_device_train_batch_size=8,
    max_steps=12,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    precompute_ref_log_probs=True,  # pictures too
    segments="paper",  # corrected tokens weigh gamma
    gamma=5.0,
    reduction="mean",
    beta_mode="margin",  # a beta for each pair, from its row's margin
    beta=0.5,
)
PreferenceTrainer(
    model,
    args=args,
    train_dataset=Dataset.from_list(small_rows(32)),
    processing_class=processor,
    peft_config=LoraConfig(r=8, target_modules=r".*language_model.*\.(q_proj|v_proj)"),
).train()
