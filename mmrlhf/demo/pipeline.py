"""The demo from end to end: preference data from the model's own samples, both recipes, held-out pictures, a page.

    OUTPUT/data/       pictures, corrected.parquet (RLHF-V's form), ranked.jsonl and dpo_pairs.jsonl (MM-RLHF's)
    OUTPUT/rlhf_v/     run folders, each with its own report.html and the aligned model under model/
    OUTPUT/mm_dpo/
    OUTPUT/results.json, results.png, report.html

The preference scenes, the validation scenes (on which the learning rates were chosen: `sweep`) and the held-out
scenes have seeds of their own. Supervised training on the corrected captions alone stands in the table as the plain
baseline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmrlhf import config
from mmrlhf.demo import BASE
from mmrlhf.demo.measure import Figures, measure
from mmrlhf.demo.preferences import PreferenceData, make_preferences
from mmrlhf.demo.world import Scene, make_scenes, pixels

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

PREFERENCE_SEED, VALIDATION_SEED, HELD_OUT_SEED = 10, 777, 4242
# Chosen by `sweep` on the validation pictures. At 1.5e-5 and 60 steps RLHF-V's recall there is .928 instead of .964:
# corrections mostly shorten, so a policy that is pushed too hard stops early.
LEARNING_RATES = {"rlhf_v": 1e-5, "mm_dpo": 1e-5, "sft": 3e-5}
NAMES = {
    "base": "before",
    "rlhf_v": "RLHF-V (DDPO)",
    "mm_dpo": "MM-RLHF (MM-DPO)",
    "sft": "SFT on corrections",
}


@dataclass(frozen=True)
class Plan:
    """How much of everything. The full plan takes about one minute on one idle core, the quick one a few seconds."""

    preference_scenes: int = 400
    held_out: int = 400
    steps: int = 60
    groups_per_step: int = 16
    samples: int = 8  # prompts in each run's own report
    shown: int = 12  # held-out pictures on the page

    @classmethod
    def quick(cls) -> Plan:
        return cls(preference_scenes=24, held_out=24, steps=2, groups_per_step=4, samples=2, shown=4)


@dataclass(frozen=True)
class Result:
    """One model's figures and captions on the held-out pictures."""

    name: str
    figures: Figures
    captions: list[str]
    seconds: float  # of its training; 0 for the model as it was


def run(output: Path, *, quick: bool = False) -> int:
    """Make the data, train both recipes, measure on held-out pictures, and write the page. Returns 0.

    Deterministic for a given machine: every seed is fixed, and a model this small runs quickest on one thread, which
    is set for the time of the call. Raises FileExistsError if `output` holds something else than an earlier
    demo, ImportError where matplotlib is missing.
    """
    from mmrlhf.demo.page import write_chart, write_page
    from mmrlhf.report import write_report

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the demo draws its charts with matplotlib, which is not there: pip install 'mmrlhf[report]'")
    plan = Plan.quick() if quick else Plan()
    began = time.perf_counter()
    prepare(output)
    with small_model_settings():
        say = _Progress(began)
        model, tokenizer = load_base()
        say("asking the model about fresh pictures, five answers each, and correcting and ranking them …")
        data = make_preferences(
            model, tokenizer, make_scenes(plan.preference_scenes, seed=PREFERENCE_SEED), output / "data", seed=0
        )
        say(
            f"{data.corrected_groups} corrected answers (RLHF-V's form), {data.ranked_groups} ranked lists with "
            f"{data.ranked_pairs} pairs (MM-RLHF's form)"
        )
        held_out = make_scenes(plan.held_out, seed=HELD_OUT_SEED)
        results = [evaluate("base", model, tokenizer, held_out)]
        say(f"before: {_line(results[0].figures)}")
        for recipe in ("rlhf_v", "mm_dpo"):
            say(f"training {NAMES[recipe]}: {plan.steps} steps …")
            results.append(align(recipe, data, held_out, plan, output / recipe, tokenizer))
            write_report(output / recipe)
            say(f"{NAMES[recipe]}: {_line(results[-1].figures)}")
        results.append(supervise(model, tokenizer, data, held_out, plan))
        say(f"{NAMES['sft']}: {_line(results[-1].figures)}")
        summary = _summary(plan, data, results, time.perf_counter() - began, quick)
        (output / "results.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_chart(results, output / "results.png")
        page = write_page(output, summary, results, held_out, data)
    print(table(results), flush=True)
    print(f"\n{page.resolve()}", flush=True)
    return 0


def load_base() -> tuple[LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast]:
    """The shipped model, in float32, and its tokenizer."""
    from mmrlhf.models.load import load_model, load_processor

    return load_model(str(BASE), dtype="float32"), load_processor(str(BASE)).tokenizer


def settings(recipe: str, data: PreferenceData, plan: Plan, folder: Path, *, lr: float | None = None) -> Any:
    """The recipe as it ships, but for the data, the steps, and a learning rate that suits 0.8 M weights."""
    if recipe not in ("rlhf_v", "mm_dpo"):
        raise ValueError(f"recipe must be rlhf_v or mm_dpo, got {recipe!r}")
    base = config.load(None, [f"recipe={recipe}"])
    path, groups = (data.corrected, data.corrected_groups) if recipe == "rlhf_v" else (data.ranked, data.ranked_groups)
    replace = dataclasses.replace
    return replace(
        base,
        output=str(folder),
        epochs=float(math.ceil(plan.steps * plan.groups_per_step / groups) + 1),
        max_steps=plan.steps,
        groups_per_step=plan.groups_per_step,
        tokens_per_batch=2048,  # a step of 16 lists is about 1500 tokens
        device="cpu",
        samples=plan.samples,
        sample_tokens=40,
        report=False,
        model=replace(base.model, path=str(BASE), dtype="float32"),
        data=replace(base.data, path=str(path), root=str(data.root)),
        optim=replace(base.optim, lr=lr or LEARNING_RATES[recipe], warmup=1 / 6, final_lr=0.05),
    )


def align(
    recipe: str,
    data: PreferenceData,
    scenes: list[Scene],
    plan: Plan,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    lr: float | None = None,
) -> Result:
    """Train a recipe through the ordinary loop, and measure the model that it leaves in its run folder."""
    from mmrlhf.models.load import load_model
    from mmrlhf.train.loop import train

    began = time.perf_counter()
    run_folder = train(settings(recipe, data, plan, folder, lr=lr))
    seconds = time.perf_counter() - began
    model = load_model(str(run_folder / "model"), dtype="float32")
    return evaluate(recipe, model, tokenizer, scenes, seconds=seconds)


def supervise(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: PreferenceData,
    scenes: list[Scene],
    plan: Plan,
    *,
    lr: float | None = None,
) -> Result:
    """The plain baseline: next-token training on the corrected captions, as many steps and captions a step. The model
    is trained in place."""
    from PIL import Image

    from mmrlhf.data.images import open_image
    from mmrlhf.data.readers import read_groups
    from mmrlhf.demo.base import train_captions

    began = time.perf_counter()
    groups = read_groups(data.corrected, root=data.root).groups
    pictures: list[Image.Image] = [open_image(group.images[0], data.root) for group in groups]
    train_captions(
        model,
        tokenizer,
        np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures]),
        [group.responses[group.preference_pairs()[0].better].text for group in groups],
        steps=plan.steps,
        lr=lr or LEARNING_RATES["sft"],
        warmup=max(1, plan.steps // 6),
        batch_size=plan.groups_per_step,
        rng=np.random.default_rng(0),
        progress=lambda line: None,
    )
    return evaluate("sft", model, tokenizer, scenes, seconds=time.perf_counter() - began)


