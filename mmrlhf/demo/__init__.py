"""The embedded default: a small world of pictures, a small multimodal model, and preference data made from both.

`run(output)` aligns the model by both papers' recipes and shows what changed on held-out pictures. The model is an
ordinary Hugging Face folder (`BASE`), taught by `python -m mmrlhf.demo.base OUT` from `world` and `language` alone.

    world, language -> base (the model) -> sample -> preferences (the data) -> pipeline (train, measure) -> page
"""

from __future__ import annotations

from pathlib import Path

BASE = Path(__file__).parent / "base"


def run(output: Path, *, quick: bool = False) -> int:
    """Run the whole demo into `output` and return an exit status; see `mmrlhf.demo.pipeline.run`."""
    from mmrlhf.demo.pipeline import run as run_pipeline

    return run_pipeline(Path(output), quick=quick)
