"""The one-launch preference kernel against `ops.reference` in float64: values, and the derivative for every token."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmrlhf.kernels.triton import launch, launch_preference, preference
from mmrlhf.kernels.triton.launch_preference import Buffers, Terms
from mmrlhf.ops import LOSS_KINDS, reference
from numerics import assert_no_worse

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="test_device.py is for a GPU")
SMOOTHED = {"sigmoid": 0.1, "robust": 0.1, "exo_pair": 1e-3, "simpo": 0.2}
WITHOUT_REFERENCE = ("simpo", "orpo")


def random(lengths, pairs, *, seed=0, weights=True, scale=2.0):
    """logp [N], cu_seqlens [R + 1], pairs [P, 2], token_weight [N] with zeros in it, reference_scores [R]."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    tokens, responses = int(ends[-1]), len(lengths)
    logp = -torch.rand(tokens, generator=g) * scale
    weight = torch.randint(0, 4, (tokens,), generator=g) / 2.0 if weights else None
    scores = torch.randn(responses, generator=g)
    return logp, ends, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2), weight, scores


def all_pairs(groups):
    """Every pair inside groups of K responses, K a group."""
    starts = [0, *itertools.accumulate(groups)]
    return [(s + i, s + j) for s, k in zip(starts, groups, strict=False) for i in range(k) for j in range(i + 1, k)]


