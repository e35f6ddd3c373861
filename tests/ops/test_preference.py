"""Loss kinds: against formulas written out again here, against TRL's own source where it is installed, and by name."""

from __future__ import annotations

import ast
import importlib.util
import math
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmrlhf import config
from mmrlhf.ops import LOSS_KINDS, preference_loss, reference
from mmrlhf.ops.loss_kinds import LOSSES
from numerics import assert_no_worse

REFERENCE_FREE = ("simpo", "orpo")


def problem(p=9, seed=0, spread=8.0):
    """Scores and reference scores [2P] in float64, pairs (i, i + P)."""
    g = torch.Generator().manual_seed(seed)
    scores = -30 + spread * torch.randn(2 * p, generator=g, dtype=torch.float64)
    reference_scores = -30 + spread * torch.randn(2 * p, generator=g, dtype=torch.float64)
    return scores, reference_scores, torch.stack([torch.arange(p), torch.arange(p) + p], 1)


def settings(kind):
    return {"kind": kind, "label_smoothing": 0.01 if kind == "exo_pair" else 0.0}


def references(kind, reference_scores):
    return None if kind in REFERENCE_FREE else reference_scores


def test_the_table_is_the_configs():
    assert LOSS_KINDS == config.LOSS_KINDS
    assert all(row.source for row in LOSSES.values())


# The papers' formulas with plain exponentials and logarithms, which are exact enough in float64 at moderate margins.
def sigma(x):
    return 1 / (1 + torch.exp(-x))


WRITTEN_OUT = {
    "sigmoid": lambda b, w, beta: -torch.log(sigma(beta * (b - w))),
    "hinge": lambda b, w, beta: torch.clamp(1 - beta * (b - w), min=0),
    "ipo": lambda b, w, beta: ((b - w) - 1 / (2 * beta)) ** 2,
    "robust": lambda b, w, beta: -torch.log(sigma(beta * (b - w))),
    "exo_pair": lambda b, w, beta: (
        sigma(beta * (b - w)) * torch.log(sigma(beta * (b - w)) / 0.99)
        + sigma(beta * (w - b)) * torch.log(sigma(beta * (w - b)) / 0.01)
    ),
    "nca_pair": lambda b, w, beta: (
        -torch.log(sigma(beta * b)) - 0.5 * torch.log(sigma(-beta * b)) - 0.5 * torch.log(sigma(-beta * w))
    ),
    "bco_pair": lambda b, w, beta: (
        -torch.log(sigma(beta * b - beta * (b + w).mean() / 2))
        - torch.log(sigma(-(beta * w - beta * (b + w).mean() / 2)))
    ),
    "sppo_hard": lambda b, w, beta: (b - 1 / (2 * beta)) ** 2 + (w + 1 / (2 * beta)) ** 2,
    "apo_zero": lambda b, w, beta: 1 - sigma(beta * b) + sigma(beta * w),
    "apo_down": lambda b, w, beta: sigma(beta * b) + 1 - sigma(beta * (b - w)),
    "discopop": lambda b, w, beta: (
        (1 - sigma(beta * (b - w) / 0.05)) * -torch.log(sigma(beta * (b - w)))
        + sigma(beta * (b - w) / 0.05) * torch.exp(-beta * (b - w))
    ),
    "simpo": lambda b, w, beta: -torch.log(sigma(beta * (b - w) - beta * 0.5)),
    "orpo": lambda b, w, beta: (
        -beta * torch.log(sigma(torch.log(b.exp() / (1 - b.exp())) - torch.log(w.exp() / (1 - w.exp()))))
    ),
}


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_kinds_against_their_formulas(kind):
    scores, reference_scores, pairs = problem()
    ref = references(kind, reference_scores)
    if kind == "orpo":
        scores = scores / 20  # mean log-probabilities
    ratio = scores if ref is None else scores - ref
    out = preference_loss(scores, ref, pairs, beta=0.1, **settings(kind))
    expected = WRITTEN_OUT[kind](ratio[:9], ratio[9:], 0.1)
    assert torch.allclose(out.losses, expected, rtol=1e-10, atol=1e-13)
    assert torch.allclose(out.loss, expected.mean(), rtol=1e-12)
    assert torch.allclose(out.margins, 0.1 * (ratio[:9] - ratio[9:]))
    assert torch.allclose(out.rewards, 0.1 * ratio)
    assert out.accuracy == (ratio[:9] > ratio[9:]).double().mean()


