"""Properties over random problems: 25 examples each, or MMRLHF_HYPOTHESIS=500 for a long run."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmrlhf.batch import cumulative
from mmrlhf.ops import (
    LOSS_KINDS,
    dynamic_beta,
    fused_preference_loss,
    linear_logp,
    preference_loss,
    reference,
    sequence_score,
)
from mmrlhf.ops.loss_kinds import LOSSES
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = pytest.mark.usefixtures("head_backend")
few = settings(
    max_examples=int(os.environ.get("MMRLHF_HYPOTHESIS", "25")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def floor(truth: torch.Tensor) -> float:
    """Eight roundings of the largest value: a problem of one or two numbers says little of the baseline's error.

    And 1e-12, since a saturated softcap has a slope of 1e-30, of which float64 autograd (1 - tanh^2) makes 0 +- 1e-16.
    """
    return 8 * torch.finfo(torch.float32).eps * float(truth.detach().abs().max()) + 1e-12 if truth.numel() else 0.0


@few
@given(
    n=st.integers(0, 40),
    h=st.integers(1, 33),
    v=st.integers(1, 3000),
    spread=st.sampled_from([0.0, 0.1, 2.0, 30.0, 1000.0]),
    softcap=st.sampled_from([None, 3.0, 50.0]),
    bias=st.booleans(),
    budget=st.sampled_from([None, 0]),
    seed=st.integers(0, 10**6),
)
def test_linear_logp_is_a_log_probability(n, h, v, spread, softcap, bias, budget, seed):
    problem = HeadProblem.random(n, h, v, bias=bias, seed=seed, spread=spread, softcap=softcap)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(seed))

    def run(function, dtype=None, **more):
        leaves = problem.leaves(dtype)
        logp = function(
            leaves["hidden"], leaves["weight"], problem.targets, bias=leaves.get("bias"), softcap=softcap, **more
        )
        logp.backward(upstream.to(logp.dtype))
        return [logp, *(leaf.grad for leaf in leaves.values())]

    ours = run(linear_logp, memory_budget=budget)
    assert (ours[0] <= 0).all()
    for got, base, truth in zip(ours, run(plain_logp), run(reference.linear_logp, torch.float64), strict=True):
        assert_no_worse(got, base, truth, floor=floor(truth))


@few
@given(h=st.integers(1, 20), v=st.integers(1, 40), spread=st.floats(0, 20), seed=st.integers(0, 10**6))
def test_probabilities_sum_to_one(h, v, spread, seed):
    """Every token of the vocabulary as the target of the same row."""
    problem = HeadProblem.random(1, h, v, seed=seed, spread=spread)
    logp = linear_logp(problem.hidden.expand(v, h), problem.weight, torch.arange(v))
    assert abs(float(logp.double().exp().sum()) - 1) < 1e-4


@few
@given(data=st.data(), kind=st.sampled_from(LOSS_KINDS), trained=st.booleans(), seed=st.integers(0, 10**6))
def test_fused_is_the_reference(data, kind, trained, seed):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=7))
    responses, n = len(lengths), sum(lengths)
    index = st.integers(0, responses - 1)
    drawn = data.draw(st.lists(st.tuples(index, index).filter(lambda p: p[0] != p[1]), max_size=6))
    budget = data.draw(st.sampled_from([None, 0, 4 * 300 * 8]))
    problem = HeadProblem.random(n, 12, 300, seed=seed)
    pairs = torch.tensor(drawn, dtype=torch.int64).reshape(-1, 2)
    g = torch.Generator().manual_seed(seed)
    options = {
        "token_weight": torch.randint(0, 3, (n,), generator=g).float(),
        "reduction": "mean" if LOSSES[kind].per_token else data.draw(st.sampled_from(["sum", "mean"])),
        "reference_scores": -5 * torch.rand(responses, generator=g) if LOSSES[kind].reference else None,
        "kind": kind,
        "label_smoothing": 0.01 if kind == "exo_pair" else 0.0,
        "sft_weight": data.draw(st.sampled_from([0.0, 0.25])),
    }

    def run(function, dtype=None, **more):
        leaves = {k: v.requires_grad_(trained or k == "hidden") for k, v in problem.leaves(dtype).items()}
        given_ = {k: v.to(dtype or v.dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        args = (leaves["hidden"], leaves["weight"], problem.targets, cumulative(lengths), pairs)
        out = function(*args, **given_, **more)
        out.loss.backward()
        return [out.loss, out.logp, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)]

    def plain(hidden, weight, targets, cu_seqlens, pairs, **given_):
        return reference.Objective(cu_seqlens, pairs, **given_)(plain_logp(hidden, weight, targets))

    loss, *ours = run(fused_preference_loss, memory_budget=budget)
    (base_loss, *bases), (true_loss, *truths) = run(plain), run(reference.fused_preference_loss, torch.float64)
    for got, base, truth in zip(ours, bases, truths, strict=True):
        assert_no_worse(got, base, truth, floor=floor(truth))
    # One number, often by luck exact in the baseline: its floor is what one rounding of each log-probability does.
    logp = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets).requires_grad_()
    given_ = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    reference.Objective(cumulative(lengths), pairs, **given_)(logp).loss.backward()
    conditioned = float((logp.grad * logp).detach().abs().sum() + true_loss.detach().abs())
    assert_no_worse(loss, base_loss, true_loss, floor=torch.finfo(torch.float32).eps * conditioned)


@few
@given(
    margins=st.lists(st.floats(-1e6, 1e6), max_size=20),
    beta=st.floats(1e-3, 10),
    w=st.floats(0, 5),
    k=st.floats(1e-3, 10),
)
def test_dynamic_beta_stays_in_its_bounds(margins, beta, w, k):
    margin = torch.tensor(sorted(margins), dtype=torch.float64)
    out = dynamic_beta(margin, beta=beta, w=w, k=k)
    assert (out >= beta).all()
    assert (out <= beta * (1 + w) * (1 + 1e-15)).all()
    assert (out.diff() >= 0).all()


@few
@given(shift=st.floats(-50, 50), kind=st.sampled_from([k for k in LOSS_KINDS if LOSSES[k].reference]))
def test_a_shift_of_policy_and_reference_changes_nothing(shift, kind):
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(6, generator=g, dtype=torch.float64)
    ref = torch.randn(6, generator=g, dtype=torch.float64)
    pairs, smoothing = torch.tensor([[0, 1], [2, 5]]), 0.01 if kind == "exo_pair" else 0.0
    one = preference_loss(scores, ref, pairs, kind=kind, label_smoothing=smoothing)
    two = preference_loss(scores + shift, ref + shift, pairs, kind=kind, label_smoothing=smoothing)
    assert torch.allclose(one.losses, two.losses, rtol=1e-9, atol=1e-11)


@few
@given(lengths=st.lists(st.integers(0, 12), max_size=8), seed=st.integers(0, 10**6))
def test_mean_is_the_sum_over_the_weights(lengths, seed):
    g = torch.Generator().manual_seed(seed)
    n, cu = sum(lengths), cumulative(lengths)
    logp = torch.randn(n, generator=g, dtype=torch.float64)
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    total = sequence_score(logp, cu, token_weight=weight)
    norm = sequence_score(torch.ones(n, dtype=torch.float64), cu, token_weight=weight)
    mean = sequence_score(logp, cu, token_weight=weight, reduction="mean")
    assert torch.allclose(mean * norm, total, rtol=1e-12, atol=1e-12)
