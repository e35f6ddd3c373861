"""Preference rows in TRL's form, tiny models whose template ends at the end of turn, and runs of either trainer."""

from __future__ import annotations

import copy
import random

import torch

from tiny import tiny_image, tiny_model

WORDS = ("a", "photo", "of", "cat", "and", "dog", "on", "the", "mat", "red", "green", "blue", "square", "circle")


def sentence(rng: random.Random, low: int = 2, high: int = 7) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def trl_rows(count: int = 8, *, seed: int = 0, images: bool = True) -> list[dict]:
    """chosen/rejected rows in TRL's conversational form, the sides differing in part; pictures of several sizes."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        start = sentence(rng)
        content = [{"type": "image"}] if images else []
        row = {
            "prompt": [{"role": "user", "content": [*content, {"type": "text", "text": f"what is in {start} ?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": f"{start} {sentence(rng)}"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": f"{start} {sentence(rng)}"}]}],
        }
        if images:
            row["images"] = [tiny_image(28 * (1 + index % 2), 28, seed=index)]
        rows.append(row)
    return rows


def model_and_processor(family: str, seed: int = 0):
    """A tiny model whose template writes nothing after the end of turn: what TRL and mmrlhf score is then the same."""
    model, processor = tiny_model(family, seed=seed)
    processor.chat_template = processor.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    # Weights of std .15 put a response at -60 nats, where a step of any size saturates the loss.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.3)
    return model, processor


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=r".*(language_model|text_model).*\.(q_proj|v_proj)")


def run(kind, config, model, processor, rows, folder, *, steps=5, peft=False, reference=None, **options):
    """Train with `kind` (a trainer class) under `config` (its arguments' class); returns (losses, trainer).

    Losses are recorded as computed: the log rounds them. The model is trained in place; `steps=0` only constructs.
    """
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": max(steps, 1),
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    given = {"eval_dataset": options.pop("eval_dataset", None), "resume": options.pop("resume", None)}
    if (
        reference is None
        and not peft
        and not hasattr(model, "peft_config")
        and not options.get("precompute_ref_log_probs")
    ):
        reference = copy.deepcopy(model)
    trainer = kind(
        model=model,
        ref_model=reference,
        args=config(**{**settings, **options}),
        train_dataset=rows,
        eval_dataset=given["eval_dataset"],
        processing_class=processor,
        **({"peft_config": lora()} if peft else {}),
    )
    losses = record(trainer)
    if steps:
        trainer.train(resume_from_checkpoint=given["resume"])
    return losses, trainer


def record(trainer) -> list[float]:
    """Every loss the trainer computes from now on, unrounded."""
    losses: list[float] = []
    compute = trainer.compute_loss

    def recorded(*args, **kwargs):
        loss = compute(*args, **kwargs)
        losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    trainer.compute_loss = recorded
    return losses


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