def test_label_smoothing_formulas():
    scores, reference_scores, pairs = problem()
    x = 0.1 * ((scores - reference_scores)[:9] - (scores - reference_scores)[9:])
    clean, flipped = -F.logsigmoid(x), -F.logsigmoid(-x)
    got = preference_loss(scores, reference_scores, pairs, label_smoothing=0.2)
    assert torch.allclose(got.losses, 0.8 * clean + 0.2 * flipped)
    got = preference_loss(scores, reference_scores, pairs, kind="robust", label_smoothing=0.2)
    assert torch.allclose(got.losses, (0.8 * clean - 0.2 * flipped) / 0.6)
    x = 2.0 * (scores[:9] - scores[9:] - 0.3)
    got = preference_loss(scores, None, pairs, kind="simpo", beta=2.0, gamma_beta_ratio=0.3, label_smoothing=0.1)
    assert torch.allclose(got.losses, -0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x))


def trl_losses(kind, scores, reference_scores, beta, label_smoothing):
    """A loss by TRL's own lines: the branches of its DPO trainer's loop over loss types, run as they stand."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("trl is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "dpo_trainer.py"
    loops = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.For)
        and any(isinstance(s, ast.If) and "loss_type ==" in ast.unparse(s) for s in node.body)
    ]
    if not loops:
        pytest.skip("this TRL's dpo_trainer has no loop over loss types")
    branches = next(s for s in loops[0].body if isinstance(s, ast.If) and "loss_type ==" in ast.unparse(s))
    half = scores.numel() // 2
    b, w = (scores - reference_scores)[:half], (scores - reference_scores)[half:]
    names = {
        "loss_type": kind,
        "self": types.SimpleNamespace(
            beta=beta, label_smoothing=label_smoothing, args=types.SimpleNamespace(discopop_tau=0.05)
        ),
        "F": F,
        "torch": torch,
        "device": "cpu",
        "delta_score": b - w,
        "chosen_scores": b,
        "rejected_scores": w,
        "chosen_logratios": b,
        "rejected_logratios": w,
        "completion_mask": torch.ones(2 * half, 1),  # one token each: TRL's ipo divides by their number
    }
    exec(compile(ast.Module([branches], []), str(path), "exec"), names)
    return names["per_sequence_loss"]


@pytest.mark.hosts
@pytest.mark.parametrize("kind", [k for k in LOSS_KINDS if k not in REFERENCE_FREE])
def test_kinds_against_trl(kind):
    scores, reference_scores, pairs = problem()
    if kind == "bco_pair":
        # TRL 1.16 has no delta: make ours 0.
        scores[9:] = reference_scores[9:] - (scores - reference_scores)[:9]
    theirs = trl_losses(kind, scores, reference_scores, 0.1, 0.01 if kind in ("exo_pair", "robust") else 0.0)
    smoothing = 0.01 if kind in ("exo_pair", "robust") else 0.0
    ours = preference_loss(scores, reference_scores, pairs, beta=0.1, kind=kind, label_smoothing=smoothing)
    # exo_pair: TRL rounds its epsilon to float32.
    assert torch.allclose(ours.losses, theirs.double(), rtol=1e-7 if kind == "exo_pair" else 1e-12, atol=1e-12)


def test_ddpo_oracle():
    """RLHF-V's DDPO by hand: gamma = 5 on corrected tokens, normalised with beta .5, and the plain sum with beta .1."""
    from mmrlhf.ops import sequence_score

    policy = torch.tensor([-0.5, -1, -2, -0.5, -0.5, -1.5, -0.5], dtype=torch.float64)
    ref = torch.tensor([-0.6, -1.2, -2.5, -0.6 + 0.1, -0.6, -1.0, -0.5], dtype=torch.float64)
    weight = torch.tensor([1.0, 5, 5, 1, 1, 5, 1], dtype=torch.float64)
    cu, pairs = torch.tensor([0, 4, 7]), torch.tensor([[0, 1]])

    def run(reduction, beta):
        scores = [sequence_score(t, cu, token_weight=weight, reduction=reduction) for t in (policy, ref)]
        return scores, preference_loss(*scores, pairs, beta=beta)

    scores, out = run("mean", 0.5)
    expected = [[-16 / 12, -8.5 / 7], [-19.6 / 12, -6.1 / 7]]
    assert torch.allclose(torch.stack(scores), torch.tensor(expected, dtype=torch.float64), rtol=1e-14)
    assert torch.allclose(out.rewards, torch.tensor([0.15, -1.2 / 7], dtype=torch.float64), rtol=1e-13)
    assert abs(float(out.loss) - 0.5452922204884842) < 1e-12
    scores, out = run("sum", 0.1)
    assert torch.allclose(torch.stack(scores), torch.tensor([[-16, -8.5], [-19.6, -6.1]], dtype=torch.float64))
    assert torch.allclose(out.rewards, torch.tensor([0.36, -0.24], dtype=torch.float64), rtol=1e-13)
    assert abs(float(out.loss) - 0.4374879504858855) < 1e-12


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_float32_against_float64(kind):
    scores, reference_scores, pairs = problem(p=40)
    scores = scores / 20 if kind == "orpo" else scores
    ref = references(kind, reference_scores)
    weight, beta = torch.rand(40, dtype=torch.float64), 0.05 + torch.rand(40, dtype=torch.float64)

    def run(dtype, function):
        leaf = scores.float().to(dtype, copy=True).requires_grad_()
        given = None if ref is None else ref.float().to(dtype)
        out = function(leaf, given, pairs, beta=beta.to(dtype), pair_weight=weight.to(dtype), **settings(kind))
        out.loss.backward()
        return out.losses, leaf.grad

    truth = run(torch.float64, reference.preference_loss)
    baseline = run(torch.float32, reference.preference_loss)
    for ours, base, true in zip(run(torch.float32, preference_loss), baseline, truth, strict=True):
        assert ours.dtype == torch.float32
        assert_no_worse(ours, base, true)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_gradcheck(kind):
    scores, reference_scores, pairs = problem(p=4, spread=3.0)
    scores = scores / 20 if kind == "orpo" else scores
    beta = torch.tensor([0.1, 0.3, 0.2, 0.5], dtype=torch.float64)
    ref = references(kind, reference_scores)
    if kind == "bco_pair":
        # delta is a constant to the gradient: differentiate the written-out loss with delta frozen.
        ratio = scores - ref
        delta = float((beta * (ratio[:4] + ratio[4:]) / 2).mean())
        leaf = scores.clone().requires_grad_()
        preference_loss(leaf, ref, pairs, beta=beta, kind=kind).losses.sum().backward()
        twin = scores.clone().requires_grad_()
        b, w = beta * (twin - ref)[:4], beta * (twin - ref)[4:]
        (-F.logsigmoid(b - delta) - F.logsigmoid(delta - w)).sum().backward()
        assert torch.allclose(leaf.grad, twin.grad, rtol=1e-12)
        return
    assert torch.autograd.gradcheck(
        lambda s: preference_loss(s, ref, pairs, beta=beta, **settings(kind)).losses,
        scores.clone().requires_grad_(),
    )


