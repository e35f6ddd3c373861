"""Properties over random problems: 25 examples an op on every backend, or MMRLHF_HYPOTHESIS=500 for a long run.

    MMRLHF_HYPOTHESIS=500 pytest -n 2 --dist worksteal tests/ops/test_properties.py

The examples are the same in every run. Half of those of linear_logp and the fused loss have tiles of a few rows and
columns, so that there are several of each: on a CPU a tile is 1024 rows and 1536 columns. The triton backend, in its
interpreter, gets as many as the others, of smaller problems: how a kernel cuts them into tiles, and which of its two
ways to the exponentials it goes, is in the example.
"""

from __future__ import annotations

import contextlib
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
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
from mmrlhf.ops.token_statistics import token_statistics
from numerics import HeadProblem, assert_no_worse, plain_logp
from triton_interpreter import TILES, patched_once, tiles

every_backend = pytest.mark.usefixtures("head_backend")


@pytest.fixture
def interpreter(head_backend):
    with patched_once():
        yield


def in_triton(function):
    function = pytest.mark.usefixtures("interpreter")(function)
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, of infinities
    return quiet(pytest.mark.parametrize("head_backend", ["triton"], indirect=True)(function))


few = settings(
    max_examples=int(os.environ.get("MMRLHF_HYPOTHESIS", 25)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
tiled = st.sampled_from(sorted(TILES))


def floor(truth: torch.Tensor, dtype: torch.dtype = torch.float32) -> float:
    """Eight roundings of the largest value: a problem of one or two numbers says little of the baseline's error.

    And 1e-12, since a saturated softcap has a slope of 1e-30, of which float64 autograd (1 - tanh^2) makes 0 +- 1e-16.
    """
    if truth.numel() == 0:
        return 0.0
    rounding = max(8 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    return rounding * float(truth.detach().abs().max()) + max(1e-12, torch.finfo(dtype).smallest_normal)


def heads(n: int, h: int, v: int, dtypes=(torch.float32,)):
    """Arguments of `check_head`: rows, widths and vocabularies up to n, h and v."""
    return {
        "n": st.integers(0, n),
        "h": st.integers(1, h),
        "v": st.integers(1, v),
        "dtype": st.sampled_from(dtypes),
        "spread": st.sampled_from([0.0, 0.1, 2.0, 30.0, 1000.0]),
        "options": st.fixed_dictionaries(
            {"softcap": st.sampled_from([None, 3.0, 50.0]), "logit_scale": st.sampled_from([1.0, 0.3, 2.5])}
        ),
        "bias": st.booleans(),
        "ignored": st.sampled_from([0.0, 0.3, 1.0]),
        "budget": st.sampled_from([None, 0]),
        "seed": st.integers(0, 10**6),
    }


def check_head(n, h, v, dtype, spread, options, bias, ignored, budget, seed):
    """linear_logp, value and gradients; rows that are ignored are those of the others alone, with zeros for them."""
    problem = HeadProblem.random(n, h, v, dtype=dtype, bias=bias, seed=seed, spread=spread, **options)
    g = torch.Generator().manual_seed(seed)
    upstream, counts = torch.randn(n, generator=g), torch.rand(n, generator=g) >= ignored

    def run(function, targets, some, dtype=None, **more):
        leaves = problem.leaves(dtype)
        logp = function(
            leaves["hidden"][some], leaves["weight"], targets[some], bias=leaves.get("bias"), **options, **more
        )
        logp.backward(upstream[some].to(logp.dtype))
        return [logp, *(leaf.grad for leaf in leaves.values())]

    def without(function, dtype=None):
        """The rows that count, alone."""
        logp, *grads = run(function, problem.targets, counts, dtype)
        return [torch.zeros(n, dtype=logp.dtype).masked_scatter(counts, logp), *grads]

    ours = run(linear_logp, torch.where(counts, problem.targets, -100), slice(None), memory_budget=budget)
    assert (ours[0] <= 0).all()
    assert (ours[0][~counts] == 0).all()
    for got, base, truth in zip(ours, without(plain_logp), without(reference.linear_logp, torch.float64), strict=True):
        assert_no_worse(got, base, truth, floor=floor(truth, got.dtype))


@every_backend
@few
@given(cut=st.booleans(), **heads(40, 33, 3000, (torch.float32, torch.bfloat16, torch.float16)))
def test_linear_logp_is_a_log_probability(cut_tiles, cut, **given_):
    with cut_tiles(11, 256) if cut else contextlib.nullcontext():
        check_head(**given_)


@in_triton
@few
@given(tiled=tiled, **heads(20, 33, 150))
@example(
    # Products of 1000 that leave a logit of 50, where the cap's slope is: a float32 sum of them was 13 roundings off.
    **{"tiled": "whole", "n": 16, "h": 6, "v": 16, "dtype": torch.float32, "spread": 1000.0, "bias": False},
    **{"options": {"softcap": 50.0, "logit_scale": 1.0}, "ignored": 0.0, "budget": 0, "seed": 16},
)
def test_linear_logp_in_triton(tiled, **given_):
    with tiles(tiled):
        check_head(**given_)


def check_statistics(n, h, v, dtype, spread, options, bias, ignored, budget, seed):
    problem = HeadProblem.random(n, h, v, dtype=dtype, bias=bias, seed=seed, spread=spread, **options)
    given_ = {"bias": problem.bias, **options}
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given_.items()}
    out = token_statistics(problem.hidden, problem.weight, problem.targets, **given_)
    truth = reference.token_statistics(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    base = reference.token_statistics(problem.hidden, problem.weight, problem.targets, **given_)
    for name in ("entropy", "sum_p2", "mean_logit", "logp"):
        # A mean near 0 is as exact as the logits it is of, and an entropy near 0 as those it is the distance of.
        size = {"mean_logit": 8e-7 * spread, "entropy": 1e-6}.get(name, 0.0)
        assert_no_worse(getattr(out, name), getattr(base, name), getattr(truth, name), floor=floor(truth.logp) + size)
    assert ((out.entropy >= -1e-6) & (out.entropy <= math.log(v) + 1e-5)).all()
    assert ((out.sum_p2 >= (1 - 1e-5) / v) & (out.sum_p2 <= 1 + 1e-6)).all()


@every_backend
@few
@given(**heads(40, 33, 3000, (torch.float32, torch.bfloat16, torch.float16)))
def test_token_statistics_are_those_of_the_softmax(**given_):
    check_statistics(**given_)


@in_triton
@few
@given(tiled=tiled, **heads(20, 33, 150))
def test_token_statistics_in_triton(tiled, **given_):
    with tiles(tiled):
        check_statistics(**given_)


@every_backend
@few
@given(h=st.integers(1, 20), v=st.integers(1, 40), spread=st.floats(0, 20), seed=st.integers(0, 10**6))
def test_probabilities_sum_to_one(h, v, spread, seed):
    """Every token of the vocabulary as the target of the same row."""
    problem = HeadProblem.random(1, h, v, seed=seed, spread=spread)
    logp = linear_logp(problem.hidden.expand(v, h), problem.weight, torch.arange(v))
    assert abs(float(logp.double().exp().sum()) - 1) < 1e-4


def pair_lists(responses: int, most: int):
    """[P, 2] int64: up to `most` pairs of two different responses, any of them several times."""
    pair = st.tuples(st.integers(0, responses - 1), st.integers(1, responses - 1))
    lists = st.lists(pair.map(lambda p: (p[0], (p[0] + p[1]) % responses)), max_size=most)
    return lists.map(lambda pairs: torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2))


def check_fused(data, kind, trained, h, v, dtype, head, bias, seed):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=2, max_size=7))
    responses, n = len(lengths), sum(lengths)
    pairs = data.draw(pair_lists(responses, 6))
    budget = data.draw(st.sampled_from([None, 0, 4 * v * 8]))
    problem = HeadProblem.random(n, h, v, dtype=dtype, bias=bias, seed=seed, **head)
    g = torch.Generator().manual_seed(seed)
    options = {
        "token_weight": torch.randint(0, 3, (n,), generator=g).float(),
        "reduction": "mean" if LOSSES[kind].per_token else data.draw(st.sampled_from(["sum", "mean"])),
        "reference_scores": -5 * torch.rand(responses, generator=g) if LOSSES[kind].reference else None,
        "beta": data.draw(st.sampled_from([0.1, 0.2 * torch.rand(len(pairs), generator=g) + 0.05])),
        "pair_weight": data.draw(st.sampled_from([None, torch.rand(len(pairs), generator=g)])),
        "kind": kind,
        "label_smoothing": 0.01 if kind == "exo_pair" else 0.0,
        "sft_weight": data.draw(st.sampled_from([0.0, 0.25])),
    }

    def run(function, dtype=None, **more):
        leaves = {k: t.requires_grad_(trained or k == "hidden") for k, t in problem.leaves(dtype).items()}
        given_ = {k: t.to(dtype or t.dtype) if isinstance(t, torch.Tensor) else t for k, t in options.items()}
        args = (leaves["hidden"], leaves["weight"], problem.targets, cumulative(lengths), pairs)
        out = function(*args, bias=leaves.get("bias"), **head, **given_, **more)
        out.loss.backward()
        return [out.loss, out.logp, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)]

    def plain(hidden, weight, targets, cu_seqlens, pairs, *, bias, softcap, logit_scale, **given_):
        logp = plain_logp(hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=logit_scale)
        return reference.Objective(cu_seqlens, pairs, **given_)(logp)

    loss, *ours = run(fused_preference_loss, memory_budget=budget)
    (base_loss, *bases), (true_loss, *truths) = run(plain), run(reference.fused_preference_loss, torch.float64)
    for got, base, truth in zip(ours, bases, truths, strict=True):
        assert_no_worse(got, base, truth, floor=floor(truth, got.dtype))
    # One number, often by luck exact in the baseline: its floor is what one rounding of each log-probability does.
    logp = truths[0].detach().requires_grad_()
    given_ = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in options.items()}
    reference.Objective(cumulative(lengths), pairs, **given_)(logp).loss.backward()
    conditioned = float((logp.grad * logp).detach().abs().sum() + true_loss.detach().abs())
    assert_no_worse(loss, base_loss, true_loss, floor=torch.finfo(torch.float32).eps * conditioned)


