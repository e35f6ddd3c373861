"""MM-RLHF's evaluation: ten dimensions, the benchmarks of each, and who runs which.

    DIMENSIONS    dimension -> benchmarks, each with lmms-eval's task names (0.7.3), or with mmrlhf's own measure
    run           some of them on one model -> figures          command    the same as a line for a shell

lmms-eval has neither MMHal-Bench, Object HalBench nor the SafetyBench: `mmhal`, `hallucination` and `safety` measure
those, from files of the user's. The task variants are those of the paper's table 2 (arXiv 2502.10391). Several of
lmms-eval's tasks ask a judge of their own (its environment variables name it). What cannot be run is a figure without a
value and with a reason. Not covered: RewardBench, which is about reward models (`rewardbench`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmrlhf.evaluation import lmms
from mmrlhf.evaluation.results import NOT_RUN, Figure


@dataclass(frozen=True)
class Benchmark:
    name: str
    tasks: tuple[str, ...] = ()  # lmms-eval's
    own: str = ""  # chair | mmhal | safety: mmrlhf's measure


DIMENSIONS: dict[str, tuple[Benchmark, ...]] = {
    "Conversation": (
        Benchmark("LLaVA-In-The-Wild", ("llava_in_the_wild",)),
        Benchmark("LLaVA-Wilder", ("llava_wilder_small",)),
        Benchmark("WildVision-Bench", ("wildvision_0617",)),
    ),
    "General": (
        Benchmark("MME", ("mme",)),
        Benchmark("MMBench", ("mmbench_cn_dev",)),
        Benchmark("MMStar", ("mmstar",)),
        Benchmark("SeedBench2-Plus", ("seedbench_2_plus",)),
        Benchmark("VQAv2", ("vqav2_val_lite",)),
    ),
    "Chart and document": (
        Benchmark("AI2D", ("ai2d",)),
        Benchmark("ChartQA", ("chartqa_lite",)),
        Benchmark("DocVQA", ("docvqa_val_lite",)),
        Benchmark("InfoVQA", ("infovqa_val_lite",)),
    ),
    "OCR": (
        Benchmark("OCRBench", ("ocrbench",)),
        Benchmark("TextVQA", ("textvqa_val",)),
        Benchmark("WebSRC", ("websrc_val",)),
    ),
    "High resolution and real world": (
        Benchmark("MME-RealWorld", ("mmerealworld_lite", "mmerealworld_cn")),
        Benchmark("RealWorldQA", ("realworldqa",)),
    ),
    "Math": (
        Benchmark("MathVista", ("mathvista_testmini_cot", "mathvista_testmini_format", "mathvista_testmini_solution")),
        Benchmark("MathVerse", ("mathverse_testmini_vision",)),
    ),
    "Hallucination": (
        Benchmark("POPE", ("pope_adv", "pope_pop", "pope_random")),
        Benchmark("MMHal-Bench", own="mmhal"),
        Benchmark("Object HalBench", own="chair"),
    ),
    "Video": (
        Benchmark("Video-MME", ("videomme", "videomme_w_subtitle")),
        Benchmark("VideoChatGPT", ("videochatgpt",)),
        Benchmark("VideoDC", ("video_dc499",)),
    ),
    "Multi-image": (
        Benchmark("LLaVA-NeXT-Interleave", ("llava_interleave_bench_in_domain",)),
        Benchmark("MMMU-Pro", ("mmmu_pro_vision",)),
    ),
    "Safety": (Benchmark("MM-RLHF-SafetyBench", own="safety"),),
}
OWN = ("chair", "mmhal", "safety")
# lmms-eval's own adapters that run with transformers 5, by the model type of a folder's config.
ADAPTERS = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "internvl": "internvl_hf",
    "llava": "llava_hf",
}

Measure = Callable[[str], list[Figure]]  # the name of one of OWN -> its figures


def choose(dimensions: Sequence[str] = (), tasks: Sequence[str] = ()) -> list[tuple[str, Benchmark]]:
    """(dimension, benchmark) of the dimensions named (all, if none is), and of them those with one of `tasks`.

    A task may be lmms-eval's, one of OWN, or a benchmark's name; case does not matter. Raises ValueError for an
    unknown dimension or task.
    """
    wanted = {name.lower() for name in dimensions}
    unknown = sorted(wanted - {name.lower() for name in DIMENSIONS})
    if unknown:
        raise ValueError(f"dimensions are {', '.join(DIMENSIONS)}; got {unknown[0]!r}")
    asked = {name.lower() for name in tasks}
    chosen, found = [], set()
    for dimension, benchmarks in DIMENSIONS.items():
        if wanted and dimension.lower() not in wanted:
            continue
        for benchmark in benchmarks:
            if not asked or benchmark.name.lower() in asked or benchmark.own in asked:
                found |= {benchmark.name.lower(), benchmark.own}
                chosen.append((dimension, benchmark))
            elif own := tuple(task for task in benchmark.tasks if task in asked):
                found |= set(own)
                chosen.append((dimension, Benchmark(benchmark.name, own)))
    missing = sorted(asked - found)
    if missing:
        raise ValueError(f"no benchmark or task {missing[0]!r} in {', '.join(dimensions) or 'any dimension'}")
    return chosen


def command(
    chosen: Sequence[tuple[str, Benchmark]], model: str, *, model_type: str = "", output: str = "lmms-eval"
) -> str:
    """The line that runs the chosen tasks by lmms-eval's own command, in an environment of its own.

    `model_type` is the folder's (config.json); one that lmms-eval 0.7 has no working adapter for is a ValueError that
    says what to do instead.
    """
    tasks = [task for _, benchmark in chosen for task in benchmark.tasks]
    if not tasks:
        raise ValueError("none of the chosen benchmarks is lmms-eval's")
    if model_type not in ADAPTERS:
        raise ValueError(
            f"lmms-eval 0.7 has no adapter known to work for {model_type or 'this model'}: install it beside mmrlhf "
            "and run `mmrlhf eval suite` without --print, which brings its own"
        )
    words = ["python", "-m", "lmms_eval", "--model", ADAPTERS[model_type], "--model_args", f"pretrained={model}"]
    words += ["--tasks", ",".join(tasks), "--batch_size", "1", "--output_path", output]
    return shlex.join(words)


def run(
    chosen: Sequence[tuple[str, Benchmark]],
    load: Callable[[], tuple[Any, Any]],
    *,
    own: Measure | None = None,
    available: Sequence[str] = (),
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> tuple[list[Figure], list[str]]:
    """Figures of the chosen benchmarks, and notes.

    `own` measures one of OWN by its name; those not in `available` (no file was named for them) become figures without
    a value. lmms-eval's tasks run in this process; `load` gives (model, processor) for them.
    """
    tasks = [task for _, benchmark in chosen for task in benchmark.tasks]
    found: dict[str, dict[str, tuple[float, bool | None]]] = {}
    notes: list[str] = []
    if tasks:
        lmms.need_lmms_eval()  # before a model is loaded and before an own measure takes its hours
    figures: list[Figure] = []
    measured = {
        benchmark.own: own(benchmark.own) for _, benchmark in chosen if benchmark.own in available and own is not None
    }
    if tasks:
        model, processor = load()
        path = str(include_path) if include_path is not None else None
        found, notes = lmms.run_tasks(model, processor, tasks, batch_size=batch_size, limit=limit, include_path=path)
    for dimension, benchmark in chosen:
        if benchmark.own:
            why = f"no file was named for it (--{benchmark.own})"
            missing = Figure(dimension, benchmark.name, NOT_RUN, None, "", note=why)
            figures += measured.get(benchmark.own, [missing])
        for task in benchmark.tasks:
            figures += task_figures(dimension, benchmark.name, task, found.get(task, {}))
    return figures, notes


def task_figures(dimension: str, name: str, task: str, metrics: dict[str, tuple[float, bool | None]]) -> list[Figure]:
    """A task's metrics as figures, in lmms-eval's own units; one without a value where it gave none."""
    own = measurement(task)
    if not metrics:
        why = "lmms-eval gave no figure (an answer file to submit?)"
        return [Figure(dimension, name, task, None, "", note=why, measurement=own)]
    better = {True: "higher", False: "lower", None: ""}
    return [
        Figure(dimension, name, f"{task} {metric}", value, better[up], measurement=own)
        for metric, (value, up) in metrics.items()
    ]


def measurement(task: str) -> str:
    """The name in a results file of what one of lmms-eval's tasks measures."""
    return f"lmms-eval {task}"


def task_details(tasks: Sequence[str], notes: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """For a results file, by measurement: what two results must share to be comparable, and what a task did not get.

    A note that names none of the tasks (a part of one does) stands with each of them.
    """
    settings = {} if limit is None else {"limit": limit}
    shared = [note for note in notes if not note.startswith(tuple(tasks))]
    return {
        measurement(task): {
            "settings": settings,
            "notes": [note for note in notes if note in shared or note.startswith(task)],
        }
        for task in tasks
    }
