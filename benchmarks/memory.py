"""How much memory a step takes beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(step: Callable[[], Any], device: torch.device) -> int | None:
    """The most that `step` holds beyond what is there now: resident memory (Linux), or what CUDA allocates.

    None where the system cannot say.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what glibc keeps for later would hide what the step takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    step()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {name}")
