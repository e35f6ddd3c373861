"""`_C.preference_`, the `objective` of the cpu backend: every loss kind against `ops.reference` in float64.

The formulas are those of the CUDA kernel (kernels/cuda/preference_formulas.cuh), so this is where their arithmetic is
held; the device tests hold the kernel's walk over them.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import pytest
import torch

from mmrlhf.ops import LOSS_KINDS, reference, streaming
from mmrlhf.ops.loss_kinds import LOSSES
from numerics import assert_no_worse

_C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
from mmrlhf.ops import _cpu  # noqa: E402  (imports the extension)

ROOT = Path(__file__).resolve().parents[2]
SMOOTHED = {"sigmoid": 0.1, "robust": 0.1, "exo_pair": 1e-3, "simpo": 0.2}
GROUPS = (2, 4, 1, 3)
LENGTHS = (5, 1, 0, 130, 64, 7, 9, 33, 2, 8)


def all_pairs(groups):
    """Every pair inside groups of K responses, K a group."""
    starts = [0, *itertools.accumulate(groups)]
    return [(s + i, s + j) for s, k in zip(starts, groups, strict=False) for i in range(k) for j in range(i + 1, k)]


def problem(lengths=LENGTHS, pairs=None, *, kind="sigmoid", scale=2.0, weights=True, dtype=torch.int64, **settings):
    """An objective, and logp [N] in -scale .. 0. Token weights have zeros among them."""
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)
    logp = -torch.rand(int(ends[-1]), generator=g) * scale
    pairs = all_pairs(GROUPS) if pairs is None else pairs
    o = reference.Objective(
        ends,
        torch.tensor(pairs, dtype=dtype).reshape(-1, 2),
        token_weight=torch.randint(0, 4, logp.shape, generator=g) / 2.0 if weights else None,
        reference_scores=torch.randn(len(lengths), generator=g) if LOSSES[kind].reference else None,
        kind=kind,
        label_smoothing=SMOOTHED.get(kind, 0.0),
        **settings,
    )
    return o, logp


def expected(o, logp, dtype):
    """The result of the reference in a dtype, and d loss / d logp."""
    to = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)}
    to = {k: v.to(dtype) for k, v in to.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    leaf = logp.to(dtype).requires_grad_()
    result = dataclasses.replace(o, **to)(leaf)
    coef = torch.autograd.grad(result.loss, leaf, allow_unused=True)[0]
    return result, torch.zeros_like(leaf) if coef is None else coef


def check(o, logp):
    """The compiled objective is at most twice as far from float64 as the reference in float32, in every output."""
    before = logp.clone()
    result, coef = _cpu.objective(o, logp)
    truth, true_coef = expected(o, logp, torch.float64)
    baseline, base_coef = expected(o, logp, torch.float32)
    for f in dataclasses.fields(result):
        got = getattr(result, f.name)
        assert got.dtype == torch.float32
        assert not got.requires_grad
        assert_no_worse(got, getattr(baseline, f.name), getattr(truth, f.name), name=f.name)
    assert_no_worse(coef, base_coef, true_coef, name="d loss / d logp")
    assert torch.equal(logp, before)
    return result, coef


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_every_kind(kind, reduction):
    """All pairs of ragged groups with an empty response, a beta and a weight a pair, an sft term."""
    g = torch.Generator().manual_seed(1)
    count = len(all_pairs(GROUPS))
    beta, weight = torch.rand(count, generator=g) + 0.05, torch.rand(count, generator=g)
    check(*problem(kind=kind, reduction=reduction, beta=beta, pair_weight=weight, sft_weight=0.25))


@pytest.mark.parametrize("kind", LOSS_KINDS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0, 1e4], ids=lambda s: f"margin{s:g}")
def test_margins_of_any_size(kind, size):
    """Scores apart by next to nothing and by 10,000 nats, either way, and not at all: values and slopes are finite."""
    lengths, pairs = (1, 1, 1, 1), [(0, 1), (1, 0), (2, 3)]
    o, logp = problem(lengths, pairs, kind=kind, weights=False, beta=1.0)
    logp[:] = torch.tensor([-size / 2, -size * 1.5, -size, -size])
    if o.reference_scores is not None:
        o = dataclasses.replace(o, reference_scores=torch.full((4,), -size))
    result, coef = check(o, logp)
    assert float(result.margins[0]) == pytest.approx(size, rel=1e-6)
    assert coef.isfinite().all()
    assert result.loss.isfinite()


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
        ((701, 302), [(0, 1)]),
    ],
    ids=["nothing", "no-pairs", "empty", "one-token", "repeated", "R150", "K24", "long"],
)
@pytest.mark.parametrize("per_pair", [False, True], ids=["beta", "beta-a-pair"])
def test_any_number_of_responses_and_pairs(lengths, pairs, per_pair):
    beta = torch.linspace(0.1, 0.4, len(pairs)) if per_pair else 0.1
    check(*problem(lengths, pairs, beta=beta, sft_weight=0.1))


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": torch.tensor(0.3)},
        {"beta": torch.tensor(0.3, dtype=torch.float64)},
        {"beta": torch.linspace(0.1, 1, 10)[:, None].expand(10, 3)[:, 1]},
        {"beta": lambda scores, ref: (scores - ref).abs().mean() / 10},
        {"beta": lambda scores, ref: 0.2},
        {"beta": 0.2, "num_pairs": 17.0, "num_sft_tokens": 900.0, "sft_weight": 0.5},
        {"num_pairs": torch.tensor(17), "num_sft_tokens": torch.tensor(900.5), "sft_weight": 0.5},
    ],
    ids=["0d", "0d-double", "strided", "callable", "callable-number", "totals", "totals-tensors"],
)
def test_beta_and_totals(settings):
    check(*problem(**settings))


def test_dynamic_beta_inside():
    """margin= of the op itself is `reference.dynamic_beta`; NaN and negative margins give beta."""
    margin = torch.tensor([0.0, 1.5, float("nan"), -2.0, 80.0, 0.25, 1e-6, 3.0, 0.5, 4.0])
    o, logp = problem(LENGTHS)
    o = dataclasses.replace(o, beta=reference.dynamic_beta(margin, beta=0.3, w=0.7, k=0.4))
    truth, _ = expected(dataclasses.replace(o, beta=o.beta.double()), logp, torch.float64)
    out = [torch.empty(n) for n in (10, 10, 10, 10, 10, logp.numel())] + [torch.empty(()) for _ in range(3)]
    settings = {"token_weight": o.token_weight, "reference_scores": o.reference_scores, "num_pairs": 10.0}
    _C.preference_(logp, o.cu_seqlens, o.pairs, *out, beta=0.3, margin=margin, w=0.7, k=0.4, **settings)
    assert_no_worse(out[4], o.beta, reference.dynamic_beta(margin.double(), beta=0.3, w=0.7, k=0.4), name="beta")
    assert_no_worse(out[1], truth.rewards.float(), truth.rewards, name="rewards")


def test_ties_are_log_two_and_wrong():
    o, logp = problem((4, 4), [(0, 1)], weights=False)
    logp[4:] = logp[:4]
    result, coef = check(dataclasses.replace(o, reference_scores=torch.zeros(2)), logp)
    assert float(result.loss) == pytest.approx(0.6931472, rel=1e-6)
    assert float(result.accuracy) == 0
    assert torch.equal(coef[:4], -coef[4:])


def test_weight_zero_hides_a_nonfinite_token():
    """-inf at a token of weight 0 changes nothing; NaN at a token that counts reaches its pairs alone."""
    o, logp = problem((4, 4, 4, 4), [(0, 1), (2, 3)], weights=False, reduction="mean")
    weight = torch.ones_like(logp)
    weight[2] = 0
    o = dataclasses.replace(o, token_weight=weight)
    _, coef = check(o, logp)
    hidden = logp.clone()
    hidden[2] = float("-inf")
    assert torch.equal(_cpu.objective(o, hidden)[1], coef)
    hidden[5] = float("nan")
    result, lost = _cpu.objective(o, hidden)
    assert result.losses[0].isnan()
    assert lost[5].isnan()
    assert torch.equal(lost[8:], coef[8:])


def test_all_weights_zero_is_score_zero_with_no_gradient():
    o, logp = problem((4, 4), [(0, 1)], reduction="mean")
    o = dataclasses.replace(o, token_weight=torch.tensor([1.0] * 4 + [0.0] * 4))
    result, coef = check(o, logp)
    assert float(result.scores[1]) == 0
    assert (coef[4:] == 0).all()


def test_repeats_bitwise_and_takes_any_strides_and_indices():
    o, logp = problem(kind="bco_pair")
    wide = torch.full((o.pairs.shape[0], 5), 10**6)
    wide[:, 1:3] = o.pairs
    twice = torch.stack([o.token_weight, o.token_weight + 1], 1)
    again = dataclasses.replace(o, cu_seqlens=o.cu_seqlens.int(), pairs=wide[:, 1:3], token_weight=twice[:, 0])
    first, second = _cpu.objective(o, logp), _cpu.objective(again, torch.stack([logp, logp], 1)[:, 0])
    assert torch.equal(first[1], second[1])
    for f in dataclasses.fields(first[0]):
        assert torch.equal(getattr(first[0], f.name), getattr(second[0], f.name)), f.name


def test_agrees_with_the_torch_backend_on_a_result_of_autograd():
    """logp may carry a gradient: it is taken as a value, and so is the result."""
    o, logp = problem(sft_weight=0.5)
    leaf = logp.clone().requires_grad_()
    ours, theirs = _cpu.objective(o, leaf * 1), streaming.objective(o, logp)
    assert torch.allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-7)
    assert not ours[0].logp.requires_grad


def test_kinds_are_the_rows_of_the_table():
    header = (ROOT / "kernels/cuda/preference_formulas.cuh").read_text()
    names = re.search(r"kLossKinds\[\] = {([^}]*)}", header).group(1)
    enum = re.search(r"enum class LossKind : int32_t {([^}]*)}", header).group(1)
    assert tuple(re.findall(r'"(\w+)"', names)) == tuple(re.findall(r"\w+", enum)) == LOSS_KINDS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "dpo"}, ValueError, r"kind must be one of sigmoid, .*orpo, got 'dpo'"),
        ({"logp": torch.zeros(5, dtype=torch.float64)}, TypeError, "logp must be float32, got float64"),
        ({"pairs": torch.tensor([[0, 2]])}, ValueError, r"pairs must be responses in \[0, 2\); entry 1 is 2"),
        ({"pairs": torch.tensor([[-1, 0]])}, ValueError, r"entry 0 is -1"),
        ({"pairs": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"pairs must have shape \[1, 2\], got \[1, 3\]"),
        ({"pairs": torch.zeros(1, 2)}, TypeError, "pairs must be int64, got float32"),
        ({"cu_seqlens": torch.tensor([0, 3, 4])}, ValueError, "cu_seqlens must run from 0 to 5, got 0 to 4"),
        ({"cu_seqlens": torch.tensor([0, 7, 5])}, ValueError, "cu_seqlens must be in ascending order; entry 2 is 5"),
        ({"token_weight": torch.zeros(4)}, ValueError, r"token_weight must have shape \[5\], got \[4\]"),
        ({"token_weight": torch.zeros(10)[::2]}, ValueError, "token_weight must be contiguous, got stride 2"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = {
        "logp": torch.zeros(5),
        "cu_seqlens": torch.tensor([0, 3, 5]),
        "pairs": torch.tensor([[0, 1]]),
        **{name: torch.zeros(2) for name in ("scores", "rewards")},
        **{name: torch.zeros(1) for name in ("losses", "margins", "betas")},
        "coef": torch.zeros(5),
        **{name: torch.zeros(()) for name in ("loss", "accuracy", "sft_loss")},
    }
    with pytest.raises(error, match=message):
        _C.preference_(**(arguments | change))