def evaluate(
    name: str,
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[Scene],
    *,
    seconds: float = 0.0,
) -> Result:
    """Greedy captions of the scenes, and their figures."""
    from mmrlhf.demo.sample import captions

    texts = [answers[0] for answers in captions(model, tokenizer, pixels(scenes))]
    return Result(name, measure(texts, scenes), texts, seconds)


def table(results: list[Result]) -> str:
    """The figures as plain text, a row a model."""
    head = f"{'':20}{'captions that':>15}{'mentions':>10}{'objects':>9}{'mentions a':>12}{'':>8}{'right':>8}\n"
    head += f"{'':20}{'hallucinate':>15}{'wrong':>10}{'found':>9}{'caption':>12}{'valid':>8}{'place':>8}\n"
    rows = []
    for result in results:
        f = result.figures
        share = f"{100 * f.response_hallucination:.1f} ± {100 * f.response_error:.1f} %"
        rows.append(
            f"{NAMES[result.name]:20}{share:>15}{_percent(f.mention_hallucination):>10}{_percent(f.recall):>9}"
            f"{f.mentions_per_caption:>12.2f}{_percent(f.valid):>8}{_percent(f.place):>8}"
        )
    return head + "\n".join(rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _line(f: Figures) -> str:
    return (
        f"{_percent(f.response_hallucination)} of captions name something that is not there, "
        f"{_percent(f.recall)} of the objects are found"
    )


def _summary(plan: Plan, data: PreferenceData, results: list[Result], seconds: float, quick: bool) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "quick": quick,
        "seconds": round(seconds, 1),
        "machine": {"python": platform.python_version(), "processor": platform.machine(), "threads": 1},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "plan": dataclasses.asdict(plan),
        "seeds": {"preference": PREFERENCE_SEED, "validation": VALIDATION_SEED, "held_out": HELD_OUT_SEED},
        "learning_rates": LEARNING_RATES,
        "data": {
            "scenes": data.scenes,
            "corrected": data.corrected_groups,
            "ranked": data.ranked_groups,
            "ranked_pairs": data.ranked_pairs,
        },
        "results": [
            {
                "name": result.name,
                "label": NAMES[result.name],
                "training_seconds": round(result.seconds, 1),
                "response_error": result.figures.response_error,
                **result.figures.as_dict(),
            }
            for result in results
        ],
    }


def prepare(output: Path) -> None:
    """An earlier demo's folder is emptied of what this one writes, so that no run is resumed; anything else stays."""
    import shutil

    if output.exists() and any(output.iterdir()) and not (output / MARKER).exists():
        raise FileExistsError(f"{output} is not empty and not an earlier demo's folder: choose another output")
    for name in ("data", "rlhf_v", "mm_dpo"):
        if (output / name).exists():
            shutil.rmtree(output / name)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).touch()


MARKER = ".mmrlhf-demo"


@contextlib.contextmanager
def small_model_settings() -> Iterator[None]:
    """One thread, and no bars for loading 0.8 M weights; both as they were afterwards. A second thread wins a third on
    an idle machine, and loses threefold where another process shares the cores (spinning barriers)."""
    import torch
    from transformers.utils import logging

    threads, bars = torch.get_num_threads(), logging.is_progress_bar_enabled()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if bars:
            logging.enable_progress_bar()


class _Progress:
    """Lines with the seconds since the start."""

    def __init__(self, began: float):
        self.began = began

    def __call__(self, line: str) -> None:
        print(f"[{time.perf_counter() - self.began:5.0f} s] {line}", flush=True)
