"""fused_preference_loss against the composed reference in float64: value, every output, every gradient.

The responses: seven, one of them empty, one of one token; the pairs make three components (responses 0-1, 2-5 and the
lone 6), so that a small budget cuts the trained head into chunks with and without kept exponentials. With `small_tiles`
every chunk is several tiles of rows, and the vocabulary several blocks.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmrlhf.ops import (
    LOSS_KINDS,
    dynamic_beta,
    fused,
    fused_preference_loss,
    implicit_beta,
    linear_logp,
    preference_loss,
    reference,
    sequence_score,
)
from mmrlhf.ops.loss_kinds import LOSSES
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = pytest.mark.usefixtures("head_backend")

N, H, V = 47, 24, 1301
CU = torch.tensor([0, 9, 14, 21, 21, 33, 34, 47])
PAIRS = torch.tensor([[1, 0], [2, 4], [5, 2], [4, 5]])
MARGIN = torch.tensor([0.4, 2.0, -1.0, 6.0])
ROW = 4 * V
BUDGETS = {"kept": None, "chunks": 20 * ROW, "mixed": 15 * ROW, "recomputed": 0}


def scene(kind="sigmoid", *, dtype=torch.float32, bias=True, **options):
    problem = HeadProblem.random(N, H, V, dtype=dtype, bias=bias, seed=3, **options)
    g = torch.Generator().manual_seed(5)
    scores = sequence_score(plain_logp(problem.hidden.float(), problem.weight.float(), problem.targets), CU)
    settings = {
        "token_weight": 1 + 4 * (torch.rand(N, generator=g) > 0.7).float(),
        "reduction": "mean" if LOSSES[kind].per_token else "sum",
        "reference_scores": scores + torch.randn(7, generator=g) if LOSSES[kind].reference else None,
        "beta": dynamic_beta(MARGIN),
        "kind": kind,
        "label_smoothing": 0.01 if kind == "exo_pair" else 0.0,
        "pair_weight": torch.tensor([1.0, 0.5, 2.0, 0.0]),
        "sft_weight": 0.25,
    }
    return problem, settings


def in_dtype(settings, dtype):
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def run(function, problem, settings, *, dtype=None, train=("hidden", "weight", "bias"), scale=1.0, **more):
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves(dtype).items()}
    out = function(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        CU,
        PAIRS,
        bias=leaves.get("bias"),
        **problem.options,
        **(in_dtype(settings, dtype) if dtype else settings),
        **more,
    )
    if out.loss.requires_grad:
        (out.loss * scale).backward()
    return out, {k: v.grad for k, v in leaves.items()}


def plain(hidden, weight, targets, cu_seqlens, pairs, *, bias=None, logit_scale=1.0, softcap=None, **settings):
    """PyTorch's own path to the log-probabilities, then the reference objective in float32."""
    logp = plain_logp(hidden, weight, targets, bias=bias, logit_scale=logit_scale, softcap=softcap)
    return reference.Objective(cu_seqlens, pairs, **settings)(logp)