KINDS = {"data": st.data(), "kind": st.sampled_from(LOSS_KINDS), "seed": st.integers(0, 10**6)}


def fused_heads(h: int, v: int, dtypes=(torch.float32,)):
    """Arguments of `check_fused`."""
    of_head = heads(0, h, v, dtypes)
    shared = {name: of_head[name] for name in ("h", "v", "dtype", "bias")}
    return KINDS | shared | {"head": of_head["options"], "trained": st.booleans()}


@every_backend
@few
@given(cut=st.booleans(), **fused_heads(33, 300, (torch.float32, torch.bfloat16, torch.float16)))
def test_fused_is_the_reference(cut_tiles, cut, **given_):
    with cut_tiles(5, 64) if cut else contextlib.nullcontext():
        check_fused(**given_)


@in_triton
@few
@given(tiled=tiled, **fused_heads(33, 150))
def test_fused_in_triton(tiled, **given_):
    with tiles(tiled):
        check_fused(**given_)


@few
@given(**KINDS)
def test_preference_loss_is_the_reference_in_float64(data, kind, seed):
    """Every kind over any pair list, with betas and weights a pair: loss, losses and the gradient of every score."""
    responses = data.draw(st.integers(2, 7))
    pairs = data.draw(pair_lists(responses, 9))
    size = data.draw(st.sampled_from([0.1, 3.0, 300.0]))
    g = torch.Generator().manual_seed(seed)
    scores = -size * torch.rand(responses, generator=g) - 1e-3
    terms = {"kind": kind, "label_smoothing": {"exo_pair": 0.01, "robust": 0.2}.get(kind, 0.0)}
    tensors = {"beta": torch.rand(len(pairs), generator=g) + 0.05, "pair_weight": torch.rand(len(pairs), generator=g)}
    anchor = -size * torch.rand(responses, generator=g) if LOSSES[kind].reference else None

    def run(function, dtype):
        leaf = scores.detach().clone().to(dtype).requires_grad_()
        given_ = {name: value.to(dtype) for name, value in tensors.items()}
        out = function(leaf, None if anchor is None else anchor.to(dtype), pairs, **terms, **given_)
        out.loss.backward()
        return out.losses, leaf.grad

    results = run(preference_loss, torch.float32), run(reference.preference_loss, torch.float32)
    truth = run(reference.preference_loss, torch.float64)
    for got, base, exact in zip(*results, truth, strict=True):
        assert_no_worse(got, base, exact, floor=floor(exact))


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
