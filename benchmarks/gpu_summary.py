"""One page of a run of `gpu.sh`: summary.md for a reader and summary.json for a program, from the parts of its steps.

    python -m benchmarks.gpu_summary --folder build/gpu/parts --out benchmarks/results/gpu

What a step left out, skipped or failed is named; a file that is not there leaves its part out. Beside the page: the
steps, their logs in one file, and the tuner's table. TARGETS is what the project set out to reach on an H200: each line
is reached, not reached, or not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Part = dict[str, Any]
PARTS = ("facts", "ceilings", "small", "ops", "step", "liger", "long", "full", "more")
STEP_PARTS = ("step", "liger", "long", "full")
CHECKERS = ("memcheck", "racecheck", "synccheck", "initcheck")
LOG_BYTES = 400_000  # of one step's log that log.txt keeps: its beginning and its end


def load(folder: Path) -> tuple[dict[str, Part], list[dict[str, str]]]:
    """The parts that are there, and the rows of steps.tsv."""
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTS if there(folder, name)}
    if "more" in found and "ops" not in found:
        found["ops"] = found.pop("more")
    keys = ("name", "status", "exit_status", "seconds", "reason")
    path = folder / "steps.tsv"
    lines = path.read_text().splitlines() if path.is_file() else []
    return found, [dict(zip(keys, line.split("\t"), strict=False)) for line in lines]


def there(folder: Path, name: str) -> bool:
    return (folder / f"{name}.json").is_file()


def best(case: Part) -> tuple[str, Part] | None:
    """The fastest of this library's green contestants."""
    timed = {n: r for n, r in case["contestants"].items() if "ms" in r and r["ours"]}
    return min(timed.items(), key=lambda item: item[1]["ms"]) if timed else None


def default(case: Part) -> Part:
    """What a user gets who asks for nothing: the triton backend with the configuration it picks."""
    return case["contestants"].get("triton", {})


def cases(parts: dict[str, Part], op: str, mode: str, heads: tuple[str, ...], padded: bool = False) -> list[Part]:
    """Cases of at least 2048 rows, or the padded pair."""
    return [
        c
        for c in measured(parts)
        if (c["case"]["op"], c["case"]["mode"]) == (op, mode)
        and c["case"]["head"] in heads
        and bool(c["case"]["padded"]) == padded
        and (padded or c["case"]["rows"] >= 2048)
    ]


def measured(parts: dict[str, Part]) -> list[Part]:
    """Every case of the ops: of the first plan, then what came after it."""
    return [*parts.get("ops", {}).get("cases", []), *parts.get("more", {}).get("cases", [])]


def units(found: list[Part]) -> float | None:
    """The worst case's multiple of U."""
    values = [default(c)["units"] for c in found if "units" in default(c)]
    return max(values) if values else None


def against(found: list[Part], peer: str) -> float | None:
    """The worst case's ratio of a peer's time to ours."""
    values = [
        c["contestants"][peer]["ms"] / default(c)["ms"]
        for c in found
        if "ms" in c["contestants"].get(peer, {}) and "ms" in default(c)
    ]
    return min(values) if values else None


BIG = ("qwen2-7b", "llama-3-8b")


def frozen(parts: dict[str, Part]) -> list[Part]:
    return cases(parts, "linear_logp", "frozen", BIG)


def fused(parts: dict[str, Part], *, padded: bool = False) -> list[Part]:
    return cases(parts, "fused_preference_loss", "trained", BIG, padded)


def logp_error(parts: dict[str, Part]) -> float | None:
    values = [default(c).get("rms_logp") for c in measured(parts)]
    return max((v for v in values if v is not None), default=None)


def peak_gib(parts: dict[str, Part]) -> float | None:
    values = [
        default(c).get("peak_bytes")
        for c in cases(parts, "linear_logp", "frozen", ("qwen2-7b",))
        if c["case"]["rows"] == 8192
    ]
    return max((v / 2**30 for v in values if v is not None), default=None)


def microseconds(parts: dict[str, Part]) -> float | None:
    rows = parts.get("small", {}).get("preference", [])
    return max((row["microseconds"] for row in rows), default=None)