def check(problem, settings, *, train=("hidden", "weight", "bias"), scale=1.0, **more):
    truth, true_grads = run(
        reference.fused_preference_loss, problem, settings, dtype=torch.float64, train=train, scale=scale
    )
    base, base_grads = run(plain, problem, settings, train=train, scale=scale)
    out, grads = run(fused_preference_loss, problem, settings, train=train, scale=scale, **more)
    for field in dataclasses.fields(out):
        got = getattr(out, field.name)
        assert got.dtype == torch.float32, field.name
        assert got.requires_grad == (field.name == "loss" and bool(train)), field.name
        assert_no_worse(got, getattr(base, field.name), getattr(truth, field.name), name=field.name)
    for name, grad in grads.items():
        if name in train:
            assert grad.dtype == getattr(problem, name).dtype
            assert_no_worse(grad, base_grads[name], true_grads[name], name=f"grad of {name}")
        else:
            assert grad is None
    return out, grads


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_trained_head(kind, budget):
    check(*scene(kind), memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_frozen_head(kind):
    check(*scene(kind), train=("hidden",))
    check(*scene(kind), train=())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", [("weight",), ("bias",), ("hidden", "bias"), ("hidden", "weight")])
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_k16_partial_grads(train, budget):
    check(*scene(), train=train, memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("options", [{"logit_scale": 0.4}, {"softcap": 9.0, "logit_scale": 1.5}], ids=str)
def test_scale_and_softcap(options, budget):
    check(*scene(**options), memory_budget=budget)
    check(*scene(**options), train=("hidden",))
    check(*scene(bias=False, **options), train=("hidden", "weight"), memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_half_precisions(dtype, budget):
    check(*scene(dtype=dtype), memory_budget=budget)
    check(*scene(dtype=dtype), train=("hidden",))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_k17_scaled_upstream_gradient(train):
    check(*scene(), train=train, scale=-37.5)
    check(*scene(), train=train, scale=0.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_micro_batches_add_up_to_the_step(train):
    """num_pairs and num_sft_tokens of the whole step: two micro-batches give the gradient of one batch."""
    problem, settings = scene(bias=True)
    whole, whole_grads = run(fused_preference_loss, problem, settings, train=train)
    truth, true_grads = run(reference.fused_preference_loss, problem, settings, dtype=torch.float64, train=train)
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves().items()}
    sft_tokens = float((CU.diff()[PAIRS[:, 0]]).sum())
    total = 0.0
    for first, last, mine in ((0, 2, [0]), (2, 7, [1, 2, 3])):
        rows = slice(int(CU[first]), int(CU[last]))
        part = dict(settings)
        cuts = {"token_weight": rows, "reference_scores": slice(first, last), "beta": mine, "pair_weight": mine}
        for name, index in cuts.items():
            part[name] = settings[name][index]
        out = fused_preference_loss(
            leaves["hidden"][rows],
            leaves["weight"],
            problem.targets[rows],
            CU[first : last + 1] - CU[first],
            PAIRS[mine] - first,
            bias=leaves["bias"],
            num_pairs=4,
            num_sft_tokens=torch.tensor(sft_tokens),
            **part,
        )
        out.loss.backward()
        total += float(out.loss.detach())
    assert abs(total - float(truth.loss.detach())) <= 2 * abs(
        float(whole.loss.detach() - truth.loss.detach())
    ) + 1e-6 * abs(total)
    for name in train:
        assert_no_worse(leaves[name].grad, whole_grads[name], true_grads[name], name=name)


@pytest.mark.parametrize("budget", [None, 15 * ROW], ids=["kept", "recomputed"])
def test_callable_beta(budget):
    """A function of the scores gives beta once, without gradient, in one chunk."""
    problem, settings = scene()
    calls = []

    def beta(scores, reference_scores):
        calls.append(scores)
        assert not torch.is_grad_enabled()
        assert not scores.requires_grad
        ratio = (scores - reference_scores)[PAIRS]
        return implicit_beta(ratio[:, 0] - ratio[:, 1], generator=torch.Generator().manual_seed(0))

    out, _ = check(problem, settings | {"beta": beta}, memory_budget=budget)
    assert [c.dtype for c in calls].count(torch.float64) == 1
    assert len(calls) == 3  # truth, baseline, ours
    assert out.beta.shape == (4,)
    assert (out.beta == out.beta[0]).all()
    check(problem, settings | {"beta": lambda scores, ref: 0.07}, train=("hidden",))


def test_chunks_cut_between_groups():
    objective = reference.Objective(CU, PAIRS)
    chunks = fused.plan(objective, N, ROW, 20 * ROW)
    assert [(c.tokens.start, c.tokens.stop, c.keep) for c in chunks] == [(0, 14, True), (14, 34, True), (34, 47, True)]
    chunks = fused.plan(objective, N, ROW, 15 * ROW)
    assert [(c.tokens.start, c.tokens.stop, c.keep) for c in chunks] == [(0, 14, True), (14, 34, False), (34, 47, True)]
    assert [(c.tokens.start, c.tokens.stop) for c in fused.plan(objective, N, ROW, 34 * ROW)] == [(0, 34), (34, 47)]
    assert [c.keep for c in fused.plan(objective, N, ROW, 47 * ROW)] == [True]
    coupled = dataclasses.replace(objective, kind="bco_pair")
    assert [(c.tokens, c.keep) for c in fused.plan(coupled, N, ROW, 20 * ROW)] == [(slice(0, N), False)]
    crossing = dataclasses.replace(objective, pairs=torch.tensor([[0, 3], [4, 2]]))
    assert [(c.tokens.start, c.tokens.stop) for c in fused.plan(crossing, N, ROW, 14 * ROW)] == [(0, 33), (33, 47)]
    # What does not fit is made again whatever its size: in one piece, not in eight small GEMMs.
    assert [(c.tokens, c.keep) for c in fused.plan(objective, N, ROW, 0)] == [(slice(0, N), False)]
    assert [(c.tokens.stop, c.keep) for c in fused.plan(objective, N, ROW, 13 * ROW)] == [(34, False), (47, True)]


def test_chunks_are_about_equal():
    """A thin last chunk costs a whole pass over the weight, and a full first one all the memory of the budget."""
    ends = torch.arange(0, 17) * 3
    objective = reference.Objective(ends, torch.arange(16).view(8, 2))
    chunks = fused.plan(objective, 48, ROW, 42 * ROW)
    assert [(c.tokens.start, c.tokens.stop, c.keep) for c in chunks] == [(0, 24, True), (24, 48, True)]


def test_is_the_composition_of_the_ops():
    problem, settings = scene(bias=False)
    leaves = problem.leaves()
    logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets)
    scores = sequence_score(logp, CU, token_weight=settings["token_weight"])
    out = preference_loss(
        scores, settings["reference_scores"], PAIRS, beta=settings["beta"], pair_weight=settings["pair_weight"]
    )
    better = PAIRS[:, 0].tolist()
    sft = sum(-logp[CU[r] : CU[r + 1]].sum() for r in better) / sum(int(CU.diff()[r]) for r in better)
    got, _ = run(fused_preference_loss, problem, settings, train=("hidden", "weight"))
    assert torch.allclose(got.sft_loss, sft)
    assert torch.allclose(got.loss, out.loss + 0.25 * sft)
    for name in ("losses", "rewards", "margins", "accuracy"):
        assert torch.allclose(getattr(got, name), getattr(out, name))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_k09_extreme_logits(budget):
    """Logits of about +-1e4 and log-ratios in the thousands."""
    problem, settings = scene()
    problem.hidden *= 3000
    settings["reference_scores"] = settings["reference_scores"] * 0 - 5e4
    out, _ = check(problem, settings, memory_budget=budget)
    assert out.logp.min() < -1e4


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_k06_no_weight_no_pairs_no_tokens(train):
    problem, settings = scene()
    settings["token_weight"][:9] = 0
    settings["token_weight"][34:] = 0
    settings["reduction"] = "mean"
    out, _ = check(problem, settings, train=train)
    assert out.scores[0] == out.scores[3] == out.scores[6] == 0
    nothing = torch.empty(0, 2, dtype=torch.int64)
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves().items()}
    out = fused_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        CU,
        nothing,
        bias=leaves["bias"],
        reference_scores=torch.zeros(7),
        sft_weight=1.0,
    )
    out.loss.backward()
    assert out.loss == out.accuracy == out.sft_loss == 0
    assert all((leaves[name].grad == 0).all() for name in train)
    empty = fused_preference_loss(
        leaves["hidden"][:0],
        leaves["weight"],
        problem.targets[:0],
        torch.tensor([0, 0, 0]),
        torch.tensor([[0, 1]]),
        reference_scores=torch.zeros(2),
        sft_weight=1.0,
    )
    empty.loss.backward()
    assert abs(float(empty.loss.detach()) - 0.6931472) < 1e-6


