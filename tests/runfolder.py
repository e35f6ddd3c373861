"""A finished run's folder, made up: what the report reads, without training anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

CONFIG = """\
recipe: mm_dpo
output: runs/photos
seed: 0
groups_per_step: 8
model:
  path: Qwen/Qwen2.5-VL-3B-Instruct
loss:
  beta: 0.1
  beta_mode: margin
"""
RUN = {
    "status": "finished",
    "wall_seconds": 5025.3,
    "versions": {"mmrlhf": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
    "model": {
        "path": "Qwen/Qwen2.5-VL-3B-Instruct",
        "class": "Qwen2_5_VLForConditionalGeneration",
        "trained": 3754622976,
    },
    "data": {
        "format": "mm_rlhf",
        "rows": 2406,
        "groups": 401,
        "pairs": 2351,
        "skipped_rows": [
            {"source": "dpo_pairs.jsonl:77", "reason": "prompt is empty"},
            {"source": "dpo_pairs.jsonl:1204", "reason": "image images/0412.jpg: truncated after 8192 bytes"},
        ],
        "dropped_groups": [{"source": "dpo_pairs.jsonl:19", "reason": "9214 tokens, and max_group_tokens is 8192"}],
    },
}
SAMPLES = [
    {
        "id": "coffee",
        "image": "images/0.png",
        "prompt": "Describe the cup and what is around it.",
        "before": "A blue cup filled to the brim with coffee stands on a white saucer, and two sugar cubes lie by it.",
        "after": "A dark red cup partly filled with coffee stands on a saucer of the same colour, on a wooden table.",
        "responses": [
            {"text": "A mug of black coffee on a white saucer.", "score": 1.5, "rank": 3},
            {
                "text": "A dark red cup of coffee on a matching saucer, with a spoon, on a wooden table.",
                "score": 5,
                "rank": 1,
            },
            {"text": "A cup of coffee with a spoon.", "score": 3.5, "rank": 2},
            {"text": "Coffee on a table.", "score": 3.5, "rank": 2},
        ],
    },
    {
        "id": "rocket",
        "image": "images/1.jpg",
        "prompt": "How many towers stand around the rocket, and has it lifted off?",
        "before": "Two towers, and the rocket has lifted off.",
        "after": "Four towers, and the rocket has not lifted off.",
        "responses": [{"text": "Four, and no.", "score": None, "rank": None}, {"text": "Two.", "score": None}],
    },
    {"id": "text-only", "image": None, "prompt": "Say hello.", "before": "Hello.", "after": "Hello.", "responses": []},
]


def metrics(steps: int) -> list[dict[str, float | int | None]]:
    """Lines as training writes them: a loss that falls, margins that grow, one step that was not finite."""
    noise = random.Random(7)
    lines: list[dict[str, float | int | None]] = []
    for step in range(1, steps + 1):
        gain = 1.6 * (1 - math.exp(-step / 70)) + noise.gauss(0, 0.16)
        chosen, spread = 0.25 * gain + noise.gauss(0, 0.05), 0.02 * noise.random()
        warm = min(step / 20, 1.0)
        lines.append(
            {
                "step": step,
                "epoch": step / 50,
                "loss": None if step == 41 else math.log1p(math.exp(-gain)) + 0.25 * 1.1,
                "rewards/chosen": chosen,
                "rewards/rejected": chosen - gain,
                "rewards/margins": gain,
                "rewards/accuracies": min(1.0, 0.5 + 0.28 * gain + noise.gauss(0, 0.04)),
                "logps/chosen": -61 + 2 * gain,
                "logps/rejected": -58 - 3 * gain,
                "beta/mean": 0.13 + spread,
                "beta/min": 0.11,
                "beta/max": 0.145 + spread / 8,
                "sft_loss": 1.1,
                "grad_norm": 14 * math.exp(-step / 120) + abs(noise.gauss(0, 1.5)),
                "learning_rate": 1e-6 * warm * (1 + math.cos(math.pi * step / steps)) / 2,
                "tokens": 15200 + round(noise.gauss(0, 700)),
                "scored_tokens": 2900 + round(noise.gauss(0, 250)),
                "images": 8,
                "utilization": min(1.0, 0.92 + noise.gauss(0, 0.02)),
                "seconds": 1.9 + abs(noise.gauss(0, 0.1)),
            }
        )
    return lines


def write_run(folder: Path, *, steps: int = 250, samples: list[dict] | None = None) -> Path:
    """A whole run folder with `steps` steps, three samples and two pictures."""
    (folder / "images").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "run.json").write_text(json.dumps(RUN))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(steps)))
    rows = SAMPLES if samples is None else samples
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = Image.new("RGB", (64, 64), "#e9e4d6")
    ImageDraw.Draw(tiny).ellipse((14, 18, 46, 50), fill="#8e2b1d")
    tiny.save(folder / "images" / "0.png")
    wide = Image.new("RGB", (1600, 1067), "#1b2a4a")
    ImageDraw.Draw(wide).rectangle((760, 300, 840, 1000), fill="#f0f0ea")
    wide.save(folder / "images" / "1.jpg")
    return folder
