"""What this GPU can do at most, measured: the GEMMs that the ops are made of, and copying device memory.

    PYTHONPATH=tests python -m benchmarks.gpu_ceilings --write FILE [--seconds 25]

Three GEMMs a head and number of rows: logits [N, H] x [H, V], dX [N, V] x [V, H] and dW [V, N] x [N, H], in bfloat16
with bfloat16 and with float32 results, on random data (zeros run over 10% faster); U is the first. Bandwidth counts
bytes read plus bytes written, over a buffer many times the L2. Exit status 2 without the device.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_measure import HEADS, Clock, HeadShape, interleaved, median, spread
from benchmarks.gpu_ops import save


def gemms(shape: HeadShape, rows: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The GEMMs of one head by name, into memory that is there already."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(rows, shape.width, device=device).to(dtype)
    weight = torch.randn(shape.vocab, shape.width, device=device, dtype=dtype)
    table = torch.rand(rows, shape.vocab, device=device, dtype=dtype)
    wanted = {"logits": (hidden, weight.T), "dX": (table, weight), "dW": (table.T, hidden)}
    found: dict[str, Callable[[], Any]] = {}
    for name, (left, right) in wanted.items():
        out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=device)
        found[name] = partial(torch.mm, left, right, out=out)
        if device.type == "cuda":
            found[f"{name} float32 out"] = partial(torch.mm, left, right, out_dtype=torch.float32, out=out.float())
    return found


def runs(step: Callable[[], Any]) -> bool:
    """Whether it does; an older PyTorch has no float32 results of bfloat16."""
    try:
        step()
    except (RuntimeError, TypeError, NotImplementedError):
        traceback.print_exc()
        return False
    return True


def bandwidth(device: torch.device, clock: Clock, size: int) -> dict[str, float]:
    """GB/s of a device-to-device copy and of an in-place scale of `size` bytes, read plus written."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    steps = {"copy": lambda: target.copy_(source), "scale in place": lambda: source.mul_(1.0001)}
    times = interleaved(steps, clock, seconds=1.0)
    return {name: 2.0 * source.numel() * 4 / median(spent) / 1e6 for name, spent in times.items()}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_ceilings", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the harness")
    parser.add_argument("--head", nargs="+", choices=HEADS, default=[name for name in HEADS if name != "tiny"])
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 8192])
    parser.add_argument("--seconds", type=float, default=25.0, help="for everything")
    parser.add_argument("--copy-bytes", type=int, default=4 << 30)
    parser.add_argument("--write", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device")
        return 2
    begin, clock = time.monotonic(), Clock(device)
    state: dict[str, Any] = {"bandwidth_gb_s": bandwidth(device, clock, chosen.copy_bytes), "gemm": []}
    print("GB/s: " + ", ".join(f"{name} {value:.0f}" for name, value in state["bandwidth_gb_s"].items()))
    for rows in chosen.rows:
        for head in chosen.head:
            if time.monotonic() - begin > chosen.seconds:
                print(f"not reached: {head} N={rows}")
                continue
            shape = HEADS[head]
            steps = gemms(shape, rows, device)
            for name in [name for name in steps if not runs(steps[name])]:
                print(f"FAILED {head} N={rows} {name}")
                del steps[name]
            times = interleaved(steps, clock, seconds=0.4, most=15)
            flops = 2.0 * rows * shape.width * shape.vocab
            for name, spent in times.items():
                ms = median(spent)
                row = {"head": head, "rows": rows, "gemm": name, "ms": ms, "tflops": flops / ms / 1e9}
                state["gemm"].append(row | {"spread": spread(spent)})
                print(f"{head:13} N={rows:<6} {name:20} {ms:9.3f} ms {row['tflops']:7.1f} TFLOP/s", flush=True)
            if chosen.write:
                save(chosen.write, state)
            del steps, times
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
