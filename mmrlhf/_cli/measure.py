"""What `mmrlhf eval` does: rows, answers, verdicts, figures, joined for each of its commands.

The rooms that it joins (evaluation, reward) know nothing of each other, so this is where a reward model meets its
benchmark. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def _name(arguments: argparse.Namespace) -> str:
    given = arguments.name or arguments.model or getattr(arguments, "answers", None) or arguments.scores
    return str(given)


def _folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.output or Path("runs/eval") / (Path(_name(arguments)).stem or "model"))


def _root(arguments: argparse.Namespace, data: str) -> Path:
    if arguments.root:
        return Path(arguments.root)
    return Path(data) if Path(data).is_dir() else Path(data).parent


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Model and processor, loaded once a command."""
    from mmrlhf.models.load import check_pair, load_model, load_processor

    if not hasattr(arguments, "loaded"):
        code = {"trust_remote_code": arguments.trust_remote_code, "revision": arguments.revision}
        model = load_model(arguments.model, dtype=arguments.dtype, device=_device(arguments.device), **code)
        processor = load_processor(arguments.model, **code)
        check_pair(model, processor)
        arguments.loaded = model, processor
    return arguments.loaded


def _answers(
    arguments: argparse.Namespace, items: Sequence[Any], name: str, data: str
) -> tuple[dict[str, str], list[Any], list[Any]]:
    """Answers by id, the items that have one, and the bad rows met on the way."""
    from mmrlhf.evaluation import answers

    if arguments.answers:
        given = answers.read_answers(arguments.answers)
        unused = len(set(given) - {item.id for item in items})
        lacking = [item.id for item in items if item.id not in given]
        if lacking:
            raise ValueError(f"{arguments.answers} lacks {len(lacking)} answers: {', '.join(lacking[:5])}")
        if unused:
            _say(f"{unused} answers of {arguments.answers} belong to no row of {data} and are left out")
        return given, list(items), []
    given, bad = answers.answer_questions(
        [item.question for item in items],
        _folder(arguments) / f"answers-{name}.jsonl",
        lambda: _load(arguments),
        model_name=_model_name(arguments),
        root=_root(arguments, data),
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        on_bad_row=arguments.on_bad_row,
        say=_say,
    )
    return given, [item for item in items if item.id in given], bad


def _need_judge(arguments: argparse.Namespace, what: str) -> None:
    """ValueError where there is no judge: said before hours of answers."""
    if not arguments.judge:
        raise ValueError(f"{what} needs a judge: --judge MODEL (with --judge-url for an endpoint of your own)")


def _the_judge(arguments: argparse.Namespace) -> Any:
    from mmrlhf.evaluation.judge import ChatJudge, LocalJudge

    if not hasattr(arguments, "judge_made"):
        name = arguments.judge
        if name.startswith("local:"):
            device = _device(arguments.device)
            arguments.judge_made = LocalJudge(name.removeprefix("local:"), device=device, dtype=arguments.dtype)
        else:
            key = os.environ.get(arguments.judge_key_env) or None
            arguments.judge_made = ChatJudge(name, base_url=arguments.judge_url, api_key=key)
    return arguments.judge_made


def _judge_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"cache": _folder(arguments) / "judge.jsonl", "workers": arguments.judge_workers, "say": _say}


def _templates(arguments: argparse.Namespace, defaults: Mapping[str, str]) -> dict[str, str]:
    """The judge's prompts of a measure by kind: its own, or those that were named."""
    kinds = ("extract", "rate", "states", "noise", "harm", "risk")
    found = dict(defaults)
    for word in arguments.judge_template:
        kind, _, file = word.partition("=")
        if kind not in kinds or not file:
            raise ValueError(f"--judge-template is KIND=FILE with one of {', '.join(kinds)}, got {word!r}")
        if kind in defaults:
            found[kind] = Path(file).read_text(encoding="utf-8")
    return found


