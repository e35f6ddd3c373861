"""The whole step's results as pictures: `python -m benchmarks.step_plot results/NAME.json [--format png]`.

    NAME_speedup   TRL's time over ours against prefix length and against K; dashed: what TRL multiplies over what we do
    NAME_scaling   seconds a prompt and peak memory, against prefix length and against K
    NAME_causes    the speed-up split into its causes

They lie beside the results. Everything drawn is in the file; sides that failed or disagreed are left out. The dashed
line counts flops of matmuls; the dotted one tokens through the decoder alone, a reference token as a third. Time above
the dashed line is what no flop counts: TRL's passes over the logits of every row, padding, logging.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = {"trl": "#555555", "live reference": "#1f77b4", "cached reference": "#d95f02"}
LABELS = {"trl": "TRL", "live reference": "mmrlhf, live reference", "cached reference": "mmrlhf, cached reference"}
MARKERS = ("o", "s", "^", "D")
Record = dict[str, Any]


def setting(record: Record, *but: str) -> tuple:
    """What records of one line have in common: the case without `but`."""
    names = [name for name in ("model", "dtype", "lora", "prefix", "response", "k") if name not in but]
    return (record["device"].partition(":")[0], *(record["case"][name] for name in names))


def lines(records: Iterable[Record], along: str) -> list[list[Record]]:
    """Groups of at least two records that differ in `along` alone, in its order."""
    found: dict[tuple, list[Record]] = defaultdict(list)
    for record in records:
        found[setting(record, along)].append(record)
    ordered = [sorted(group, key=lambda record: record["case"][along]) for group in found.values()]
    return [group for group in ordered if len({record["case"][along] for record in group}) > 1]


def panels(records: Iterable[Record]) -> list[tuple[str, str, list[list[Record]]]]:
    """(title, what the x axis is, lines): a panel for each K and way of training, then one for each line over K.

    Models share a panel over the prefix length, so that the same length on two of them can be compared.
    """
    by_panel: dict[tuple, list[list[Record]]] = defaultdict(list)
    for line in lines(records, "prefix"):
        by_panel[setting(line[0], "prefix", "model")].append(line)
    found = []
    for group in by_panel.values():
        case = group[0][0]["case"]
        found.append((f"K = {case['k']}, {kind(case)}, answers of {case['response']}", "prefix", group))
    for line in lines(records, "k"):
        case = line[0]["case"]
        title = f"prompt of {case['prefix']}, {kind(case)}, answers of {case['response']}"
        found.append((title, "k", [line]))
    return found


def kind(case: dict[str, Any]) -> str:
    return "LoRA" if case["lora"] else "trained whole"


def points(line: list[Record], along: str, side: str, value) -> tuple[list[float], list[float]]:
    """x and y of the records that have the side; `value` is a function of record and figure, None: left out."""
    pairs = []
    for record in line:
        figure = record["figures"].get(side, {})
        found = value(record, figure) if "ratio" in figure else None
        if found is not None:
            pairs.append((record["case"][along], found))
    return [x for x, _ in pairs], [y for _, y in pairs]


def prompt_seconds(record: Record, figure: dict[str, Any]) -> float:
    return figure["seconds"] / record["case"]["groups"]


def gigabytes(record: Record, figure: dict[str, Any]) -> float | None:
    return None if figure["peak_bytes"] is None else figure["peak_bytes"] / 2**30


def dress(axes: Any, along: str, label: str, line: list[Record]) -> None:
    """Axes, their ticks where the cases are, and plain numbers on them."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    at = sorted({record["case"][along] for record in line})
    axes.set_xscale("log")
    axes.set_xticks(at, [str(x) for x in at])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of the prompt, picture included" if along == "prefix" else "K, answers a prompt")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3, which="both", linewidth=0.5)


