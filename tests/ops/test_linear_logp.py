"""linear_logp against float64 truth, value and every gradient.

Shapes: V = 1 and N = 0 (edges); odd and prime sizes; V above one block (1536 columns), so that a target falls into the
first, a middle and the last block. With `small_tiles` also N above one tile of rows, which would take 1025 of them.
"""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import linear_logp, reference, streaming
from numerics import HeadProblem, assert_no_worse, check_linear_logp, plain_logp

pytestmark = pytest.mark.usefixtures("head_backend")

SHAPES = [(1, 1, 1), (5, 7, 1), (0, 8, 13), (3, 16, 2), (37, 19, 509), (64, 33, 4999)]
HEADS = [{}, {"bias": True}, {"logit_scale": 0.35}, {"bias": True, "logit_scale": 1.7, "softcap": 6.0}]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "+".join(h) or "plain")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, head, budget):
    check_linear_logp(HeadProblem.random(*shape, **head), memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("head", HEADS, ids=lambda h: "+".join(h) or "plain")
def test_several_tiles_of_rows_and_columns(head, budget):
    check_linear_logp(HeadProblem.random(53, 8, 1201, **head), memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precisions(dtype, budget):
    check_linear_logp(HeadProblem.random(64, 48, 3001, dtype=dtype, bias=True, softcap=20.0), memory_budget=budget)
    check_linear_logp(HeadProblem.random(33, 64, 700, dtype=dtype), memory_budget=budget)


def test_half_precision_logits_are_float32():
    """bfloat16 inputs cost no bfloat16 rounding of the logits: nearer to truth than PyTorch by far, not only 2x."""
    problem = HeadProblem.random(64, 256, 2000, dtype=torch.bfloat16, spread=8.0)
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets)
    error = (linear_logp(problem.hidden, problem.weight, problem.targets) - truth).abs().max()
    assert error < 2e-5
    assert (plain_logp(problem.hidden, problem.weight, problem.targets) - truth).abs().max() > 100 * error


def test_leading_dimensions_and_int32_targets():
    problem = HeadProblem.random(24, 16, 91)
    flat = linear_logp(problem.hidden, problem.weight, problem.targets)
    folded = linear_logp(problem.hidden.view(2, 3, 4, 16), problem.weight, problem.targets.view(2, 3, 4).int())
    assert folded.shape == (2, 3, 4)
    assert torch.equal(folded.flatten(), flat)
    assert linear_logp(problem.hidden[0], problem.weight, problem.targets[0]).shape == ()


def test_frozen_head_recomputes_nothing():
    """The weight is not needed for the gradient of hidden: changing it after the forward changes nothing."""
    problem = HeadProblem.random(9, 12, 77)
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone()
    logp = linear_logp(hidden, weight, problem.targets)
    weight.zero_()
    logp.backward(torch.ones(9))
    truth = problem.leaves(torch.float64)
    reference.linear_logp(truth["hidden"], truth["weight"], problem.targets).sum().backward()
    plain = problem.leaves()
    plain_logp(plain["hidden"], plain["weight"], problem.targets).sum().backward()
    assert_no_worse(hidden.grad, plain["hidden"].grad, truth["hidden"].grad)


def test_tied_embedding_gets_both_gradients():
    embedding = torch.nn.Embedding(50, 16)
    tokens, targets = torch.randint(0, 50, (20,)), torch.randint(0, 50, (20,))

    def run(dtype, function):
        weight = embedding.weight.detach().to(dtype).requires_grad_()
        function(weight[tokens], weight, targets).sum().backward()
        return weight.grad

    truth = run(torch.float64, reference.linear_logp)
    assert_no_worse(run(torch.float32, linear_logp), run(torch.float32, plain_logp), truth)


@pytest.mark.parametrize("budget", [None, 0])
def test_p_near_one_keeps_relative_precision(budget):
    """logp = -1e-20 and the gradient that goes with it, where 1 - p would be 0 in float32."""
    weight = torch.zeros(6, 4)
    weight[2, 0] = 1.0
    hidden = torch.tensor([[46.0, 0, 0, 0], [80.0, 0, 0, 0]])
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    truth = [t.double().requires_grad_() for t in (hidden, weight)]
    targets = torch.tensor([2, 2])
    logp = linear_logp(*leaves, targets, memory_budget=budget)
    logp.sum().backward()
    # log1p in float64 is the truth here: z_y - logsumexp(z) loses all of it even in float64.
    expected = -torch.log1p(5 * torch.exp(-truth[0][:, 0]))
    expected.sum().backward()
    # All that is lost is the rounding of the logit itself: |z| * eps.
    assert ((logp - expected) / expected).abs().max() < 80 * torch.finfo(torch.float32).eps
    assert (logp < 0).all()
    ratio = leaves[0].grad[:, 0] / truth[0].grad[:, 0]
    assert (ratio - 1).abs().max() < 80 * torch.finfo(torch.float32).eps
    assert leaves[1].grad[2, 0] > 0


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("softcap", [None, 500.0])
@pytest.mark.parametrize("far", [[3, 17], [*range(11), 17]], ids=["two rows", "more than a tile"])
@pytest.mark.usefixtures("small_tiles")
def test_far_below_the_offset_range(softcap, budget, far):
    """logp < -100 nats: the target's offset overflows, the rows are done again; their neighbours are untouched."""
    problem = HeadProblem.random(40, 16, 3000, softcap=softcap)
    calm = linear_logp(problem.hidden, problem.weight, problem.targets, softcap=softcap)
    problem.hidden[far] *= 150
    problem.targets[far] = (problem.hidden[far] @ problem.weight.T).argmin(-1)
    out, _ = check_linear_logp(problem, memory_budget=budget)
    assert (out[far] < -100).all()
    others = [i for i in range(40) if i not in far]
    assert torch.equal(out[others].detach(), calm[others])


@pytest.mark.parametrize("rows", [1, 7, 512, 4096, 100_000])
@pytest.mark.parametrize("vocab", [1, 300, 151_936])
def test_pick_stays_in_its_budget(rows, vocab):
    for device in ("cpu", "cuda", "another"):
        tiles = streaming.pick(rows, vocab, device)
        assert 1 <= tiles.rows <= rows
        assert 1 <= tiles.columns <= vocab
        assert tiles.rows * tiles.columns * 4 <= (4 << 20 if device == "cpu" else 256 << 20)
        parts = -(-rows // tiles.rows)
        assert parts * tiles.rows - rows < parts, "parts of the rows differ in size: the last is done for a few rows"
