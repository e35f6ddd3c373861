"""benchmarks/results/NAME.json as a picture: a bar a side, in units of U, its design's floor marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(about: dict[str, Any], path: Path) -> None:
    """Write the figure; sides whose gate was red have no bar. The file's suffix says the format."""
    from matplotlib.figure import Figure

    cases = [case for case in about["cases"] if any(side["units"] is not None for side in case["sides"])]
    bars = sum(len(case["sides"]) + 1 for case in cases)
    figure = Figure(figsize=(8, 0.6 + 0.2 * bars), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(side["side"] for case in cases for side in case["sides"]))
    at, ticks = 0, []
    for case in cases:
        ticks.append((at, case["name"], "bold"))
        for side in case["sides"]:
            at += 1
            ticks.append((at, side["side"], "normal"))
            if side["units"] is not None:
                axes.barh(at, side["units"], color=f"C{names.index(side['side']) % 10}")
                axes.plot([side["floor"]] * 2, [at - 0.4, at + 0.4], color="black", linewidth=1)
        at += 1
    axes.set_yticks([y for y, _, _ in ticks], [text for _, text, _ in ticks], fontsize=7)
    for label, (_, _, weight) in zip(axes.get_yticklabels(), ticks, strict=True):
        label.set_fontweight(weight)
    axes.invert_yaxis()
    axes.set_xlabel("time in U = 2 N H V flops, one matmul of the rows and the head; black: the design's floor")
    axes.set_title(f"{about['command']}, {about['machine']['threads']} threads", fontsize=8)
    figure.savefig(path)
