"""A run small enough to train in a second: tiny model folders, preference data with pictures, settings for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from mmrlhf import config
from mmrlhf.config import TrainConfig
from mmrlhf.data.schema import ImageRef, Message, Part, PreferenceGroup, Response
from mmrlhf.data.writers import write_ranked
from tiny import tiny_image

WORDS = ("a", "photo", "of", "cat", "and", "dog", "on", "the", "mat", "red", "green", "blue", "square", "circle")


def make_groups(root: Path, count: int, *, k: int = 3, seed: int = 0, scores: bool = True) -> list[PreferenceGroup]:
    """`count` prompts with a picture each (every fifth has none) and `k` answers of different ranks."""
    rng = random.Random(seed)
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    groups = []
    for index in range(count):
        pictured = index % 5 != 4
        if pictured:
            tiny_image(28, 28, seed=index).save(root / "pictures" / f"{index}.png")
        parts = ([Part("image")] if pictured else []) + [Part("text", f"what is in the image ? {rng.choice(WORDS)}")]
        texts: list[str] = []
        while len(texts) < k:
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
            if text not in texts:
                texts.append(text)
        groups.append(
            PreferenceGroup(
                id=f"g{index}",
                prompt=(Message("user", tuple(parts)),),
                responses=tuple(
                    Response(text, score=1.5 * (k - place) if scores else None, rank=place + 1)
                    for place, text in enumerate(texts)
                ),
                images=(ImageRef(path=f"pictures/{index}.png"),) if pictured else (),
            )
        )
    return groups


def make_data(root: Path, count: int = 6, **options: Any) -> Path:
    """The same groups as a file with its pictures beside it; returns the file."""
    path = root / "ranked.jsonl"
    write_ranked(make_groups(root, count, **options), path)
    return path


def settings_for(output: Path, data: Path, *words: str, model: Path | None = None) -> TrainConfig:
    """Settings of a run of a few cheap steps; `words` are key=value."""
    defaults = [
        f"output={output}",
        f"data.path={data}",
        "device=cpu",
        "groups_per_step=2",
        "tokens_per_batch=256",
        "samples=0",
        "sample_tokens=4",
        "optim.lr=1e-3",
        "optim.warmup=0",
    ]
    if model is not None:
        defaults.append(f"model.path={model}")
    return config.load(None, [*defaults, *words])


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def facts_of(run: Path) -> dict[str, Any]:
    """run.json."""
    return json.loads((run / "run.json").read_text())
