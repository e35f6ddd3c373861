"""The scoring head: two linear layers over the hidden state of the last token, computed in float32 for any model.

It is a child of the model (`reward_head`), so that optimiser, checkpoints and processes treat it as any other weight,
but is saved beside it: the folder stays an ordinary one that anything loads, with `reward_head.safetensors` and
`reward_head.json` (kind, sizes) besides. Its weights have the model's dtype while they are trained (AdamW steps float32
masters, and FSDP2 wants one dtype in a block); float32 where adapters are trained, as those are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.config import REWARD_HEADS
from mmrlhf.models import load, parts

NAME = "reward_head"
SCHEMA = 1


@dataclass(frozen=True)
class HeadDescription:
    """What reward_head.json says."""

    head: str  # one of REWARD_HEADS
    hidden_size: int
    dropout: float
    schema: int = SCHEMA

    def __post_init__(self):
        if self.schema != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {self.schema!r}")
        if self.head not in REWARD_HEADS:
            raise ValueError(f"head must be one of {', '.join(REWARD_HEADS)}, got {self.head!r}")
        if type(self.hidden_size) is not int or self.hidden_size < 1:
            raise ValueError(f"hidden_size must be a positive integer, got {self.hidden_size!r}")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout!r}")


class RewardHead(nn.Module):
    """hidden [R, H] -> score [R] float32.

    "tanh": Linear(H, H), tanh, Linear(H, 1), dropout before each (llava_qwen.py:46-61 of MM-RLHF at 7c8af1d). "silu":
    the same with SiLU, which BaseReward (arXiv 2509.16127) found as good.
    """

    def __init__(self, described: HeadDescription):
        super().__init__()
        self.described = described
        self.dense = nn.Linear(described.hidden_size, described.hidden_size, dtype=torch.float32)
        self.out_proj = nn.Linear(described.hidden_size, 1, dtype=torch.float32)

    def _linear(self, layer: nn.Linear, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, layer.weight.float(), layer.bias.float())

    def forward(self, hidden: Tensor) -> Tensor:  # [R, H] -> [R]
        rate = self.described.dropout
        activation = torch.tanh if self.described.head == "tanh" else nn.functional.silu
        with torch.autocast(hidden.device.type, enabled=False):
            rows = nn.functional.dropout(hidden.float(), rate, self.training)
            rows = nn.functional.dropout(activation(self._linear(self.dense, rows)), rate, self.training)
            return self._linear(self.out_proj, rows)[:, 0]


def new_head(model: nn.Module, *, kind: str = "tanh", dropout: float | None = None, seed: int = 0) -> RewardHead:
    """A fresh head for a model, on its device: weights normal with the model's `initializer_range`, biases 0."""
    config = parts.text_config(model)
    rate = float(getattr(config, "attention_dropout", 0.0) or 0.0) if dropout is None else dropout
    head = RewardHead(HeadDescription(kind, int(config.hidden_size), rate))
    spread = float(getattr(config, "initializer_range", 0.02) or 0.02)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (head.dense, head.out_proj):
            layer.weight.normal_(std=spread, generator=generator)
            layer.bias.zero_()
    return head.to(parts.parameter_device(model))


def attach(model: nn.Module, head: RewardHead) -> None:
    """Make the head a trained child of the model."""
    base = parts.base_model(model)
    if hasattr(base, NAME):
        raise ValueError(f"{type(base).__name__} has a {NAME} already")
    base.add_module(NAME, head.requires_grad_(True))


@contextmanager
def detached(model: nn.Module) -> Iterator[RewardHead]:
    """The head, and the model without it inside."""
    base = parts.base_model(model)
    head = getattr(base, NAME)
    delattr(base, NAME)
    try:
        yield head
    finally:
        base.add_module(NAME, head)


def save(model: Any, processor: Any, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
    """The model as `load.save_pretrained` does (`state` too), and its head beside it. No pickle."""
    from safetensors.torch import save_file

    mark = f"{NAME}."
    rest = None if state is None else {name: tensor for name, tensor in state.items() if mark not in name}
    with detached(model) as head:
        load.save_pretrained(model, processor, folder, state=rest)
    own: Mapping[str, Tensor] = head.state_dict()
    if state is not None:
        own = {name.rpartition(mark)[2]: tensor for name, tensor in state.items() if mark in name}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    save_file(tensors, folder / f"{NAME}.safetensors")
    text = json.dumps(dataclasses.asdict(head.described), indent=2) + "\n"
    (folder / f"{NAME}.json").write_text(text, encoding="utf-8")


def read(folder: Path) -> RewardHead | None:
    """The head of a folder, on the CPU, or None where it has none. ValueError naming the file that cannot be used."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said, weights = folder / f"{NAME}.json", folder / f"{NAME}.safetensors"
    if not said.is_file() and not weights.is_file():
        return None
    try:
        described = HeadDescription(**json.loads(said.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} has {weights.name} but no {said.name}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{said} does not describe a reward head: {error}") from error
    head = RewardHead(described)
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights} is not a whole safetensors file ({error})") from error
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f"{weights} does not fit {said.name}: it has {found}, expected {expected}")
    head.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return head
