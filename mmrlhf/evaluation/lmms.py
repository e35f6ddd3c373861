"""mmrlhf's models inside lmms-eval: an adapter of its `lmms` class over `models.generate`, and a call that runs tasks.

lmms-eval 0.7 takes an instance of its model class wherever it takes a name; this is the sturdiest way in, for every
family that mmrlhf loads. Answers are greedy. What a task asks for beyond that (beams, a temperature) is said once and
noted in the results. Not covered: tasks that rank continuations by log-likelihood, several rounds, and videos given as
files; each is a clear error that names the task. lmms-eval fetches data sets from the hub by itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from mmrlhf.models import generate
from mmrlhf.models.parts import parameter_device

logger = logging.getLogger(__name__)
INSTALL = (
    "these benchmarks need lmms-eval (0.7), which is not installed. It asks for torchvision, and pip would replace a "
    "CPU build of torch: pip install lmms-eval with a constraints file that pins torch and torchvision to your versions"
)


def need_lmms_eval() -> Any:
    """The module, or ImportError saying how to install it."""
    try:
        import lmms_eval
    except ImportError as error:
        raise ImportError(f"{INSTALL} ({error})") from error
    return lmms_eval


def adapter(model: Any, processor: Any, *, batch_size: int = 8, max_new_tokens: int | None = None) -> Any:
    """An instance of lmms-eval's model class that answers with `model`.

    `max_new_tokens` overrides what the tasks say. Its `notes` list what tasks asked for and did not get.
    """
    need_lmms_eval()
    from lmms_eval.api.model import lmms

    class MmrlhfModel(lmms):
        is_simple = True  # requests are (context, options, pictures of a document, id, task, split)

        def __init__(self) -> None:
            super().__init__()
            self.notes: list[str] = []
            self.config = model.config
            self.device = parameter_device(model)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [self._understood(request.args) for request in requests]
            out = [""] * len(asked)
            for length in sorted({length for _, length, _ in asked}):
                places = [place for place, (_, own, _) in enumerate(asked) if own == length]
                for start in range(0, len(places), batch_size):
                    chosen = places[start : start + batch_size]
                    prompts = [asked[place][0]() for place in chosen]  # pictures are decoded a batch at a time
                    texts = generate.answer(model, processor, prompts, max_new_tokens=length, batch_size=batch_size)
                    for place, text in zip(chosen, texts, strict=True):
                        out[place] = cut(text, asked[place][2])
            return out

        def _understood(self, arguments: tuple) -> tuple[Any, int, list[str]]:
            context, options, pictures_of, number, task, split = arguments
            self._note(task, options)
            length = max_new_tokens or int(options.get("max_new_tokens") or 1024)
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            document = self.task_dict[task][split][number]
            return lambda: prompt_of(context, pictures_of(document), task), length, until

        def _note(self, task: str, options: dict[str, Any]) -> None:
            beams, heat = options.get("num_beams") or 1, options.get("temperature") or 0
            wanted = [f"{beams} beams"] * (beams > 1)
            wanted += [f"temperature {heat}"] * bool(options.get("do_sample") and heat > 0)
            note = f"{task} asks for {' and '.join(wanted)}; answers here are greedy"
            if wanted and note not in self.notes:
                self.notes.append(note)
                logger.warning(note)

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError(f"{requests[0].args[4]} ranks continuations by log-likelihood: not supported")

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise NotImplementedError("tasks of several rounds are not supported")

    return MmrlhfModel()


def prompt_of(context: str, pictures: Any, task: str) -> generate.Prompt:
    """A task's text and pictures as a prompt: pictures where `<image>` stands, if there are as many, else before it."""
    images = [picture for picture in pictures or [] if picture is not None]
    strange = next((picture for picture in images if not hasattr(picture, "convert")), None)
    if strange is not None:
        raise NotImplementedError(f"{task} gives {type(strange).__name__} where a picture should be (a video file?)")
    pieces = context.split("<image>")
    if len(pieces) != len(images) + 1:
        pieces = [*[""] * len(images), context.replace("<image>", "").strip()]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece.strip() else []
    return [{"role": "user", "content": parts}], [picture.convert("RGB") for picture in images]


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the marks that end an answer."""
    places = [place for mark in until if mark and (place := text.find(mark)) >= 0]
    return text[: min(places)].strip() if places else text


def run_tasks(
    model: Any,
    processor: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | None = None,
) -> tuple[dict[str, dict[str, tuple[float, bool | None]]], list[str]]:
    """task -> metric -> (value, higher is better), and notes. Tasks are run by lmms-eval in this process.

    Raises ImportError without lmms-eval, ValueError for a task it does not know.
    """
    need_lmms_eval()
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(f"lmms-eval knows no task {', '.join(unknown)}")
    ours = adapter(model, processor, batch_size=batch_size)
    found = evaluator.simple_evaluate(
        model=ours, tasks=list(tasks), batch_size=batch_size, limit=limit, task_manager=manager, log_samples=False
    )
    return read_results(found), ours.notes


def read_results(found: dict[str, Any]) -> dict[str, dict[str, tuple[float, bool | None]]]:
    """lmms-eval's results -> task -> metric -> (value, higher is better). Standard errors and texts are left out."""
    out: dict[str, dict[str, tuple[float, bool | None]]] = {}
    directions = found.get("higher_is_better") or {}
    for task, entries in (found.get("results") or {}).items():
        for name, value in entries.items():
            metric = name.split(",")[0]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or "stderr" in metric:
                continue
            if "," in name and math.isfinite(value):
                out.setdefault(task, {})[metric] = (float(value), (directions.get(task) or {}).get(metric))
    return out