def objective(dtype, cu_seqlens, pairs, token_weight, scores, terms):
    """`terms` as the reference takes them, and the log-probabilities' function."""

    def to(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    beta = to(terms.beta)
    if terms.margin is not None:
        beta = reference.dynamic_beta(to(terms.margin), beta=1.0, w=terms.w, k=terms.k) * beta
    names = ["reduction", "kind", "label_smoothing", "gamma_beta_ratio", "discopop_tau", "sft_weight"]
    settings = {name: getattr(terms, name) for name in names}
    return reference.Objective(
        cu_seqlens,
        pairs,
        token_weight=to(token_weight),
        reference_scores=to(scores),
        beta=beta,
        pair_weight=to(terms.pair_weight),
        num_pairs=to(terms.num_pairs),
        num_sft_tokens=to(terms.num_sft_tokens),
        **settings,
    )


def check(problem, terms):
    """The kernel, from poisoned buffers, is at most twice as far from float64 as the reference in float32."""
    logp, cu_seqlens, pairs, token_weight, scores = problem
    scores = None if terms.kind in WITHOUT_REFERENCE else scores
    out = Buffers.empty(cu_seqlens.numel() - 1, pairs.shape[0], logp.numel(), logp.device)
    for buffer in vars(out).values():
        buffer.fill_(float("nan"))
    launch_preference.preference(
        logp, cu_seqlens, pairs, token_weight=token_weight, reference_scores=scores, terms=terms, out=out
    )
    expected = []
    for dtype in (torch.float64, torch.float32):
        leaf = logp.to(dtype).requires_grad_()
        result = objective(dtype, cu_seqlens, pairs, token_weight, scores, terms)(leaf)
        coef = torch.autograd.grad(result.loss, leaf, allow_unused=True)[0]
        expected.append((result, torch.zeros_like(leaf) if coef is None else coef))
    (truth, coef), (baseline, base_coef) = expected
    for name in ("scores", "losses", "rewards", "margins", "beta", "loss", "accuracy", "sft_loss"):
        assert_no_worse(getattr(out, name), getattr(baseline, name), getattr(truth, name), name=name)
    assert_no_worse(out.coef, base_coef, coef, name="d loss / d logp")
    return out


GROUPS = (2, 4, 1, 3)
LENGTHS = (5, 1, 0, 130, 64, 7, 9, 33, 2, 8)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_every_kind(kind, reduction):
    """All pairs of ragged groups, weights with zeros, a beta and a weight a pair, an sft term."""
    g = torch.Generator().manual_seed(1)
    pairs = all_pairs(GROUPS)
    terms = Terms(
        reduction=reduction,
        beta=torch.rand(len(pairs), generator=g) + 0.05,
        kind=kind,
        label_smoothing=SMOOTHED.get(kind, 0.0),
        pair_weight=torch.rand(len(pairs), generator=g),
        sft_weight=0.25,
    )
    check(random(LENGTHS, pairs), terms)


@pytest.mark.parametrize(
    ("lengths", "pairs"),
    [
        ((), []),
        ((3,), []),
        ((0, 0), [(0, 1)]),
        ((1, 1), [(1, 0)]),
        ((4, 5, 6), [(0, 1), (0, 1), (2, 0)]),
        ((3,) * 150, all_pairs((2,) * 75)),
        ((2,) * 24, all_pairs((24,))),
        ((700, 300), [(0, 1)]),
    ],
    ids=["nothing", "no-pairs", "empty", "one-token", "repeated", "R150", "K24", "long"],
)
def test_any_number_of_responses_and_pairs(lengths, pairs):
    check(random(lengths, pairs), Terms(beta=0.1, sft_weight=0.1))


@pytest.mark.parametrize(
    "terms",
    [
        Terms(beta=torch.tensor(0.3)),
        Terms(beta=0.2, num_pairs=17.0, num_sft_tokens=900.0, sft_weight=0.5),
        Terms(num_pairs=torch.tensor(17.0), num_sft_tokens=torch.tensor(900), sft_weight=0.5),
        Terms(beta=0.1, margin=torch.tensor([0.0, 1.5, float("nan"), -2.0, 80.0, 0.25, 1e-6, 3.0, 0.5, 4.0])),
        Terms(beta=0.4, margin=torch.arange(10.0), w=2.0, k=0.1),
    ],
    ids=["beta-0d", "totals", "totals-tensors", "margins", "margins-w-k"],
)
def test_beta_and_totals(terms):
    check(random(LENGTHS, all_pairs(GROUPS)), terms)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_extreme_margins_are_finite(kind):
    """Scores of thousands of nats, and pairs whose responses are the same."""
    problem = random((40, 40, 3, 3), [(0, 1), (1, 0), (2, 3)], weights=False, scale=100.0)
    problem[0][40:80] = -0.01
    problem[0][83:86] = problem[0][80:83]
    out = check(problem, Terms(beta=0.5, kind=kind, label_smoothing=SMOOTHED.get(kind, 0.0)))
    assert float(out.margins.abs().max()) > 500
    assert out.coef.isfinite().all()


def test_equal_pair_is_log_two():
    logp, ends, pairs, _, scores = random((4, 4), [(0, 1)], weights=False)
    logp[4:] = logp[:4]
    out = check((logp, ends, pairs, None, torch.zeros_like(scores)), Terms())
    assert float(out.loss) == pytest.approx(0.6931472, rel=1e-6)
    assert torch.equal(out.coef[:4], -out.coef[4:])


def test_weight_zero_hides_a_nonfinite_token():
    """-inf at a token of weight 0 changes nothing; NaN at a token that counts reaches its pairs alone."""
    logp, ends, pairs, _, scores = random((4, 4, 4, 4), [(0, 1), (2, 3)], weights=False)
    weight = torch.ones_like(logp)
    weight[2] = 0
    terms = Terms(reduction="mean")
    expected = check((logp, ends, pairs, weight, scores), terms)
    hidden = logp.clone()
    hidden[2] = float("-inf")
    out = Buffers.empty(4, 2, 16, logp.device)
    extra = {"token_weight": weight, "reference_scores": scores, "terms": terms, "out": out}
    launch_preference.preference(hidden, ends, pairs, **extra)
    assert torch.equal(out.coef, expected.coef)
    hidden[5] = float("nan")
    launch_preference.preference(hidden, ends, pairs, **extra)
    assert out.losses[0].isnan()
    assert out.coef[5].isnan()
    assert torch.equal(out.coef[8:], expected.coef[8:])


def test_repeats_bitwise_and_ignores_pair_strides():
    logp, ends, pairs, weight, scores = random(LENGTHS, all_pairs(GROUPS))
    first = check((logp, ends, pairs, weight, scores), Terms(kind="bco_pair"))
    wide = torch.full((pairs.shape[0], 5), 10**6)
    wide[:, 1:3] = pairs
    second = check((logp, ends.int(), wide[:, 1:3], weight, scores), Terms(kind="bco_pair"))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_kinds_are_those_of_the_table():
    assert set(preference.KINDS) == set(LOSS_KINDS)
    logp, ends, pairs, weight, scores = random((2, 2), [(0, 1)])
    out = Buffers.empty(2, 1, 4, logp.device)
    with pytest.raises(ValueError, match=r"kind must be one of sigmoid, .*, got 'dpo'"):
        launch_preference.preference(
            logp, ends, pairs, token_weight=weight, reference_scores=scores, terms=Terms(kind="dpo"), out=out
        )