def test_pair_weight_and_num_pairs():
    scores, ref, pairs = problem(p=5)
    weight = torch.tensor([0.0, 1, 2, 0.5, 3], dtype=torch.float64)
    out = preference_loss(scores, ref, pairs, pair_weight=weight)
    assert torch.allclose(out.loss, (out.losses * weight).sum() / 5)
    parts = [preference_loss(scores, ref, pairs[s], num_pairs=5).loss for s in (slice(0, 2), slice(2, 5))]
    assert torch.allclose(sum(parts), preference_loss(scores, ref, pairs).loss)
    tensor = preference_loss(scores, ref, pairs, num_pairs=torch.tensor(10.0)).loss
    assert torch.allclose(tensor, preference_loss(scores, ref, pairs).loss / 2)
    one = preference_loss(scores.float(), ref.float(), pairs, num_pairs=torch.tensor([10.0], dtype=torch.float64)).loss
    assert (one.shape, one.dtype) == ((), torch.float32)  # a total as all_reduce leaves it does not shape the loss
    assert one == preference_loss(scores.float(), ref.float(), pairs, num_pairs=10).loss


def test_rewards_with_a_beta_a_pair():
    """A response's reward uses the mean beta of its pairs; one in no pair, the mean of all."""
    scores, ref = torch.tensor([1.0, 2, 3, 4]), torch.zeros(4)
    out = preference_loss(scores, ref, torch.tensor([[0, 1], [0, 2]]), beta=torch.tensor([0.1, 0.3]))
    assert torch.allclose(out.rewards, torch.tensor([0.2 * 1, 0.1 * 2, 0.3 * 3, 0.2 * 4]))
    assert torch.allclose(out.margins, torch.tensor([-0.1, -0.6]))