@pytest.mark.parametrize("backend", [None, "reference"])
def test_totals_as_tensors_of_one_number_leave_scalars(backend):
    """[1], as a total that was all-reduced comes, or []: the same scalars as from numbers."""
    problem, settings = scene()
    arguments = (problem.hidden, problem.weight, problem.targets, CU, PAIRS)
    want = fused_preference_loss(*arguments, **settings, num_pairs=9, num_sft_tokens=50, backend=backend)
    for shape in ((), (1,)):
        totals = {"num_pairs": torch.full(shape, 9.0), "num_sft_tokens": torch.full(shape, 50)}
        out = fused_preference_loss(*arguments, **settings, **totals, backend=backend)
        assert out.loss.shape == out.sft_loss.shape == ()
        assert torch.equal(out.loss, want.loss)
        assert torch.equal(out.sft_loss, want.sft_loss)


@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_k10_equal_pair(train):
    """The same response twice: log 2, and opposite gradients."""
    problem = HeadProblem.random(8, 12, 301, bias=True)
    problem.hidden[4:], problem.targets[4:] = problem.hidden[:4].clone(), problem.targets[:4].clone()
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves().items()}
    cu, pairs = torch.tensor([0, 4, 8]), torch.tensor([[0, 1]])
    out = fused_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        cu,
        pairs,
        bias=leaves["bias"],
        reference_scores=torch.full((2,), -9.0),
    )
    out.loss.backward()
    assert abs(float(out.loss.detach()) - 0.6931472) < 1e-6
    assert torch.equal(leaves["hidden"].grad[:4], -leaves["hidden"].grad[4:])
    if "weight" in train:
        assert leaves["weight"].grad.abs().max() < 1e-6


