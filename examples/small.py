"""A small model and preference rows for the examples beside this file: nothing to download, seconds on one core.

The model is the one `python -m mmrlhf demo` starts from (LLaVA-OneVision's architecture, 0.8 M parameters); the
pictures are drawn. Put your own model folder and your own rows in their place.
"""

from __future__ import annotations

import numpy as np

from mmrlhf.demo import BASE
from mmrlhf.demo.base import careless_caption
from mmrlhf.demo.language import QUESTION, correct, score
from mmrlhf.demo.world import draw, make_scenes
from mmrlhf.models.load import load_model, load_processor


def small_model():
    """(model, processor)."""
    return load_model(str(BASE), dtype="float32"), load_processor(str(BASE))


def small_rows(count: int, *, seed: int = 0) -> list[dict]:
    """TRL's vision preference rows: a careless caption against its correction, with the margin of their scores."""
    rng = np.random.default_rng(seed)
    rows = []
    for scene in make_scenes(8 * count, seed=seed):
        careless = careless_caption(scene, rng)
        better = correct(careless, scene)
        if better == careless or len(rows) == count:
            continue
        rows.append(
            {
                "images": [draw(scene)],
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
                "chosen": [{"role": "assistant", "content": [{"type": "text", "text": better}]}],
                "rejected": [{"role": "assistant", "content": [{"type": "text", "text": careless}]}],
                "margin": score(better, scene) - score(careless, scene),
            }
        )
    return rows
