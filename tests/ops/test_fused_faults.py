"""fused_preference_loss in strange memory: strided, poisoned; and of a policy that is its reference, exactly 0."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmrlhf.ops import fused_preference_loss, linear_logp, preference_loss, sequence_score
from numerics import HeadProblem

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter, of infinities
every_engine = pytest.mark.parametrize("head_backend", ["torch", "cpu", "triton"], indirect=True)
N, H, V = 27, 10, 301
CU, PAIRS = torch.tensor([0, 9, 14, 14, 27]), torch.tensor([[1, 0], [2, 3]])
BUDGETS = {"kept": None, "chunks": 15 * 4 * V, "recomputed": 0}  # chunks: responses 0-1 kept, 2-3 (13 rows) kept


def of_responses():
    """Settings of the objective, one of each per-token, per-response and per-pair kind."""
    g = torch.Generator().manual_seed(5)
    return {
        "token_weight": 1 + 4 * (torch.rand(N, generator=g) > 0.7).float(),
        "reference_scores": torch.randn(4, generator=g) - 40,
        "beta": torch.tensor([0.3, 0.1]),
        "pair_weight": torch.tensor([1.0, 0.5]),
        "sft_weight": 0.25,
    }


def strided(value: torch.Tensor) -> torch.Tensor:
    """The same values, every second entry of a vector between NaN, or a token that no vocabulary has."""
    wide = value.new_full((2 * value.shape[0] + 1,), float("nan") if value.is_floating_point() else -7)
    wide[1::2] = value
    return wide[1::2]


@every_engine
@pytest.mark.usefixtures("head_backend", "small_tiles")
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_k04_strided_input(budget):
    """Sliced hidden, transposed weight, int32 indices with gaps, weights, scores and betas with gaps: bitwise the
    contiguous result, and the gradients go back through the views."""
    problem, settings = HeadProblem.random(N, H, V, bias=True), of_responses()
    plain = problem.leaves()
    wide = torch.full((2 * N + 1, 2 * H + 3), float("nan"))
    wide[1::2, 2 : 2 * H + 2 : 2] = problem.hidden
    wide.requires_grad_()
    turned = problem.weight.T.contiguous().requires_grad_()
    bias = problem.bias.repeat(2).requires_grad_()
    common = {"memory_budget": budget, "reduction": "mean"}
    want = fused_preference_loss(
        plain["hidden"], plain["weight"], problem.targets, CU, PAIRS, bias=plain["bias"], **settings, **common
    )
    out = fused_preference_loss(
        wide[1::2, 2 : 2 * H + 2 : 2],
        turned.T,
        strided(problem.targets.int()),
        strided(CU.int()),
        PAIRS.int().T.contiguous().T,
        bias=bias[V:],
        **{k: strided(v) if isinstance(v, torch.Tensor) else v for k, v in settings.items()},
        **common,
    )
    for each in (want, out):
        each.loss.backward()
    for field in dataclasses.fields(want):
        assert torch.equal(getattr(out, field.name), getattr(want, field.name)), field.name
    assert torch.equal(wide.grad[1::2, 2 : 2 * H + 2 : 2], plain["hidden"].grad)
    assert torch.equal(turned.grad.T, plain["weight"].grad)
    assert torch.equal(bias.grad[V:], plain["bias"].grad)


@every_engine
@pytest.mark.usefixtures("head_backend", "small_tiles")
@pytest.mark.parametrize(
    ("trained", "budget"),
    [(False, None), *((True, budget) for budget in BUDGETS.values())],
    ids=["frozen", *BUDGETS],
)
def test_k13_poisoned_empty(trained, budget):
    """Memory that torch.empty hands out is full of NaN: nothing of it reaches a result, of rows done again either."""
    problem = HeadProblem.random(N, H, V, bias=True)
    problem.hidden[3] *= 200
    problem.targets[3] = (problem.hidden[3] @ problem.weight.T).argmin()

    def run():
        leaves = {k: v.requires_grad_(trained or k == "hidden") for k, v in problem.leaves().items()}
        tensors = (leaves["hidden"], leaves["weight"], problem.targets, CU, PAIRS)
        out = fused_preference_loss(*tensors, bias=leaves["bias"], memory_budget=budget, **of_responses())
        out.loss.backward()
        values = [getattr(out, field.name) for field in dataclasses.fields(out)]
        return [*values, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)]

    clean = run()
    torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, on by default, fills empty with NaN
    try:
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    for got, want in zip(poisoned, clean, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("head_backend", ["torch", "cpu", "triton", "reference"], indirect=True)
@pytest.mark.parametrize(
    ("train", "reduction"),
    [(("hidden",), "sum"), (("hidden",), "mean"), (("hidden", "weight", "bias"), "mean")],
    ids=["frozen-sum", "frozen-mean", "trained-mean"],
)
def test_a_policy_that_is_its_reference(train, reduction):
    """Before the first step the policy is the reference model, whose scores came from linear_logp and sequence_score,
    in float32: margins and rewards are 0 then, not a rounding, and no pair counts as told apart."""
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 8, (10,), generator=g)
    cu, pairs = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), torch.arange(10).view(5, 2)
    n = int(cu[-1])
    problem = HeadProblem.random(n, 8, 31, bias=True)
    token_weight = 0.1 + torch.rand(n, generator=g)  # sums that float32 has to round
    of_scores = {"token_weight": token_weight, "reduction": reduction}
    reference_logp = linear_logp(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    known = sequence_score(reference_logp, cu, **of_scores)
    leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves().items()}
    fused = fused_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        cu,
        pairs,
        bias=leaves["bias"],
        reference_scores=known,
        **of_scores,
    )
    logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets, bias=leaves["bias"])
    composed = preference_loss(sequence_score(logp, cu, **of_scores), known, pairs)
    for out in (fused, composed):
        assert (out.rewards == 0).all()
        assert (out.margins == 0).all()
        assert out.accuracy == 0
        assert abs(float(out.loss.detach()) - 0.6931472) < 1e-6
        out.loss.backward(retain_graph=out is fused)
    assert (leaves["hidden"].grad != 0).any()  # equal scores, and yet something to learn