def test_no_pairs():
    scores = torch.randn(3).requires_grad_()
    for kind in ("sigmoid", "bco_pair"):
        out = preference_loss(scores, torch.zeros(3), torch.empty(0, 2, dtype=torch.int64), kind=kind)
        out.loss.backward()
        assert out.loss == 0
        assert out.accuracy == 0
        assert out.losses.shape == (0,)
        assert (scores.grad == 0).all()


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_k09_extreme_log_ratios(kind):
    """Log-ratios of +-1e3 and scores of 0: finite losses and gradients in float32."""
    values = torch.tensor([0.0, -1e-9, -1.0, -1e3, 1e3, -2e3])
    if kind == "orpo":
        values = -values.abs()  # log-probabilities
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    scores = values.clone().requires_grad_()
    out = preference_loss(scores, references(kind, torch.zeros(6)), pairs, beta=1.0, **settings(kind))
    out.loss.backward()
    assert out.losses.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_k10_equal_pair(beta):
    scores = torch.full((2,), -7.0, dtype=torch.float64, requires_grad=True)
    out = preference_loss(scores, torch.full((2,), -3.0, dtype=torch.float64), torch.tensor([[0, 1]]), beta=beta)
    out.loss.backward()
    assert abs(float(out.loss.detach()) - math.log(2)) < 1e-15
    assert scores.grad[0] == -scores.grad[1] == -beta / 2
    assert out.accuracy == 0


BAD = [
    ({"beta": 0.0}, "beta must be finite and positive, got 0.0"),
    ({"beta": float("nan")}, "beta must be finite and positive, got nan"),
    ({"beta": float("inf")}, "beta must be finite and positive, got inf"),
    ({"beta": torch.tensor([0.1, -0.1])}, "beta must be finite and positive; entry 1 is -0.1"),
    ({"beta": torch.ones(3)}, r"beta must have shape \[2\]"),
    ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ({"label_smoothing": -0.1}, "label_smoothing must be finite and 0 or more, got -0.1"),
    ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning for kind 'ipo'.*sigmoid, robust"),
    ({"kind": "exo_pair"}, r"label_smoothing must be in \(0, 0.5\) for kind 'exo_pair'"),
    ({"kind": "dpo"}, "kind must be one of sigmoid, hinge, .*orpo, got 'dpo'"),
    ({"kind": "simpo"}, "reference_scores must be None for kind 'simpo', which is reference-free"),
    ({"reference_scores": None}, "reference_scores is None, but kind 'sigmoid' compares with a reference"),
    ({"reference_scores": torch.zeros(3)}, r"reference_scores must have shape \[4\].*got \[3\]"),
    ({"pair_weight": torch.tensor([1.0, -1.0])}, "pair_weight must be finite and 0 or more; entry 1 is -1.0"),
    ({"pair_weight": torch.tensor([1.0, float("nan")])}, "pair_weight must be finite"),
    ({"pairs": torch.tensor([[0, 4]])}, r"pairs must be responses in \[0, 4\); entry 1 is 4"),
    ({"pairs": torch.tensor([[-1, 0]])}, r"pairs must be responses in \[0, 4\); entry 0 is -1"),
    ({"pairs": torch.tensor([[1, 1]])}, "pairs must be two different responses a pair"),
    ({"pairs": torch.tensor([0, 1])}, r"pairs must have shape \[P, 2\]"),
    ({"scores": torch.zeros(2, 2)}, r"scores must have shape \[R\], got \[2, 2\]"),
    ({"num_pairs": 0}, "num_pairs must be finite and positive, got 0"),
    ({"num_pairs": torch.ones(2)}, "num_pairs must be a number or a tensor of one number"),
    ({"discopop_tau": 0.0}, "discopop_tau must be finite and positive"),
    ({"gamma_beta_ratio": -1.0}, "gamma_beta_ratio must be finite and 0 or more"),
    ({"reference_scores": torch.zeros(4, requires_grad=True)}, "reference_scores requires a gradient.*detach"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_k11_bad_values(change, message):
    given = {"scores": torch.zeros(4), "reference_scores": torch.zeros(4), "pairs": torch.tensor([[0, 1], [2, 3]])}
    with pytest.raises(ValueError, match=message):
        preference_loss(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(4, dtype=torch.float16)}, "scores must be float32 or float64, got float16"),
        (
            {"reference_scores": torch.zeros(4, dtype=torch.int64)},
            "reference_scores must be float32 or float64, got int64",
        ),
        ({"pairs": torch.zeros(1, 2)}, "pairs must be int32 or int64, got float32"),
        ({"beta": "0.1"}, "beta must be a number, got str"),
        ({"beta": lambda s, r: 0.1}, "beta must be a number or a tensor here"),
        ({"beta": torch.ones(2, dtype=torch.int64)}, "beta must be float32"),
    ],
)
def test_k01_wrong_dtype(change, message):
    given = {"scores": torch.zeros(4), "reference_scores": torch.zeros(4), "pairs": torch.tensor([[0, 1], [2, 3]])}
    with pytest.raises(TypeError, match=message):
        preference_loss(**(given | change))
