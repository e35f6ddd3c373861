"""The ops in traced code (K20): compiled whole, checked by opcheck, and shape-only on meta and fake tensors.

`aot_eager` traces forward and backward as torch.compile's default does and runs the graph as it is; the default, which
also compiles C++ for 15 s, is one slow test.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrlhf.losses import PreferenceLoss
from mmrlhf.ops import fused_preference_loss, library, linear_logp
from numerics import HeadProblem, assert_no_worse, gradients, plain_logp, reference

pytestmark = pytest.mark.usefixtures("head_backend")
CU = torch.tensor([0, 9, 14, 21, 21, 33, 34, 47])
PAIRS = torch.tensor([[1, 0], [2, 4], [5, 2], [4, 5]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(function, **options):
    return torch.compile(function, fullgraph=True, **({"backend": "aot_eager"} | options))


def problem_with_faults(**options) -> HeadProblem:
    """Rows at -1000 nats, which are done again."""
    problem = HeadProblem.random(21, 16, 1301, bias=True, **options)
    problem.hidden[[3, 17]] *= 150
    problem.targets[[3, 17]] = (problem.hidden[[3, 17]] @ problem.weight.T).argmin(-1)
    return problem


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("head", [{}, {"softcap": 500.0, "logit_scale": 0.8}], ids=["plain", "capped"])
def test_linear_logp_compiles_whole(head, budget):
    problem = problem_with_faults(**head)
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(2))
    truth, true_grads = gradients(
        reference.linear_logp, problem.leaves(torch.float64), problem.targets, upstream, **problem.options
    )
    base, base_grads = gradients(plain_logp, problem.leaves(), problem.targets, upstream, **problem.options)
    out, grads = gradients(
        compiled(linear_logp), problem.leaves(), problem.targets, upstream, **problem.options, memory_budget=budget
    )
    assert_no_worse(out, base, truth, name="logp")
    for name, grad in grads.items():
        assert_no_worse(grad, base_grads[name], true_grads[name], name=name)


def test_ignored_rows_frozen_head_and_half_precision_compiled():
    """As without the compiler, bitwise: the same rows meet the same blocks of the vocabulary."""
    problem = HeadProblem.random(10, 8, 31, dtype=torch.bfloat16)
    problem.targets[[0, 4]] = -100
    problem.hidden[4] = float("nan")
    results = []
    for function in (linear_logp, compiled(linear_logp)):
        hidden = problem.hidden.clone().requires_grad_()
        logp = function(hidden.view(2, 5, 8), problem.weight, problem.targets.view(2, 5))
        logp.square().sum().backward()
        results.append((logp, hidden.grad))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
    assert results[1][0].shape == (2, 5)
    assert (results[1][1][[0, 4]] == 0).all()


@pytest.mark.usefixtures("small_tiles")
def test_one_graph_for_every_number_of_rows():
    """dynamic=True: another N, as every batch has, compiles nothing again."""
    torch._dynamo.utils.counters.clear()
    function = compiled(linear_logp, dynamic=True)
    for rows in (5, 9, 33):
        problem = HeadProblem.random(rows, 8, 301)
        leaves = problem.leaves()
        logp = function(leaves["hidden"], leaves["weight"], problem.targets)
        logp.sum().backward()
        assert torch.equal(logp, linear_logp(problem.hidden, problem.weight, problem.targets))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("train", [("hidden",), ("hidden", "weight", "bias")], ids=["frozen", "trained"])
@pytest.mark.parametrize("settings", [{"kind": "sigmoid", "beta": 0.3, "sft_weight": 0.25}, {"kind": "ipo"}], ids=str)
def test_fused_preference_loss_compiles_whole(settings, train):
    problem = HeadProblem.random(47, 24, 301, bias=True, softcap=9.0)
    scores = torch.randn(7, generator=torch.Generator().manual_seed(1)) - 30

    def run(function, dtype=None):
        leaves = {k: v.requires_grad_(k in train) for k, v in problem.leaves(dtype).items()}
        tensors = (leaves["hidden"], leaves["weight"], problem.targets, CU, PAIRS)
        reference_scores = scores if dtype is None else scores.to(dtype)
        out = function(*tensors, bias=leaves["bias"], reference_scores=reference_scores, **problem.options, **settings)
        out.loss.backward()
        return out, {name: leaves[name].grad for name in train}

    truth, true_grads = run(reference.fused_preference_loss, torch.float64)
    base, base_grads = run(fused_preference_loss)
    out, grads = run(compiled(fused_preference_loss))
    for name in ("loss", "losses", "scores", "rewards", "margins", "accuracy", "logp", "sft_loss"):
        assert_no_worse(getattr(out, name), getattr(base, name), getattr(truth, name), name=name)
    for name, grad in grads.items():
        assert_no_worse(grad, base_grads[name], true_grads[name], name=name)


def test_a_model_and_its_loss_compile_whole():
    """A layer, the drop-in module and the loss as one graph; Dynamic Reward Scaling makes beta from margins."""
    torch.manual_seed(0)
    layer, head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 301)
    module = PreferenceLoss(beta_mode="margin", sft_weight=0.25)
    inputs, targets, margin = torch.randn(47, 8), torch.randint(0, 301, (47,)), torch.tensor([0.4, 2.0, -1.0, 6.0])

    def loss(inputs):
        hidden = layer(inputs).tanh()
        shared = {"reference_scores": torch.full((7,), -30.0), "margin": margin, "bias": head.bias}
        return module(hidden, head.weight, targets, CU, PAIRS, **shared).loss

    parameters = [*layer.parameters(), *head.parameters()]
    values = [function(inputs) for function in (loss, compiled(loss))]
    expected, got = ([v.detach(), *torch.autograd.grad(v, parameters)] for v in values)
    torch.testing.assert_close(got, expected)


def test_autocast_is_left_outside_the_op():
    problem = HeadProblem.random(9, 8, 31)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = compiled(linear_logp)(problem.hidden, problem.weight, problem.targets)
    assert torch.equal(got, linear_logp(problem.hidden.bfloat16(), problem.weight.bfloat16(), problem.targets))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("softcap", [None, 300.0])
@pytest.mark.parametrize("rank", [None, 3], ids=["bare", "adapter"])
def test_opcheck(head_backend, keep, softcap, rank):
    problem = problem_with_faults()
    leaves = problem.leaves()
    low = up = None
    if rank:
        low, up = (torch.randn(size, rank, requires_grad=True) for size in (21, 1301))
    arguments = (leaves["hidden"], low, leaves["weight"], leaves["bias"], up, problem.targets, 0.7, softcap)
    torch.library.opcheck(library._linear_logp, (*arguments, True, keep, head_backend))
    with torch.no_grad():
        _, _, _, flat, state = library._linear_logp(*arguments, True, keep, head_backend)
        plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
        wanted = (True, True, rank is not None)
        torch.library.opcheck(library._weight_grad, (*plain, torch.randn(21), flat, state, *wanted, head_backend))


def test_meta_and_fake_tensors_give_shapes():
    meta = linear_logp(
        torch.zeros(2, 3, 8, device="meta"),
        torch.zeros(11, 8, device="meta"),
        torch.zeros(2, 3, dtype=torch.int64, device="meta"),
        backend="torch",
    )
    assert (meta.shape, meta.dtype, meta.device.type) == ((2, 3), torch.float32, "meta")
    with FakeTensorMode():
        hidden = torch.zeros(47, 8, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(301, 8, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(47, dtype=torch.int64)
        out = fused_preference_loss(
            hidden,
            weight,
            targets,
            torch.zeros(8, dtype=torch.int64),
            torch.zeros(4, 2, dtype=torch.int64),
            reference_scores=torch.zeros(7),
        )
        out.loss.backward()
        assert (out.loss.shape, out.scores.shape, out.logp.shape) == ((), (7,), (47,))
        assert (hidden.grad.shape, weight.grad.dtype) == ((47, 8), torch.bfloat16)


def test_compiled_code_has_no_double_backward_either():
    problem = HeadProblem.random(4, 8, 11)
    leaves = problem.leaves()
    logp = compiled(linear_logp)(leaves["hidden"], leaves["weight"], problem.targets)
    (first,) = torch.autograd.grad(logp.sum(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@pytest.mark.slow
def test_default_compiler():
    problem = HeadProblem.random(9, 8, 31)
    function = compiled(linear_logp, backend="inductor")
    upstream = torch.linspace(-1, 2, 9)
    expected, expected_grads = gradients(linear_logp, problem.leaves(), problem.targets, upstream)
    got, grads = gradients(function, problem.leaves(), problem.targets, upstream)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, expected_grads)
