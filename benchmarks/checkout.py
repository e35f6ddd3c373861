"""Which code a results file is of."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str | None:
    """HEAD of the checkout, with "+" where its code was changed since; None outside a checkout."""
    here = Path(__file__).parents[1]
    paths = ("mmrlhf", "kernels", "csrc", "benchmarks", ":!benchmarks/results")
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "--", *paths], cwd=here, capture_output=True)
    except OSError:
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else None
