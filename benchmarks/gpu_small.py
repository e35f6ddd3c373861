"""The small kernel (score -> loss -> gradient), CUDA graphs, and who waits for the device.

    PYTHONPATH=tests python -m benchmarks.gpu_small --write FILE

1. `preference` at R = 2 ... 64 responses, every pair of groups of 4: microseconds of one launch, alone (graph replay)
   and with Python's share, after its gate against float64. Must run under torch.cuda.set_sync_debug_mode("error").
2. The same captured in a CUDA graph: the replay must give bitwise what the launch gave.
3. linear_logp and fused_preference_loss, forward and backward: every wait for the device, with the line that waits.
   Told, not judged: `host_syncs` of 0 is what makes a step capturable.
Exit status 1 where 1 or 2 fails; 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_contestants import Case, mine
from benchmarks.gpu_measure import BETA, HEADS, Clock, Problem, interleaved, median
from benchmarks.gpu_ops import save
from mmrlhf.ops import reference
from numerics import assert_no_worse

SIZES = (2, 8, 16, 64)
TOKENS = 200  # of a response, about
REPLAYS = 50  # kernels in one graph: the time of one is the graph's over this


def objective(responses: int, device: torch.device, *, seed: int = 0) -> tuple[reference.Objective, Tensor]:
    """Groups of 4 (2 for a single pair), all their pairs, weights and reference scores; and logp [N]."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(TOKENS // 2, TOKENS * 3 // 2, (responses,), generator=g)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    size = min(4, responses)
    pairs = [(q + i, q + j) for q in range(0, responses, size) for i in range(size) for j in range(i + 1, size)]
    tokens = int(ends[-1])
    made = reference.Objective(
        ends.to(device),
        torch.tensor(pairs, device=device),
        token_weight=torch.rand(tokens, generator=g).to(device),
        reduction="sum",
        reference_scores=torch.randn(responses, generator=g).to(device),
        beta=BETA,
        kind="sigmoid",
        sft_weight=0.25,
    )
    return made, (-torch.rand(tokens, generator=g)).to(device)


def check(made: reference.Objective, logp: Tensor, run: Callable) -> None:
    """The gate: loss and d loss / d logp against float64; AssertionError with both figures."""
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = logp.to(dtype).requires_grad_()
        result = made(leaf)
        found.append((result.loss.detach(), torch.autograd.grad(result.loss, leaf)[0]))
    (loss, coef), (base_loss, base_coef) = found
    ours, own = run(made, logp)
    assert_no_worse(ours.loss, base_loss, loss, name="loss")
    assert_no_worse(own, base_coef, coef, name="d loss / d logp")


def launch(responses: int, device: torch.device) -> tuple[Callable[[], None], Any]:
    """One launch of the kernel into buffers that are there already, and those buffers."""
    from mmrlhf.kernels.triton.launch_preference import Buffers, Terms, preference

    made, logp = objective(responses, device)
    out = Buffers.empty(responses, made.pairs.shape[0], logp.numel(), device)
    terms = Terms(beta=BETA, sft_weight=made.sft_weight)

    def step() -> None:
        preference(
            logp,
            made.cu_seqlens,
            made.pairs,
            token_weight=made.token_weight,
            reference_scores=made.reference_scores,
            terms=terms,
            out=out,
        )

    return step, out


def captured(step: Callable[[], None], times: int) -> torch.cuda.CUDAGraph:
    """`times` calls of a warm `step` in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    return graph


def small_kernel(responses: int, clock: Clock, device: torch.device) -> dict[str, Any]:
    """Gate, no-sync check, capture and times of one size. AssertionError or RuntimeError says what failed."""
    from mmrlhf.ops import _triton

    check(*objective(responses, device), _triton.objective)
    step, out = launch(responses, device)
    step()
    torch.cuda.synchronize()
    first = [getattr(out, f.name).clone() for f in fields(out)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = captured(step, REPLAYS)
    for f in fields(out):
        getattr(out, f.name).fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    again = [getattr(out, f.name) for f in fields(out)]
    for f, a, b in zip(fields(out), first, again, strict=True):
        assert torch.equal(a, b), f"{f.name}: a replayed graph gives something else than the launch"
    times = interleaved({"graph": graph.replay, "launch": step}, clock, seconds=0.5)
    return {
        "responses": responses,
        "pairs": out.losses.numel(),
        "tokens": out.coef.numel(),
        "microseconds": median(times["graph"]) / REPLAYS * 1e3,
        "microseconds_with_launch": median(times["launch"]) * 1e3,
    }


def host_syncs(step: Callable[[], Any]) -> list[str]:
    """The lines of this project at which one call of a warm `step` waits for the device, most recent call last."""
    step()
    torch.cuda.synchronize()
    places: list[str] = []

    def note(message, category, filename, lineno, file=None, line=None) -> None:
        if "synchroniz" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if "mmrlhf" in f.filename or "kernels" in f.filename]
        frame = frames[-1] if frames else None
        places.append(f"{Path(frame.filename).name}:{frame.lineno} {frame.line}" if frame else f"{filename}:{lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def op_syncs(device: torch.device) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Waits of each op and mode, on a small head; and of those that never wait, whether a CUDA graph takes them."""
    problem = Problem.random(HEADS["qwen2-0.5b"], 512, device=device)
    found, graphs = {}, {}
    for op in ("linear_logp", "fused_preference_loss"):
        for mode in ("forward", "frozen", "trained"):
            if (op, mode) != ("fused_preference_loss", "forward"):
                case = Case(op, "qwen2-0.5b", 512, mode)
                step = mine(case, problem, "triton")
                try:
                    found[f"{op} {mode}"] = host_syncs(step)
                except Exception as error:  # the other modes still run
                    traceback.print_exc()
                    graphs[f"{op} {mode}"] = f"{type(error).__name__}: {str(error)[:200]}"
                    continue
                if not found[f"{op} {mode}"]:
                    graphs[f"{op} {mode}"] = capturable(step)
    return found, graphs


def capturable(step: Callable[[], Any]) -> str:
    """Says `captured`, or why not."""
    try:
        captured(step, 1).replay()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return "captured"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_small", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    device = torch.device("cuda")
    clock = Clock(device)
    failed: list[str] = []
    state: dict[str, Any] = {"preference": [], "host_syncs": {}, "failed": failed}
    for responses in SIZES:
        try:
            row = small_kernel(responses, clock, device)
        except Exception as error:  # a compiler may raise anything; the other sizes still run
            traceback.print_exc()
            failed.append(f"preference R={responses}: {type(error).__name__}: {str(error)[:400]}")
            print(f"FAILED {failed[-1]}", flush=True)
            continue
        state["preference"].append(row)
        print(
            f"preference R={row['responses']:<4} P={row['pairs']:<4} N={row['tokens']:<6} no sync, captured, "
            f"{row['microseconds']:7.1f} us, {row['microseconds_with_launch']:7.1f} us with its launch",
            flush=True,
        )
    if state["preference"]:
        state["median_microseconds"] = statistics.median(r["microseconds"] for r in state["preference"])
    if chosen.write:
        save(chosen.write, state | {"graphs": {}})
    state["host_syncs"], state["graphs"] = op_syncs(device)
    failed += [f"{name}: {why}" for name, why in state["graphs"].items() if name not in state["host_syncs"]]
    for name, places in state["host_syncs"].items():
        print(f"{name}: {len(places)} waits for the device {state['graphs'].get(name, '')}", *places, sep="\n    ")
    if chosen.write:
        save(chosen.write, state)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