def step_ratio(k: int, side: str) -> Callable[[dict[str, Part]], float | None]:
    def found(parts: dict[str, Part]) -> float | None:
        for case in parts.get("step", {}).get("cases", []):
            figure = case["sides"].get(side, {})
            if case["k"] == k:
                return figure.get("ratio") if figure.get("agrees", True) else None
        return None

    return found


# Name, what was measured (None: not), at most or at least, the figure, its unit.
TARGETS: tuple[tuple[str, Callable[[dict[str, Part]], float | None], str, float, str], ...] = (
    ("frozen head, N >= 2048, Qwen2-7B and Llama-3", lambda p: units(frozen(p)), "<=", 2.3, "U"),
    ("frozen head against TRL", lambda p: against(frozen(p), "trl"), ">=", 1.4, "x"),
    ("frozen head against cce_exact", lambda p: against(frozen(p), "cce_exact (cut-cross-entropy)"), ">=", 1.6, "x"),
    ("trained head, fused", lambda p: units(fused(p)), "<=", 3.4, "U"),
    ("trained head, fused, against TRL", lambda p: against(fused(p), "trl"), ">=", 1.25, "x"),
    ("trained head, fused, against Liger DPO", lambda p: against(fused(p), "liger dpo"), ">=", 2.0, "x"),
    ("padded pair against Liger DPO", lambda p: against(fused(p, padded=True), "liger dpo"), ">=", 5.0, "x"),
    ("rms error of logp against float64", logp_error, "<=", 1e-5, "nats"),
    ("peak extra memory, frozen, N = 8192, V = 152k", peak_gib, "<=", 0.6, "GiB"),
    ("score, loss and gradient in one launch, R <= 64", microseconds, "<=", 15.0, "us"),
    ("step, K = 2, live reference, against TRL", step_ratio(2, "live reference"), ">=", 1.7, "x"),
    ("step, K = 2, cached reference, against TRL", step_ratio(2, "cached reference"), ">=", 2.3, "x"),
    ("step, K = 5, live reference, against TRL", step_ratio(5, "live reference"), ">=", 10.0, "x"),
    ("step, K = 5, cached reference, against TRL", step_ratio(5, "cached reference"), ">=", 14.0, "x"),
)


def sanitized(steps: Sequence[dict[str, str]]) -> float | None:
    """How many of the four checkers found something; None where one did not run to its end and none found anything."""
    status = {step["name"]: step["status"] for step in steps}
    bad = sum(status.get(name) == "failed" for name in CHECKERS)
    return float(bad) if bad or all(status.get(name) == "ok" for name in CHECKERS) else None


def targets(parts: dict[str, Part], steps: Sequence[dict[str, str]] = ()) -> list[dict[str, Any]]:
    """Every target with what was measured; `reached` is None where nothing was."""
    bad = sanitized(steps)
    reached = None if bad is None else bad == 0
    name = "compute-sanitizer: memcheck, racecheck, synccheck, initcheck"
    found: list[dict[str, Any]] = [{"name": name, "target": "0 with findings", "measured": bad, "reached": reached}]
    for name, measure, sense, figure, unit in TARGETS:
        value = measure(parts)
        reached = None if value is None else (value <= figure if sense == "<=" else value >= figure)
        found.append({"name": name, "target": f"{sense} {figure:g} {unit}", "measured": value, "reached": reached})
    return found


def markdown(parts: dict[str, Part], steps: list[dict[str, str]], command: str) -> str:
    """The whole page."""
    lines = ["# On a GPU: built, checked, measured", "", *head(parts.get("facts"), command), "", "## Steps", ""]
    lines += ["| step | status | seconds | |", "|---|---|---|---|"]
    lines += [f"| {s['name']} | {s['status']} | {s['seconds']} | {s['reason']} |" for s in steps]
    lines += ["", "## Targets", "", "| what | target | measured | |", "|---|---|---|---|"]
    for row in targets(parts, steps):
        verdict = {True: "reached", False: "**not reached**", None: "not measured"}[row["reached"]]
        value = "" if row["measured"] is None else f"{row['measured']:.3g}"
        lines.append(f"| {row['name']} | {row['target']} | {value} | {verdict} |")
    lines += ceilings(parts.get("ceilings")) + race(parts)
    for case in measured(parts):
        lines += operation(case)
    for name in ("ops", "more"):
        part = parts.get(name, {})
        left = part.get("not_reached", [])
        lines += ["", f"Not reached in the time: {', '.join(left)}."] if left else []
        lines += [f"- FAILED {fault}" for fault in part.get("faults", [])]
    lines += small(parts.get("small"))
    for name in STEP_PARTS:
        lines += whole_step(parts.get(name))
    return "\n".join([*lines, ""])


