"""The installed QuACK's chunked linear cross-entropy (CuTe, sm_90 and later): one scalar, bfloat16."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-probability, a scalar."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, targets, reduction="mean")


def missing() -> str | None:
    if find_spec("quack") is None:
        return "quack-kernels is not installed"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return "quack-kernels needs a GPU of compute capability 9.0"
    return None


def version() -> str:
    from importlib.metadata import version

    return version("quack-kernels")