def speedup(axes: Any, title: str, along: str, group: list[list[Record]]) -> None:
    for marker, line in zip(MARKERS, group, strict=False):
        model = line[0]["case"]["model"]
        for side in ("cached reference", "live reference"):
            colour = COLOURS[side]
            x, y = points(line, along, side, lambda _, figure: figure["ratio"])
            axes.plot(x, y, marker + "-", color=colour, label=f"{LABELS[side]} ({model})")
            for name, style in (("flops", "--"), ("tokens", ":")):
                x, y = points(line, along, side, lambda _, figure, name=name: figure["ceiling"][name])
                axes.plot(x, y, style, color=colour, linewidth=1)
    if along == "k":
        axes.set_yscale("log")
        axes.set_yticks([1, 2, 5, 10, 20, 40])
    else:
        axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linewidth=0.8)
    dress(axes, along, "TRL's seconds / ours", [record for line in group for record in line])
    axes.plot([], [], "k--", linewidth=1, label="fewer flops (all matmuls)")
    axes.plot([], [], "k:", linewidth=1, label="fewer tokens (decoder alone)")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def scaling(axes: Any, title: str, along: str, group: list[list[Record]], value, label: str) -> None:
    for marker, line in zip(MARKERS, group, strict=False):
        for side, colour in COLOURS.items():
            x, y = points(line, along, side, value)
            axes.plot(x, y, marker + "-", color=colour, label=f"{LABELS[side]} ({line[0]['case']['model']})")
    axes.set_yscale("log")
    dress(axes, along, label, [record for line in group for record in line])
    axes.yaxis.set_minor_formatter("")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def waterfall(axes: Any, record: Record) -> None:
    """The causes one on the other, on a log scale: lengths add up as factors multiply."""
    top = 1.0
    for index, factor in enumerate(record["causes"].values()):
        low, high = sorted((top, top * factor))
        axes.bar(index, high - low, bottom=low, color="#1f77b4" if factor >= 1 else "#b2182b", width=0.7)
        axes.annotate(f"{factor:.2f}x", (index, high), ha="center", va="bottom", fontsize=8)
        top *= factor
    names = [*record["causes"], "all"]
    axes.bar(len(names) - 1, top - 1, bottom=1, color="#555555", width=0.7)
    axes.annotate(f"{top:.1f}x", (len(names) - 1, top), ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylim(0.9, top * 1.4)
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t <= top * 1.4]
    axes.set_yticks(ticks, [f"{t}x" for t in ticks])
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30, ha="right")
    case = record["case"]
    axes.set_title(f"K = {case['k']}, prompt of {case['prefix']}, answers of {case['response']}", fontsize=9)
    axes.set_ylabel("TRL's seconds / ours")


def draw(records: list[Record]) -> dict[str, Any]:
    """{"speedup", "scaling", "causes"}: matplotlib figures; those that have nothing to show are left out."""
    from matplotlib.figure import Figure

    found: dict[str, Any] = {}
    shown = panels(records)
    if shown:
        wide = 5.2 * len(shown)
        found["speedup"] = Figure(figsize=(wide, 4.6), layout="constrained")
        for axes, panel in zip(found["speedup"].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            speedup(axes, *panel)
        found["scaling"] = Figure(figsize=(wide, 8.6), layout="constrained")
        grid = found["scaling"].subplots(2, len(shown), squeeze=False)
        for column, panel in enumerate(shown):
            scaling(grid[0, column], *panel, prompt_seconds, "seconds a prompt")
            scaling(grid[1, column], *panel, gigabytes, "peak GiB beyond the policy's weights")
    split = [record for record in records if record["causes"]]
    if split:
        found["causes"] = Figure(figsize=(4.6 * len(split), 3.8), layout="constrained")
        for axes, record in zip(found["causes"].subplots(1, len(split), squeeze=False)[0], split, strict=True):
            waterfall(axes, record)
    for figure in found.values():
        figure.suptitle(origin(records), fontsize=8)
    return found


def origin(records: list[Record]) -> str:
    """Machine, versions and commits that the figures are from."""
    machines = {
        f"{r['machine']['gpu'] or r['machine']['processor']}, {r['machine']['threads']} threads" for r in records
    }
    versions = {f"torch {r['versions']['torch']}, TRL {r['versions']['trl']}" for r in records}
    commits = {str(r["commit"]) for r in records}
    return "; ".join([*sorted(machines), *sorted(versions), f"commit {', '.join(sorted(commits))}"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a file that benchmarks.train_step wrote")
    parser.add_argument("--format", default="svg", choices=("svg", "png"))
    chosen = parser.parse_args(words)
    records = json.loads(chosen.results.read_text())["cases"]
    drawn = draw(records)
    for name, figure in drawn.items():
        path = chosen.results.with_name(f"{chosen.results.stem}_{name}.{chosen.format}")
        figure.savefig(path, **({"dpi": 110} if chosen.format == "png" else {"metadata": {"Date": None}}))
        print(path)
    if not drawn:
        print("nothing to draw: no two cases differ in prefix length or K alone, and none is split into causes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