def head(facts: Part | None, command: str) -> list[str]:
    if facts is None:
        return [f"Command: `{command}`", "", "The facts of the machine were not written."]
    device, smi = facts["device"] or {}, facts["nvidia_smi"] or {}
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items() if value)
    changed = {True: " with changes", False: "", None: " (not compared with git)"}[facts["changed"]]
    clocks = f"SM {smi.get('clocks.sm', '?')} when read, at most {smi.get('clocks.max.sm', '?')}"
    lines = [
        f"- Command: `{command}`",
        f"- Device: {device.get('name')}, capability {device.get('capability')}, power {smi.get('power.limit', '?')}",
        f"- Driver {smi.get('driver_version', '?')}, CUDA {facts['cuda']}; clocks: {clocks}",
        f"- Commit {facts['commit'] or 'unknown'}{changed}, sources {facts['sources']}",
        f"- {versions}",
    ]
    return lines + [f"- Not installed: {name} ({cost})" for name, cost in facts["missing"].items()]


def ceilings(found: Part | None) -> list[str]:
    if found is None:
        return []
    rates = ", ".join(f"{name} {value:.0f} GB/s" for name, value in found["bandwidth_gb_s"].items())
    lines = ["", "## Ceilings", "", f"Memory, read plus written: {rates}.", ""]
    lines += ["| head | N | GEMM | ms | TFLOP/s |", "|---|---|---|---|---|"]
    return lines + [
        f"| {g['head']} | {g['rows']} | {g['gemm']} | {g['ms']:.3f} | {g['tflops']:.0f} |" for g in found["gemm"]
    ]


def race(parts: dict[str, Part]) -> list[str]:
    """Where a way that is not picked beats the picked one by more than both spreads: what the tables should change."""
    lines = ["", "## Ways to E that beat the picked one", ""]
    for case in measured(parts):
        first, picked = best(case), default(case)
        if first is None or "ms" not in picked:
            continue
        name, found = first
        gain = picked["ms"] / found["ms"] - 1
        if gain > found["spread"] + picked["spread"]:
            lines.append(f"- {case['name']}: {name}, {found['units']:.2f} U against {picked['units']:.2f} U")
    if len(lines) == 3:
        lines.append("None.")
    return lines if parts.get("ops") else []


def operation(case: Part) -> list[str]:
    lines = ["", f"### {case['name']}", "", f"U = {case['unit_ms']:.3f} ms ({case['unit_tflops']:.0f} TFLOP/s); "]
    lines[-1] += f"the flops are {case['floor_units']} U."
    lines += ["", "| | ms | U | spread | peak MiB | rms logp error |", "|---|---|---|---|---|---|"]
    for name, found in case["contestants"].items():
        if "ms" not in found:
            lines.append(f"| {name} | {found['status']}: {found['reason'][:120].replace('|', '/')} | | | | |")
            continue
        peak = "" if found["peak_bytes"] is None else f"{found['peak_bytes'] / 2**20:.0f}"
        rms = "" if found["rms_logp"] is None else f"{found['rms_logp']:.1e}"
        lines.append(f"| {name} | {found['ms']:.3f} | {found['units']:.2f} | {found['spread']:.1%} | {peak} | {rms} |")
    return lines


def small(found: Part | None) -> list[str]:
    if found is None:
        return []
    lines = ["", "## Small kernel and waits for the device", "", "| R | P | N | us | us with its launch |"]
    lines.append("|---|---|---|---|---|")
    for row in found["preference"]:
        figures = f"{row['microseconds']:.1f} | {row['microseconds_with_launch']:.1f}"
        lines.append(f"| {row['responses']} | {row['pairs']} | {row['tokens']} | {figures} |")
    lines += [""] + [f"- FAILED {line}" for line in found["failed"]]
    for name, places in found["host_syncs"].items():
        where = f": {', '.join(f'`{place}`' for place in places)}" if places else ""
        graph = found["graphs"].get(name)
        lines.append(f"- {name}: {len(places)} waits{where}" + (f"; in a CUDA graph: {graph}" if graph else ""))
    return lines


