"""benchmarks/results/NAME.json as pictures: a bar a side, in units of U, its design's floor marked; and, for what was
measured at several N, time and memory over N."""

from __future__ import annotations

import textwrap
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
    label = "time in U = 2 N H V flops, one matmul of the rows and the head; black: the design's floor"
    figure.supxlabel(label, fontsize=8)
    figure.suptitle(_how(about, 130), fontsize=6)
    figure.savefig(path)


def _how(about: dict[str, Any], width: int) -> str:
    """The command and its threads in lines of `width` characters, cut before options: matplotlib would run over the
    edge of the picture."""
    command = about["command"].replace("--case ", "--case\u00a0").replace("--side ", "--side\u00a0")
    lines = textwrap.wrap(f"{command}, {about['machine']['threads']} threads", width, break_on_hyphens=False)
    return "\n".join(lines).replace("\u00a0", " ")


def curves(about: dict[str, Any], path: Path) -> bool:
    """Milliseconds and extra bytes of every side over N, two axes a head and task; False where nothing has two N."""
    from matplotlib.figure import Figure

    families: dict[tuple[str, ...], dict[str, list[tuple[int, float, int | None]]]] = {}
    for case in about["cases"]:
        kind = (case["task"], case["head"], case["dtype"], case["grads"])
        for side in case["sides"]:
            if side["units"] is not None:
                point = (case["rows"], side["milliseconds"], side["extra_bytes"])
                families.setdefault(kind, {}).setdefault(side["side"], []).append(point)
    families = {k: v for k, v in families.items() if any(len(points) > 1 for points in v.values())}
    if not families:
        return False
    names = list(dict.fromkeys(name for sides in families.values() for name in sides))
    figure = Figure(figsize=(9, 3.2 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), 2, squeeze=False)
    for (time, memory), (kind, sides) in zip(grid, families.items(), strict=True):
        for name, points in sides.items():
            rows, milliseconds, extra = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            style = {"marker": "o", "markersize": 4, "color": f"C{names.index(name) % 10}", "label": name}
            time.loglog(rows, milliseconds, **style)
            if None not in extra:
                memory.loglog(rows, [max(found, 1) / 2**20 for found in extra], **style)
        time.set_ylabel("ms")
        memory.set_ylabel("MiB on top of the inputs")
        for axes in (time, memory):
            axes.set_title(" / ".join(kind), fontsize=8)
            axes.set_xlabel("N, scored tokens")
            axes.grid(True, which="major", alpha=0.3)
        time.legend(fontsize=7)
    figure.suptitle(_how(about, 150), fontsize=6)
    figure.savefig(path)
    return True