def test_k08_nonfinite_row_with_no_weight_spoils_nothing():
    """A row that nothing depends on (weight 0, no pair) may be non-finite: loss and gradient of hidden stay finite."""
    problem, settings = scene()
    problem.hidden[40] = float("nan")
    settings["token_weight"][34:] = 0
    settings["sft_weight"] = 0.0
    for train in (("hidden",), ("hidden", "weight", "bias")):
        for budget in (None, 0):
            out, grads = run(fused_preference_loss, problem, settings, train=train, memory_budget=budget)
            assert out.loss.isfinite()
            assert out.logp.isnan().nonzero().flatten().tolist() == [40]
            assert grads["hidden"].isfinite().all()
            assert (grads["hidden"][34:] == 0).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
def test_k18_k19_double_backward_and_backward_twice(train):
    problem, settings = scene()
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves().items()}
    before = {k: v.detach().clone() for k, v in leaves.items()}
    wanted = [leaves[k] for k in train]

    def loss():
        tensors = (leaves["hidden"], leaves["weight"], problem.targets, CU, PAIRS)
        return fused_preference_loss(*tensors, bias=leaves["bias"], **settings).loss

    value = loss()
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    second = torch.autograd.grad(value * 2, wanted)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())
    again = torch.autograd.grad(loss(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # K21, bitwise
    with pytest.raises(RuntimeError, match="has no double backward"):
        torch.autograd.grad(loss(), wanted, create_graph=True)


def test_autocast():
    problem, settings = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run(fused_preference_loss, problem, settings)
    hidden, weight, bias = (t.bfloat16() for t in (problem.hidden, problem.weight, problem.bias))
    halves = HeadProblem(hidden, weight, problem.targets, bias)
    expected, expected_grads = run(fused_preference_loss, halves, settings)
    assert torch.equal(out.loss, expected.loss)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, expected_grads[name].float())


BAD = [
    ({"hidden": torch.zeros(2, 3, H)}, ValueError, r"hidden must have shape \[N, H\]"),
    ({"hidden": torch.zeros(N, H, dtype=torch.float64)}, TypeError, "hidden must be float32.*ops.reference"),
    ({"targets": torch.full((N,), -100)}, ValueError, rf"targets must be token ids in \[0, {V}\); entry 0 is -100"),
    ({"cu_seqlens": CU[:-1]}, ValueError, "cu_seqlens must run from 0 to 47"),
    ({"pairs": torch.tensor([[0, 7]])}, ValueError, r"pairs must be responses in \[0, 7\)"),
    ({"token_weight": torch.ones(N + 1)}, ValueError, r"token_weight must have shape \[47\]"),
    ({"token_weight": torch.ones(N, requires_grad=True)}, ValueError, "token_weight requires a gradient"),
    ({"beta": -1.0}, ValueError, "beta must be finite and positive"),
    ({"reference_scores": None}, ValueError, "reference_scores is None, but kind 'sigmoid'"),
    ({"sft_weight": -0.5}, ValueError, "sft_weight must be finite and 0 or more"),
    ({"num_sft_tokens": 0}, ValueError, "num_sft_tokens must be finite and positive"),
    ({"memory_budget": -1}, ValueError, "memory_budget must be finite and 0 or more"),
    ({"kind": "kto"}, ValueError, "kind must be one of sigmoid"),
    ({"reduction": "max"}, ValueError, "reduction must be one of sum, mean"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[next(iter(row[0])) for row in BAD])
def test_bad_arguments(change, error, message):
    given = {
        "hidden": torch.zeros(N, H),
        "weight": torch.zeros(V, H),
        "targets": torch.zeros(N, dtype=torch.int64),
        "cu_seqlens": CU,
        "pairs": PAIRS,
        "reference_scores": torch.zeros(7),
    }
    with pytest.raises(error, match=message):
        fused_preference_loss(**(given | change))
