"""What the tests of the host trainers share: rows on disk, a tiny model's folder, and a record of a run inside a host.

A host is run in this process, as its command line would: the record has every loss as computed, the trainer, and how
many pictures went through a vision tower.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dporows import trl_rows
from mmrlhf.data.segments import segment_weights
from numerics import assert_no_worse
from tiny import tiny_model


def text_of(messages: list[dict]) -> str:
    content = messages[0]["content"]
    return "".join(part["text"] for part in content if part["type"] == "text")


def pair_rows(folder: Path, count: int, *, images: bool = True) -> list[dict]:
    """Rows with their pictures as files: {"prompt", "chosen", "rejected", "images": [path]}."""
    rows = []
    for index, row in enumerate(trl_rows(count, images=images)):
        paths = []
        for picture in row.get("images", []):
            paths.append(str(folder / f"{index}.png"))
            picture.save(paths[-1])
        rows.append({**{name: text_of(row[name]) for name in ("prompt", "chosen", "rejected")}, "images": paths})
    return rows


def model_folder(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """A tiny model as an ordinary folder, its head scaled down so that a step does not saturate the loss."""
    model, processor = tiny_model(family, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@dataclass
class Record:
    losses: list[float] = field(default_factory=list)
    pictures: int = 0
    trainer: Any = None

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.trainer.state.log_history if name in entry]


@contextlib.contextmanager
def recording(trainer_class: type, tower_class: type) -> Iterator[Record]:
    """Inside, every `compute_loss` of the class (and of subclasses that inherit it) and every tower pass is noted."""
    record = Record()
    compute, forward = trainer_class.compute_loss, tower_class.forward

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute(self, *args, **kwargs)
        record.trainer = self
        record.losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
        return loss

    def counted(self: Any, pixels: Any, grid_thw: Any, *args: Any, **kwargs: Any) -> Any:
        record.pictures += grid_thw.shape[0]
        return forward(self, pixels, grid_thw, *args, **kwargs)

    trainer_class.compute_loss, tower_class.forward = recorded, counted
    try:
        yield record
    finally:
        trainer_class.compute_loss, tower_class.forward = compute, forward


def close(a: list[float], b: list[float], *, rtol: float = 2e-4, atol: float = 2e-4) -> None:
    torch.testing.assert_close(torch.tensor(a).double(), torch.tensor(b).double(), rtol=rtol, atol=atol)


def same_run(theirs: Record, ours: Record) -> None:
    """Losses as computed, and what the hosts log of the pairs; differences of float32 that grow with the steps."""
    assert len(ours.losses) == len(theirs.losses) > 0
    close(ours.losses, theirs.losses)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "grad_norm"):
        assert theirs.logged(name), name
        close(ours.logged(name), theirs.logged(name), rtol=2e-3, atol=1e-3)


def token_weights(labels: Tensor, gamma: float) -> Tensor:
    """[2B, S]: gamma where the sides of a pair differ, 1 on other scored tokens, 0 elsewhere; rows chosen, rejected."""
    weights = torch.zeros(labels.shape, dtype=torch.float64)
    half = labels.shape[0] // 2
    for pair in range(half):
        scored = labels[pair] != -100, labels[half + pair] != -100
        chosen, rejected = labels[pair][scored[0]].tolist(), labels[half + pair][scored[1]].tolist()
        w_rejected, w_chosen = segment_weights(rejected, chosen, gamma=gamma)
        weights[pair][scored[0]] = torch.tensor(w_chosen, dtype=torch.float64)
        weights[half + pair][scored[1]] = torch.tensor(w_rejected, dtype=torch.float64)
    return weights


def plain_loss(model: Any, reference: Any, batch: dict, *, gamma: float, beta: float | Tensor) -> Tensor:
    """RLHF-V's loss (Eq. 5) of a host's padded batch, rows apart, full logits, in the models' own dtype."""
    dtype = next(model.parameters()).dtype
    ids, labels = batch["input_ids"], batch["labels"][:, 1:]
    weights = token_weights(labels, gamma).to(dtype)
    inputs = {
        "input_ids": ids,
        "attention_mask": batch["attention_mask"],
        "pixel_values": batch["pixel_values"].to(dtype),
        "image_grid_thw": batch["image_grid_thw"],
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }

    def score(one: Any) -> Tensor:
        logits = one(**inputs, use_cache=False).logits[:, :-1].to(dtype)
        logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (logp * weights).sum(1) / weights.sum(1)

    with torch.no_grad():
        kept = score(reference)
    chosen, rejected = (score(model) - kept).chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected)).mean()


def check_against_float64(trainer: Any, host_batch: dict, batch: dict, folder: Path, **options: Any) -> None:
    """The trainer's loss of a batch, and the gradient of every trained weight, against rows apart in float64."""
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    found: dict[torch.dtype, list[Tensor]] = {}
    for dtype in (torch.float64, torch.float32):
        pair = []
        for state in (trainer.model.state_dict(), trainer.ref_model.state_dict()):
            one = type(trainer.model).from_pretrained(folder, attn_implementation="eager", dtype=dtype)
            one.load_state_dict(state)
            pair.append(one)
        loss = plain_loss(*pair, host_batch, **options)
        loss.backward()
        weights = dict(pair[0].named_parameters())
        found[dtype] = [loss, *(weights[name].grad for name in names)]
    trainer.model.zero_grad()
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    weights = dict(trainer.model.named_parameters())
    ours = [loss, *(weights[name].grad for name in names)]
    assert abs(float(loss.detach()) - 0.6931) > 1e-3  # policy and reference are apart
    for name, a, b, truth in zip(["loss", *names], ours, found[torch.float32], found[torch.float64], strict=True):
        scale = float(truth.detach().abs().max())
        assert_no_worse(a, b, truth, floor=1e-5 * max(scale, 1e-3), name=name)
