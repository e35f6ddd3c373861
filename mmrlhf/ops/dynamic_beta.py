"""Reward margin of a pair to its beta: MM-RLHF's Dynamic Reward Scaling, and the variant its released code runs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmrlhf.ops import checks, reference


def dynamic_beta(
    margin: Tensor,  # [P]
    *,
    beta: float = 0.1,
    w: float = 0.5,
    k: float = 0.5,
) -> Tensor:
    """beta * (1 + w * (1 - exp(-k * margin))), held in [beta, (1 + w) * beta]. [P], in the dtype of `margin`.

    MM-RLHF (2502.10391) section 4: `margin` is reward(better) - reward(worse), beta_ori = 0.1 and w = k = 0.5 its
    defaults. A negative margin gives plain `beta`, and so does NaN, which is how a batch marks a pair without one.

    Raises TypeError where `margin` is not float32 or float64 or another argument is no number, ValueError for
    beta <= 0, w < 0 or k <= 0.
    """
    checks.tensor("margin", margin, checks.SCORE_DTYPES)
    checks.positive("beta", beta)
    checks.not_negative("w", w)
    checks.positive("k", k)
    return reference.dynamic_beta(margin, beta=beta, w=w, k=k)


def implicit_beta(
    log_ratio_margin: Tensor,  # [P]
    *,
    beta: float = 0.1,
    w: float = 0.5,
    keep: float = 0.8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One beta for the batch from the policy's own (implicit) reward; a scalar tensor, at least 1e-3.

    This is what MM-RLHF's *released trainer* does by default, in the place of Dynamic Reward Scaling, and what its
    paper found not to help (average 74.3, plain DPO 74.9, MM-DPO 76.5). `log_ratio_margin` is
    (policy - reference) of the better minus that of the worse response, in nats. A share `keep` of the pairs is drawn
    without replacement, by a normal density around the mean; beta * (1 + w * (mean of drawn - mean of all)).
    With too few pairs to draw one, the result is `beta` (the released code fails there). The draw uses `generator`.

    Raises TypeError for a dtype, ValueError for beta <= 0, w < 0 or keep outside (0, 1].
    """
    checks.tensor("log_ratio_margin", log_ratio_margin, checks.SCORE_DTYPES)
    checks.positive("beta", beta)
    checks.not_negative("w", w)
    if not (isinstance(keep, (int, float)) and math.isfinite(keep) and 0 < keep <= 1):
        raise ValueError(f"keep must be in (0, 1], got {keep!r}")
    with torch.no_grad():
        return reference.implicit_beta(log_ratio_margin, beta=beta, w=w, keep=keep, generator=generator)
