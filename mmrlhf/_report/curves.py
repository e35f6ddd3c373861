"""The curves of a run as small inline SVGs: one table of panels, one function that draws any of them.

matplotlib draws in four marker colours; the SVG then names CSS variables in their place, so that the page's theme,
light or dark, colours the curves too. Long runs are averaged in buckets before they are drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

CURVE_POINTS = 600  # points of a drawn curve: a panel is about 400 pixels wide

# Drawn in these colours, which stand in the SVG as hexadecimal, and named by CSS variable afterwards.
_INKS = {
    "#010101": "var(--series-1)",
    "#020202": "var(--series-2)",
    "#030303": "var(--muted)",
    "#040404": "var(--grid)",
}
_SERIES, _MUTED, _GRID = ("#010101", "#020202"), "#030303", "#040404"


@dataclass(frozen=True)
class Panel:
    """One small plot: up to two curves (key in metrics.jsonl -> label), an optional band and a level worth marking."""

    title: str
    curves: dict[str, str]
    caption: str
    band: tuple[str, str] | None = None
    level: float | None = None
    limits: tuple[float, float] | None = None
    smoothed: bool = True


PANELS = (
    Panel("Loss", {"loss": "loss"}, "mean over the pairs of a step"),
    Panel("Accuracy", {"rewards/accuracies": "accuracy"}, "share of pairs in order", None, 0.5, (0.0, 1.0)),
    Panel("Reward margin", {"rewards/margins": "margin"}, "chosen minus rejected", None, 0.0),
    Panel("Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, "β times policy over reference"),
    Panel("Log-probability", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, "nats a response"),
    Panel("β", {"beta/mean": "mean"}, "band: smallest to largest", ("beta/min", "beta/max")),
    Panel("Supervised term", {"sft_loss": "loss"}, "nats a token"),
    Panel("Gradient norm", {"grad_norm": "norm"}, "before clipping"),
    Panel("Learning rate", {"learning_rate": "rate"}, "as scheduled", smoothed=False),
    Panel("Tokens", {"tokens": "decoded", "scored_tokens": "scored"}, "a step"),
    Panel("Utilisation", {"utilization": "share"}, "share of the token budget", None, None, (0.0, 1.0)),
    Panel("Seconds", {"seconds": "time"}, "a step"),
)


def number(value: Any) -> float:
    """A float; NaN for what is no number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def column(steps: list[dict[str, Any]], key: str) -> np.ndarray:
    """One metric over the steps, [S] float64; NaN where it is missing or not finite."""
    values = np.array([number(row.get(key)) for row in steps], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def smooth(
    values: np.ndarray,  # [S]
) -> np.ndarray:
    """Exponential mean over about a twentieth of the run, unbiased at its start; gaps keep the mean before them."""
    decay = 1.0 - 2.0 / (max(len(values) / 20, 1.0) + 1.0)
    out, total, weight = np.full(len(values), np.nan), 0.0, 0.0
    for index, value in enumerate(values):
        if not np.isnan(value):
            total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out[index] = total / weight if weight else np.nan
    return out


def thin(
    values: np.ndarray,  # [S]
    how: Callable[[np.ndarray], float] = np.mean,
) -> np.ndarray:
    """At most CURVE_POINTS values: `how` over the finite ones of each bucket. Returns [min(S, CURVE_POINTS)]."""
    if len(values) <= CURVE_POINTS:
        return values
    buckets = (bucket[~np.isnan(bucket)] for bucket in np.array_split(values, CURVE_POINTS))
    return np.array([how(bucket) if len(bucket) else np.nan for bucket in buckets])


def short(value: float, digits: int = 3) -> str:
    """A figure for reading: so many significant digits (whole numbers below 10,000 in full), then k, M and G."""
    if not math.isfinite(value):
        return "–"
    size, suffix = value, ""
    for limit, unit, letter in ((999.5e6, 1e9, "G"), (999.5e3, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            size, suffix = value / unit, letter
            break
    text = f"{size:.0f}" if not suffix and abs(size) >= 1000 else f"{size:.{digits}g}"
    return text.replace("-", "−") + suffix


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def panels(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The panels that have data, each with its SVG, its legend and its last values."""
    drawn = []
    at = column(steps, "step")
    for panel in PANELS:
        curves = {key: column(steps, key) for key in panel.curves}
        curves = {key: values for key, values in curves.items() if not np.all(np.isnan(values))}
        if not curves or (panel.title == "Supervised term" and not np.nansum(np.abs(curves["sft_loss"]))):
            continue  # a recipe without the supervised term logs zeros
        gaps = sum(
            int(np.isnan(values[i])) for key, values in curves.items() for i, row in enumerate(steps) if key in row
        )
        legend = [
            {"ink": _INKS[_SERIES[i]], "label": panel.curves[key], "last": short(values[~np.isnan(values)][-1])}
            for i, (key, values) in enumerate(curves.items())
        ]
        svg = _draw(panel, steps, at, curves)
        note = f"{gaps} non-finite value{'s' if gaps > 1 else ''} left out" if gaps else ""
        drawn.append({"title": panel.title, "caption": panel.caption, "svg": svg, "legend": legend, "note": note})
    return drawn


def _draw(panel: Panel, steps: list[dict[str, Any]], at: np.ndarray, curves: dict[str, np.ndarray]) -> str:
    """One panel as inline SVG: raw values faint, smoothed values strong."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title, "font.size": 9.5}):
        figure = Figure(figsize=(4.6, 2.35), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        x = thin(at)
        if panel.band:
            low, high = (column(steps, key) for key in panel.band)
            axes.fill_between(x, thin(low, np.min), thin(high, np.max), color=_SERIES[0], alpha=0.16, linewidth=0)
        for ink, values in zip(_SERIES, curves.values(), strict=False):
            few = len(values) < 10  # too few to smooth: the points themselves
            faint = panel.smoothed and not few
            style: dict[str, Any] = {"color": ink, "solid_joinstyle": "round"}
            marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if few else {}
            axes.plot(x, thin(values), alpha=0.3 if faint else 1.0, linewidth=0.9 if faint else 1.8, **style, **marker)
            if faint:
                axes.plot(x, thin(smooth(values)), linewidth=1.8, **style)
        if panel.level is not None:
            axes.axhline(panel.level, color=_MUTED, linewidth=0.8, dashes=(3, 3))
        if panel.limits:
            axes.set_ylim(panel.limits[0] - 0.03, panel.limits[1] + 0.03)
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, colors=_MUTED, pad=4)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: short(value, 4)))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), f"{panel.title} by step")


def _inline(svg: str, label: str) -> str:
    """A matplotlib SVG file as an element for HTML: no header, no fixed size, no addresses, colours as variables."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    size = re.search(r'viewBox="[^"]+"', svg)
    assert size is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {size.group()} role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|matplotlib\.axis|xtick|ytick|text|FillBetween)[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for ink, variable in _INKS.items():
        svg = svg.replace(ink, variable)
    return svg
