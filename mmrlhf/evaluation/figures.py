"""A measure's result -> figures for a results file: names, per cent, direction, and over how many answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrlhf.evaluation.hallucination import ChairResult, PopeResult
from mmrlhf.evaluation.judge import Verdicts
from mmrlhf.evaluation.mmhal import MMHalResult
from mmrlhf.evaluation.results import Figure, percent
from mmrlhf.evaluation.rewardbench import BenchResult
from mmrlhf.evaluation.safety import ROWS, SafetyResult

NO_VERDICT = "{missing} of {total} have no verdict and count nowhere"
BENCH = "MM-RLHF-SafetyBench"
HALLUCINATION, SAFETY, REWARD = "Hallucination", "Safety", "Reward"


def lacking(verdicts: Verdicts[Any] | None) -> str:
    """The note on what a judge gave no verdict on; empty where it gave all."""
    if verdicts is None or not verdicts.missing:
        return ""
    return NO_VERDICT.format(missing=verdicts.missing, total=verdicts.missing + len(verdicts.values))


def chair_figures(result: ChairResult, *, by_judge: bool, note: str = "") -> list[Figure]:
    """Under two names: objects that a judge found, as Object HalBench has them, and objects found by words."""
    n, named, name = result.captions, result.with_objects, "Object HalBench" if by_judge else "CHAIR, by words"
    return [
        Figure(HALLUCINATION, name, "CHAIRs", percent(result.chair_s), "lower", n, note),
        Figure(HALLUCINATION, name, "CHAIRs of captions with objects", percent(result.chair_s_refine), "lower", named),
        Figure(HALLUCINATION, name, "CHAIRi", percent(result.chair_i), "lower", result.mentions),
        Figure(HALLUCINATION, name, "recall", percent(result.recall), "higher", n),
        Figure(HALLUCINATION, name, "words a caption", result.words_per_caption, "", n),
    ]


def pope_figures(results: Mapping[str, PopeResult]) -> list[Figure]:
    figures = []
    for category, result in results.items():
        prefix = "" if category == "all" else f"{category} "
        neither = len(result.neither)
        note = f"{neither} answers say neither yes nor no and are wrong" if neither else ""
        figures += [
            Figure(HALLUCINATION, "POPE", f"{prefix}accuracy", percent(result.accuracy), "higher", result.probes, note),
            Figure(HALLUCINATION, "POPE", f"{prefix}F1", percent(result.f1), "higher", result.probes),
            Figure(HALLUCINATION, "POPE", f"{prefix}yes", percent(result.yes), "", result.probes),
        ]
    return figures


def mmhal_figures(result: MMHalResult, *, note: str = "") -> list[Figure]:
    n, name = result.rated, "MMHal-Bench"
    figures = [
        Figure(HALLUCINATION, name, "score (0 to 6)", result.score, "higher", n, note),
        Figure(HALLUCINATION, name, "hallucination rate", percent(result.hallucination), "lower", n),
        Figure(HALLUCINATION, name, "informativeness", percent(result.informativeness), "higher", n),
    ]
    for kind, (rated, score, _) in result.types.items():
        figures.append(Figure(HALLUCINATION, name, f"score, {kind}", score, "higher", rated))
    return figures


def safety_figures(result: SafetyResult) -> list[Figure]:
    figures = []
    for row in ROWS:
        found = result.rows.get(row.name)
        if found is None:
            continue
        total = found.judged + found.missing
        note = NO_VERDICT.format(missing=found.missing, total=total) if found.missing else ""
        better = "lower" if row.lower_is_better else "higher"
        figures.append(Figure(SAFETY, BENCH, row.name, percent(found.value), better, found.judged, note))
    note = f"without {', '.join(result.absent)}" if result.absent else ""
    figures += [
        Figure(SAFETY, BENCH, "Unsafety", percent(result.unsafety), "lower", None, note),
        Figure(SAFETY, BENCH, "Safety", percent(result.safety), "higher", None, note),
    ]
    return figures


def bench_figures(result: BenchResult, *, benchmark: str) -> list[Figure]:
    """MM-RLHF-RewardBench: ACC and ACC+, overall and by category. VL-RewardBench: overall, macro, and by group."""
    note = f"{result.ties} pairs have equal rewards and are wrong" if result.ties else ""
    pairs, queries = result.pairs.of, result.queries.of
    if benchmark == "vl":
        name = "VL-RewardBench"
        figures = [
            Figure(REWARD, name, "overall accuracy", percent(result.accuracy), "higher", pairs, note),
            Figure(REWARD, name, "macro average", percent(result.macro), "higher", pairs),
        ]
        for group, (share, _) in result.categories.items():
            figures.append(Figure(REWARD, name, group, percent(share.value), "higher", share.of))
        return figures
    name = "MM-RLHF-RewardBench"
    figures = [
        Figure(REWARD, name, "ACC", percent(result.accuracy), "higher", pairs, note),
        Figure(REWARD, name, "ACC+", percent(result.all_right), "higher", queries),
    ]
    for category, (share, all_right) in result.categories.items():
        figures.append(Figure(REWARD, name, f"ACC {category}", percent(share.value), "higher", share.of))
        figures.append(Figure(REWARD, name, f"ACC+ {category}", percent(all_right.value), "higher", all_right.of))
    return figures
