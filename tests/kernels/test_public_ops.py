"""The public ops with backend="triton": values and every gradient against float64, as for every backend."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.kernels.triton import launch
from mmrlhf.ops import LOSS_KINDS, LoraAdapter, backend, fused_preference_loss, linear_logp, reference
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="test_device.py is for a GPU")


def gradients(output, leaves):
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values())), strict=True))


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_linear_logp(budget):
    problem = HeadProblem.random(21, 24, 131, bias=True, softcap=15.0, logit_scale=1.3)
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(3))
    results = []
    for dtype, how in (
        (torch.float64, reference.linear_logp),
        (torch.float32, plain_logp),
        (torch.float32, lambda **a: linear_logp(**a, backend="triton", memory_budget=budget)),
    ):
        leaves = problem.leaves(dtype)
        logp = how(targets=problem.targets, **leaves, **problem.options)
        results.append((logp, gradients((logp * upstream.to(dtype)).sum(), leaves)))
    (truth, true_grads), (baseline, base_grads), (ours, grads) = results
    assert_no_worse(ours, baseline, truth, name="logp")
    for name in grads:
        assert_no_worse(grads[name], base_grads[name], true_grads[name], name=name)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_fused(kind, frozen):
    problem = HeadProblem.random(30, 16, 67)
    g = torch.Generator().manual_seed(4)
    cu_seqlens, pairs = torch.tensor([0, 9, 13, 13, 30]), torch.tensor([[0, 1], [0, 3], [3, 2]])
    weight, scores = torch.rand(30, generator=g) + 0.5, torch.randn(4, generator=g)
    smoothing = {"exo_pair": 0.01, "robust": 0.1}.get(kind, 0.0)
    results = []
    for dtype, how in (
        (torch.float64, reference.fused_preference_loss),
        (torch.float32, reference.fused_preference_loss),
        (torch.float32, lambda *a, **k: fused_preference_loss(*a, **k, backend="triton")),
    ):
        leaves = problem.leaves(dtype)
        out = how(
            leaves["hidden"],
            leaves["weight"].requires_grad_(not frozen),
            problem.targets,
            cu_seqlens,
            pairs,
            token_weight=weight.to(dtype),
            reduction="mean",
            reference_scores=None if kind in ("simpo", "orpo") else scores.to(dtype),
            beta=0.3,
            kind=kind,
            label_smoothing=smoothing,
            sft_weight=0.25,
        )
        asked = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        results.append((out, gradients(out.loss, asked)))
    (truth, true_grads), (baseline, base_grads), (ours, grads) = results
    for name in ("loss", "losses", "scores", "rewards", "margins", "accuracy", "logp", "sft_loss", "beta"):
        assert_no_worse(getattr(ours, name), getattr(baseline, name), getattr(truth, name), name=name)
    for name in grads:
        assert_no_worse(grads[name], base_grads[name], true_grads[name], name=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("far", [False, True], ids=["", "far"])
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_an_adapter(budget, far):
    """Value and gradients of hidden, weight, bias, a and b; `far`: every third row is more than 44 nats down."""
    problem = HeadProblem.random(20, 24, 131, bias=True, softcap=80.0, logit_scale=0.9)
    g = torch.Generator().manual_seed(3)
    a, b, upstream = (
        torch.randn(5, 24, generator=g),
        torch.randn(131, 5, generator=g) * 0.2,
        torch.randn(20, generator=g),
    )
    if far:
        problem.hidden[::3] *= 60
        z = problem.hidden @ (problem.weight + 0.7 * b @ a).T + problem.bias
        problem.targets[:] = z.argmin(1)
    results = []
    for dtype, how in (
        (torch.float64, reference.linear_logp),
        (torch.float32, reference.linear_logp),
        (torch.float32, lambda *args, **k: linear_logp(*args, **k, backend="triton", memory_budget=budget)),
    ):
        leaves = problem.leaves(dtype) | {n: t.detach().to(dtype).requires_grad_() for n, t in (("a", a), ("b", b))}
        adapter = LoraAdapter(leaves["a"], leaves["b"], 0.7)
        tensors = (leaves["hidden"], leaves["weight"], problem.targets)
        logp = how(*tensors, bias=leaves["bias"], adapter=adapter, **problem.options)
        results.append((logp, gradients((logp * upstream.to(dtype)).sum(), leaves)))
    (truth, true_grads), (baseline, base_grads), (ours, grads) = results
    assert (float(truth.detach().min()) < -100) == far
    assert_no_worse(ours, baseline, truth, name="logp")
    for name in grads:
        assert_no_worse(grads[name], base_grads[name], true_grads[name], name=name)


def test_chosen_unasked_on_cuda_alone(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    assert backend.choose("linear_logp", torch.zeros(2, 2)).name != "triton"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"cannot run linear_logp .*: its tensors must be on a CUDA device, not cpu"):
        linear_logp(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), backend="triton")