def _settings(arguments: argparse.Namespace, templates: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """What two results must share to be comparable."""
    settings = dict(more)
    if arguments.model:
        settings["max_new_tokens"] = arguments.max_new_tokens
    if templates and arguments.judge:
        settings["judge"] = arguments.judge
        text = "\0".join(templates[kind] for kind in sorted(templates))
        settings["judge_prompts"] = hashlib.sha256(text.encode()).hexdigest()[:12]
    return settings


def _measurement(arguments: argparse.Namespace, name: str) -> str:
    """What a results file knows it by. Objects found by words and by a judge are two measurements: both may stay."""
    return "chair by judge" if name == "chair" and arguments.judge else name


def _of(name: str, figures: Sequence[Any]) -> list[Any]:
    """The figures of the measurement of this name."""
    return [dataclasses.replace(figure, measurement=name) for figure in figures]


def _write(arguments: argparse.Namespace, figures: list[Any], details: Mapping[str, Any]) -> int:
    from mmrlhf.evaluation.answers import model_fingerprint
    from mmrlhf.evaluation.results import NOT_RUN, Results, load, save, table

    weights = model_fingerprint(_model_name(arguments)) if arguments.model else ""
    found = Results(_name(arguments), figures, dict(details), weights=weights)
    print(table(found))
    path = _folder(arguments) / "results.json"
    before = {figure.key for figure in load(path).figures if figure.metric != NOT_RUN} if path.exists() else set()
    print(f"\nthe results lie in {save(found, path)}")
    gone = before - {figure.key for figure in load(path).figures}
    if gone:
        named = ", ".join(sorted(f"{benchmark} {metric}" for _, benchmark, metric in gone)[:5])
        _say(f"{len(gone)} figures of an earlier measurement, which the new one does not have, are gone: {named}")
    return 0


def _model_name(arguments: argparse.Namespace) -> str:
    return f"{arguments.model}@{arguments.revision}" if arguments.revision else arguments.model


def _bad_rows(*lists: Sequence[Any]) -> list[dict[str, str]]:
    rows = [{"source": row.source, "reason": row.reason} for bad in lists for row in bad]
    if rows:
        _say(f"{len(rows)} rows were left out; results.json names them")
    return rows


def rewardbench(arguments: argparse.Namespace) -> int:
    from mmrlhf.evaluation import rewardbench as bench
    from mmrlhf.evaluation.figures import bench_figures

    pairs, bad = bench.read_comparisons(arguments.data, benchmark=arguments.benchmark, on_bad_row=arguments.on_bad_row)
    if arguments.scores:
        scores = bench.read_scores(arguments.scores)
    else:
        unreadable: list[Any] = []
        scores = bench.score_by_groups(pairs, _group_scorer(arguments, unreadable))
        pairs = [pair for pair in pairs if pair.id in scores] if unreadable else pairs
        bad = [*bad, *unreadable]
    result = bench.measure(pairs, scores)
    settings = {"critic": arguments.critic} if arguments.model else {}
    name = f"rewardbench {arguments.benchmark}"
    details = {
        name: {
            "settings": settings,
            "scores": {pair: list(both) for pair, both in scores.items()},
            "wrong": list(result.wrong),
            "bad_rows": _bad_rows(bad),
        }
    }
    return _write(arguments, _of(name, bench_figures(result, benchmark=arguments.benchmark)), details)


def _group_scorer(arguments: argparse.Namespace, bad: list[Any]) -> Callable[[Sequence[Any]], Any]:
    from mmrlhf.reward.critique import load_reward_model
    from mmrlhf.reward.score import score_groups

    reward = load_reward_model(
        arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        revision=arguments.revision,
    )
    root = _root(arguments, arguments.data)
    options = {"on_bad_row": arguments.on_bad_row, "bad_rows": bad, "critic": arguments.critic}
    return lambda groups: score_groups(reward, groups, root=root, **options)


def hallucination(arguments: argparse.Namespace) -> int:
    figures, details = _HALLUCINATION[arguments.benchmark](arguments, arguments.data)
    name = _measurement(arguments, arguments.benchmark)
    return _write(arguments, _of(name, figures), {name: details})


def _chair(arguments: argparse.Namespace, data: str) -> tuple[list[Any], dict[str, Any]]:
    from mmrlhf.evaluation import hallucination as measures
    from mmrlhf.evaluation.figures import chair_figures, lacking

    objects = None
    if arguments.coco_instances:
        objects = measures.coco_objects(arguments.coco_instances, arguments.coco_captions)
    elif arguments.coco_captions:
        raise ValueError("--coco-captions needs --coco-instances beside it")
    templates = _templates(arguments, {"extract": measures.EXTRACT})
    items, bad = measures.read_captions(data, objects=objects, on_bad_row=arguments.on_bad_row)
    given, items, unreadable = _answers(arguments, items, "chair", data)
    verdicts = phrases = None
    if arguments.judge:
        said = {item.id: given[item.id] for item in items}
        options = _judge_options(arguments)
        verdicts = measures.extract_objects(_the_judge(arguments), said, template=templates["extract"], **options)
        phrases = verdicts.values
        items = [item for item in items if item.id in phrases]
    result = measures.chair(items, given, phrases=phrases, count=arguments.count)
    details: dict[str, Any] = {
        "settings": _settings(arguments, templates, count=arguments.count),
        "absent": {name: list(words) for name, words in result.absent.items()},
        "bad_rows": _bad_rows(bad, unreadable),
    }
    details |= {"judge": verdicts.as_dict()} if verdicts else {}
    return chair_figures(result, by_judge=verdicts is not None, note=lacking(verdicts)), details


def _pope(arguments: argparse.Namespace, data: str) -> tuple[list[Any], dict[str, Any]]:
    from mmrlhf.evaluation import hallucination as measures
    from mmrlhf.evaluation.figures import pope_figures

    items, bad = measures.read_probes(data, on_bad_row=arguments.on_bad_row)
    given, items, unreadable = _answers(arguments, items, "pope", data)
    results = measures.pope(items, given, style=arguments.style)
    return pope_figures(results), {
        "settings": _settings(arguments, {}, style=arguments.style),
        "neither": list(results["all"].neither),
        "bad_rows": _bad_rows(bad, unreadable),
    }


def _mmhal(arguments: argparse.Namespace, data: str) -> tuple[list[Any], dict[str, Any]]:
    from mmrlhf.evaluation import mmhal
    from mmrlhf.evaluation.figures import lacking, mmhal_figures

    _need_judge(arguments, "MMHal-Bench")
    templates = _templates(arguments, {"rate": mmhal.RATE})
    items, bad = mmhal.read_mmhal(data, on_bad_row=arguments.on_bad_row)
    given, items, unreadable = _answers(arguments, items, "mmhal", data)
    options = _judge_options(arguments)
    verdicts = mmhal.rate_mmhal(items, given, _the_judge(arguments), template=templates["rate"], **options)
    figures = mmhal_figures(mmhal.mmhal(items, verdicts.values), note=lacking(verdicts))
    return figures, {
        "settings": _settings(arguments, templates),
        "ratings": verdicts.values,
        "judge": verdicts.as_dict(),
        "bad_rows": _bad_rows(bad, unreadable),
    }


_HALLUCINATION = {"chair": _chair, "pope": _pope, "mmhal": _mmhal}


def safety(arguments: argparse.Namespace) -> int:
    figures, details = _safety_figures(arguments, arguments.data)
    return _write(arguments, _of("safety", figures), {"safety": details})


def _safety_figures(arguments: argparse.Namespace, data: str) -> tuple[list[Any], dict[str, Any]]:
    from mmrlhf.evaluation import safety as measures
    from mmrlhf.evaluation.figures import safety_figures

    items, bad = measures.read_safety(data, on_bad_row=arguments.on_bad_row)
    needed = sorted({item.set for item in items} - set(measures.BY_WORDS))
    if needed:
        _need_judge(arguments, f"the safety benchmark's {', '.join(needed)}")
    templates = _templates(arguments, measures.TEMPLATES)
    given, items, unreadable = _answers(arguments, items, "safety", data)
    values: dict[str, bool] = {}
    details: dict[str, Any] = {"settings": _settings(arguments, templates, style=arguments.style)}
    details["bad_rows"] = _bad_rows(bad, unreadable)
    if needed:
        options = _judge_options(arguments)
        verdicts = measures.judge_safety(items, given, _the_judge(arguments), templates=templates, **options)
        values = verdicts.values
        details["judge"] = verdicts.as_dict()
    return safety_figures(measures.safety(items, given, values, style=arguments.style)), details


def suite(arguments: argparse.Namespace) -> int:
    from mmrlhf.evaluation import suite as suites

    files = {name: getattr(arguments, name) for name in suites.OWN if getattr(arguments, name)}
    chosen = suites.choose(arguments.dimension, arguments.task)
    if arguments.answers:
        raise ValueError("the suite asks a model itself: --model, not --answers")
    if arguments.show:
        return _show(arguments, chosen, files)
    if "mmhal" in files and any(benchmark.own == "mmhal" for _, benchmark in chosen):
        _need_judge(arguments, "MMHal-Bench")
    details: dict[str, Any] = {}

    def own(name: str) -> list[Any]:
        measure = {**_HALLUCINATION, "safety": _safety_figures}[name]
        known_as = _measurement(arguments, name)
        figures, details[known_as] = measure(arguments, files[name])
        return _of(known_as, figures)

    figures, notes = suites.run(
        chosen,
        lambda: _load(arguments),
        own=own,
        available=tuple(files),
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        include_path=arguments.include_path,
    )
    tasks = [task for _, benchmark in chosen for task in benchmark.tasks]
    return _write(arguments, figures, details | suites.task_details(tasks, notes, limit=arguments.limit))


def _show(arguments: argparse.Namespace, chosen: Sequence[tuple[str, Any]], files: Mapping[str, str]) -> int:
    from mmrlhf.evaluation import suite as suites
    from mmrlhf.models.processors import read_json

    for dimension, benchmark in chosen:
        way = ", ".join(benchmark.tasks) or f"mmrlhf's own: --{benchmark.own} {files.get(benchmark.own, 'FILE')}"
        print(f"{dimension:32}{benchmark.name:24}{way}")
    if any(benchmark.tasks for _, benchmark in chosen):
        kind = (read_json(Path(arguments.model) / "config.json") or {}).get("model_type", "")
        try:
            line = suites.command(chosen, arguments.model, model_type=kind)
        except ValueError as error:  # a family that only mmrlhf's own adapter runs
            line = str(error)
        print(f"\n{line}")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from mmrlhf.evaluation import results

    print(results.compare(results.load(arguments.before), results.load(arguments.after)))
    return 0
