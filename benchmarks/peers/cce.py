"""The installed cut-cross-entropy, where there is one: per-row losses of the pass without logits.

`cce` leaves out gradients that bfloat16 would round away, `cce_exact` does not; both are CUDA kernels. On a CPU its
compiled PyTorch path runs, which makes all logits.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def logp(hidden: Tensor, weight: Tensor, targets: Tensor, *, impl: str) -> Tensor:
    """Log-probabilities [N]; `impl` is the package's word."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)


def missing() -> str | None:
    return None if find_spec("cut_cross_entropy") else "cut-cross-entropy is not installed"


def missing_kernels() -> str | None:
    return missing() or (None if torch.cuda.is_available() else "cut-cross-entropy's kernels need CUDA")


def version() -> str:
    from importlib.metadata import version

    return version("cut-cross-entropy")
