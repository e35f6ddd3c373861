"""PyTorch's own paths: the full matrix of logits, and torch.nn.functional.linear_cross_entropy in its chunked form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] float32, from logits [N, V] in the dtype of the inputs."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def mean_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A scalar; the chunked form makes no [N, V], and has no per-row losses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="mean", options=options)


def missing_mean_nll() -> str | None:
    return None if hasattr(F, "linear_cross_entropy") else f"torch {torch.__version__} has no linear_cross_entropy"


def version() -> str:
    return torch.__version__