def whole_step(found: Part | None) -> list[str]:
    if found is None:
        return []
    kind = "LoRA" if found["lora"] else "every weight of the decoder"
    kind += ", Liger's layers" if found.get("liger") else ""
    lines = ["", f"## Whole step, {found['model']}, {kind}", ""]
    lines += [
        "| K | prefix | side | s / step | TRL / it | peak GiB | loss difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in found["cases"]:
        for name, figure in case["sides"].items():
            seconds = f"{figure['seconds']:.3f}" if "seconds" in figure else figure["error"][:100].replace("|", "/")
            ratio = f"{figure['ratio']:.2f}" if "ratio" in figure else ""
            ratio += "" if figure.get("agrees", True) else " (losses differ)"
            peak = f"{figure['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in figure else ""
            apart = f"{figure['max_loss_difference']:.1e}" if "max_loss_difference" in figure else ""
            lines.append(f"| {case['k']} | {case['prefix']} | {name} | {seconds} | {ratio} | {peak} | {apart} |")
    for case in found["cases"]:
        for name, figure in case["sides"].items():
            waits = ", ".join(f"`{place}` {times}" for place, times in figure.get("waits", {}).items())
            lines += ["", f"Waits for the device in a step, {name}, K = {case['k']}: {waits}."] if waits else []
    return lines


def logs(folder: Path, steps: list[dict[str, str]]) -> str:
    """Every step's log, one after another, each at most LOG_BYTES long."""
    text = []
    for step in steps:
        path = folder / "logs" / f"{step['name']}.log"
        if path.is_file():
            whole = path.read_text(errors="replace")
            if len(whole) > LOG_BYTES:
                whole = f"{whole[: LOG_BYTES // 4]}\n[...]\n{whole[-LOG_BYTES * 3 // 4 :]}"
            text.append(f"===== {step['name']}: {step['status']}, {step['seconds']} s =====\n{whole}")
    return "\n".join(text)


def write(path: Path, text: str) -> None:
    """Whole or not at all: this runs while the steps do, and both may be killed."""
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    spare.write_text(text)
    os.replace(spare, path)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_summary", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="what the steps of gpu.sh wrote")
    parser.add_argument("--out", type=Path, help="where the page goes; default: the same folder")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    chosen = parser.parse_args(words)
    out = chosen.out or chosen.folder
    out.mkdir(parents=True, exist_ok=True)
    parts, steps = load(chosen.folder)
    command = os.environ.get("GPU_COMMAND", "bash benchmarks/gpu.sh")
    whole = {"command": command, "steps": steps, "targets": targets(parts, steps), **parts}
    write(out / "summary.json", json.dumps(whole, indent=1) + "\n")
    write(out / "summary.md", markdown(parts, steps, command))
    if out != chosen.folder:
        write(out / "log.txt", logs(chosen.folder, steps))
        for name in ("steps.tsv", "tuned.py"):
            if (chosen.folder / name).is_file():
                write(out / name, (chosen.folder / name).read_text())
    if not chosen.quiet:
        tell(parts, steps)
        print(f"summary: {out / 'summary.md'}")
    return 0


def tell(parts: dict[str, Part], steps: list[dict[str, str]]) -> None:
    """The targets, the whole steps, and what did not go well, in less than a hundred lines."""
    for part in (parts[name] for name in STEP_PARTS if name in parts):
        for line in whole_step(part)[6:]:
            print(line[:200])
    for row in targets(parts, steps):
        if row["measured"] is not None:
            print(f"{'ok ' if row['reached'] else 'NOT'} {row['name']}: {row['measured']:.3g} ({row['target']})")
    for row in targets(parts, steps):
        if row["measured"] is None:
            print(f"not measured: {row['name']}")
    for step in steps:
        if step["status"] not in ("ok", "left out"):
            print(f"{step['status']}: {step['name']} ({step['reason'][:300]})")


if __name__ == "__main__":
    sys.exit(main())
