"""Scores of responses to a preference loss over pairs: DPO and twelve relatives, one row each in `loss_kinds`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mmrlhf.ops import checks, reference
from mmrlhf.ops.loss_kinds import LOSS_KINDS, LOSSES
from mmrlhf.ops.reference import PreferenceOutput


def preference_loss(
    scores: Tensor,  # [R]
    reference_scores: Tensor | None,  # [R]
    pairs: Tensor,  # [P, 2]
    *,
    beta: float | Tensor = 0.1,  # or [P], or []
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    pair_weight: Tensor | None = None,  # [P]
    gamma_beta_ratio: float = 0.5,
    discopop_tau: float = 0.05,
    num_pairs: float | Tensor | None = None,
) -> PreferenceOutput:
    """Loss over P pairs (better, worse) of R responses: sum of losses * pair_weight / num_pairs (default P).

    `scores` and `reference_scores` are what `sequence_score` gives for the policy and the reference model, in nats,
    float32 or float64. `kind` is a row of `loss_kinds.LOSSES`, with its source. ipo, simpo and orpo are defined on
    mean log-probabilities. simpo (margin `gamma_beta_ratio` = gamma / beta) and orpo are reference-free and take
    `reference_scores=None`; the others need a reference (zeros make a loss reference-free). bco_pair is coupled
    through delta, the mean reward over the pairs of this call. `label_smoothing` is the share of flipped labels, for
    sigmoid, robust, simpo, and exo_pair, which needs it above 0 (1e-3 is usual). Gradients reach `scores` alone.

    Raises TypeError for a dtype, ValueError for a shape, a kind, a value out of range, or an option that `kind` lacks.
    """
    checks.tensor("scores", scores, checks.SCORE_DTYPES)
    if scores.dim() != 1:
        raise ValueError(f"scores must have shape [R], got {list(scores.shape)}")
    checks.pairs(pairs, scores.numel())
    check_kind(kind, label_smoothing, gamma_beta_ratio, discopop_tau)
    if callable(beta):
        raise TypeError("beta must be a number or a tensor here; a callable is for fused_preference_loss")
    check_pair_terms(scores, reference_scores, pairs, beta, kind, pair_weight, num_pairs)
    constant = {"reference_scores": reference_scores, "pair_weight": pair_weight, "beta": beta}
    refuse_grad("preference_loss", constant)
    return reference.preference_loss(
        scores,
        None if reference_scores is None else reference_scores.to(scores.dtype),
        pairs,
        beta=beta,
        kind=kind,
        label_smoothing=label_smoothing,
        pair_weight=None if pair_weight is None else pair_weight.to(scores.dtype),
        gamma_beta_ratio=gamma_beta_ratio,
        discopop_tau=discopop_tau,
        num_pairs=num_pairs,
    )


def check_kind(kind: str, label_smoothing: float, gamma_beta_ratio: float, discopop_tau: float) -> None:
    """The options against what the kind knows."""
    checks.one_of("kind", kind, LOSS_KINDS)
    checks.not_negative("label_smoothing", label_smoothing)
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
    if label_smoothing > 0 and not LOSSES[kind].smoothing:
        known = ", ".join(name for name in LOSS_KINDS if LOSSES[name].smoothing)
        raise ValueError(
            f"label_smoothing has no meaning for kind {kind!r}, got {label_smoothing!r}; it has for {known}"
        )
    if kind == "exo_pair" and label_smoothing == 0:
        raise ValueError(
            "label_smoothing must be in (0, 0.5) for kind 'exo_pair', whose target is (1 - eps, eps); 1e-3 is usual; "
            f"got {label_smoothing!r}"
        )
    checks.not_negative("gamma_beta_ratio", gamma_beta_ratio)
    checks.positive("discopop_tau", discopop_tau)


def check_pair_terms(
    scores: Tensor,  # [R], or anything on its device
    reference_scores: Tensor | None,
    pairs: Tensor,
    beta: object,
    kind: str,
    pair_weight: Tensor | None,
    num_pairs: float | Tensor | None,
    responses: int | None = None,
) -> None:
    """Shapes, devices and values of what comes a response or a pair. `responses` defaults to the scores' number."""
    responses = scores.numel() if responses is None else responses
    if LOSSES[kind].reference:
        if reference_scores is None:
            raise ValueError(
                f"reference_scores is None, but kind {kind!r} compares with a reference model; "
                "pass zeros for a reference-free loss"
            )
        checks.tensor("reference_scores", reference_scores, checks.SCORE_DTYPES)
        checks.shape("reference_scores", reference_scores, (responses,), "one score a response")
    elif reference_scores is not None:
        raise ValueError(f"reference_scores must be None for kind {kind!r}, which is reference-free")
    if isinstance(beta, Tensor):
        checks.tensor("beta", beta, (*checks.HEAD_DTYPES, torch.float64))
        if beta.dim() != 0:
            checks.shape("beta", beta, (pairs.shape[0],), "one beta a pair, or a scalar")
        checks.values("beta", beta, ~(beta.isfinite() & (beta > 0)), "finite and positive")
    elif not callable(beta):
        checks.positive("beta", beta)
    checks.finite_weights("pair_weight", pair_weight, pairs.shape[0], "one weight a pair", scores)
    check_count("num_pairs", num_pairs)
    beta_tensor = beta if isinstance(beta, Tensor) and beta.dim() else None
    checks.same_device("the scores", scores, reference_scores=reference_scores, pairs=pairs, beta=beta_tensor)


def check_count(name: str, value: float | Tensor | None) -> None:
    """A total that a sum is divided by: None, a positive number, or a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one number, got shape {list(value.shape)}")
        checks.values(name, value, ~(value > 0), "positive")
    elif value is not None:
        checks.positive(name, value)


def refuse_grad(op: str, constants: Mapping[str, object]) -> None:
    """Say so where a gradient is expected of an argument that gets none."""
    for name, value in constants.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} requires a gradient, but {op} gives it none: detach it")
