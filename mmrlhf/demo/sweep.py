"""How the demo's learning rates were chosen: each recipe at a few rates, measured on the validation pictures.

`python -m mmrlhf.demo.sweep OUT` prints a row a run (about two minutes on one core). The rule: of the rates whose
recall is within half a point of the best recall of any rate, the one with the fewest wrong mentions. The held-out
pictures of the demo are not touched.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmrlhf.demo import pipeline
from mmrlhf.demo.pipeline import PREFERENCE_SEED, VALIDATION_SEED, Plan, Result
from mmrlhf.demo.preferences import make_preferences
from mmrlhf.demo.world import make_scenes

RATES = {"rlhf_v": (5e-6, 7e-6, 1e-5, 1.5e-5), "mm_dpo": (5e-6, 7e-6, 1e-5, 1.5e-5), "sft": (5e-6, 1e-5, 3e-5)}
RECALL_SLACK = 0.005


def sweep(
    folder: Path, *, plan: Plan | None = None, rates: dict[str, tuple[float, ...]] | None = None
) -> dict[str, float]:
    """Train every recipe at every rate under `folder`; returns the chosen rate of each."""
    plan = plan or Plan()
    scenes = make_scenes(plan.held_out, seed=VALIDATION_SEED)
    model, tokenizer = pipeline.load_base()
    preference_scenes = make_scenes(plan.preference_scenes, seed=PREFERENCE_SEED)
    data = make_preferences(model, tokenizer, preference_scenes, folder / "data", seed=0)
    _show("base", 0.0, pipeline.evaluate("base", model, tokenizer, scenes))
    chosen = {}
    for recipe, candidates in (rates or RATES).items():
        results: dict[float, Result] = {}
        for lr in candidates:
            if recipe == "sft":
                fresh, _ = pipeline.load_base()
                results[lr] = pipeline.supervise(fresh, tokenizer, data, scenes, plan, lr=lr)
            else:
                run = folder / f"{recipe}-{lr:g}"
                results[lr] = pipeline.align(recipe, data, scenes, plan, run, tokenizer, lr=lr)
            _show(recipe, lr, results[lr])
        chosen[recipe] = choose(results)
        print(f"{recipe}: {chosen[recipe]:g}", flush=True)
    return chosen


def choose(results: dict[float, Result]) -> float:
    """The learning rate, by the rule above."""
    recall = max(result.figures.recall for result in results.values())
    kept = {lr: result for lr, result in results.items() if result.figures.recall >= recall - RECALL_SLACK}
    return min(kept, key=lambda lr: (kept[lr].figures.mention_hallucination, lr))


def _show(recipe: str, lr: float, result: Result) -> None:
    f = result.figures
    print(
        f"{recipe:8} {lr:8.1e}  response {f.response_hallucination:.3f}  mention {f.mention_hallucination:.3f}"
        f"  habit {f.habit_hallucination:.3f}  recall {f.recall:.3f}  mentions {f.mentions_per_caption:.2f}"
        f"  valid {f.valid:.3f}  place {f.place:.3f}  {result.seconds:.0f} s",
        flush=True,
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m mmrlhf.demo.sweep OUT", file=sys.stderr)
        return 2
    with pipeline.small_model_settings():
        sweep(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
