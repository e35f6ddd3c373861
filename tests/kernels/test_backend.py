"""The triton backend's `forward`, `weight_grad` and `objective` as `streaming` has them, in float32.

Both ways to E are put to it: the epilogue over library GEMM tiles, which float32 takes, and the GEMM, forced; with a
workspace of a few KiB, so that a handful of rows is cut into chunks and blocks.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmrlhf.kernels.triton import configs, launch
from mmrlhf.ops import _gemm, _triton, reference
from mmrlhf.ops.streaming import Head
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="test_device.py is for a GPU")
GEMM = configs.GemmConfig(4, 1, 16, 64, 16, group_m=2)


@pytest.fixture(params=["epilogue", "gemm"])
def way(request, monkeypatch):
    """How E is made, with small tiles and a workspace that takes a few of them."""
    small = configs.EpilogueConfig(4, 1, 4, 64) if request.param == "epilogue" else GEMM
    monkeypatch.setattr(configs, "pick", lambda problem: small)
    monkeypatch.setattr(_gemm, "WORKSPACE_BYTES", 10_000)
    monkeypatch.setattr(_triton, "ROW_STEP", 16)
    return request.param


def gradients(problem, dtype, how, upstream):
    leaves = problem.leaves(dtype)
    logp = how(targets=problem.targets, **leaves, **problem.options)
    return logp, torch.autograd.grad((logp * upstream.to(dtype)).sum(), list(leaves.values()))


def run(problem, upstream, *, keep):
    """logp, and the gradients of hidden, weight and bias for any upstream gradient."""
    options = problem.options
    head = Head(problem.weight, problem.bias, options.get("logit_scale", 1.0), options.get("softcap"))
    kept = _triton.Kept.empty(problem.hidden.shape[0], head) if keep else None
    if kept is not None:
        kept.flat.fill_(float("nan"))
    rows, unit = _triton.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
    grads = [torch.full(problem.weight.shape, float("nan"))]
    if problem.bias is not None:
        grads.append(torch.full(problem.bias.shape, float("nan")))
    _triton.weight_grad(
        head,
        problem.hidden,
        rows,
        upstream,
        grad_weight=grads[0],
        grad_bias=grads[1] if len(grads) > 1 else None,
        keep=kept,
    )
    return rows, (unit * upstream[:, None], *grads)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("n", "v", "options"),
    [(0, 17, {}), (1, 1, {}), (7, 129, {"bias": True}), (41, 257, {"softcap": 5.0, "bias": True, "logit_scale": 0.7})],
    ids=str,
)
def test_every_gradient(way, keep, n, v, options):
    problem = HeadProblem.random(n, 16, v, seed=n, **options)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1))
    truth, true_grads = gradients(problem, torch.float64, reference.linear_logp, upstream)
    baseline, base_grads = gradients(problem, torch.float32, plain_logp, upstream)
    rows, grads = run(problem, upstream, keep=keep)
    assert_no_worse(rows.logp(), baseline, truth, name="logp")
    for name, *three in zip(("hidden", "weight", "bias"), grads, base_grads, true_grads, strict=False):
        assert_no_worse(*three, name=name)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_rows_far_below_are_run_again(way, keep):
    """Every third row at -1000 nats and less: finite, and as close as PyTorch."""
    problem = HeadProblem.random(20, 16, 129, seed=2, bias=True)
    problem.hidden[::3] *= 200
    z = problem.hidden @ problem.weight.T + problem.bias
    problem.targets[:] = z.argmin(1)
    upstream = torch.randn(20, generator=torch.Generator().manual_seed(2))
    truth, true_grads = gradients(problem, torch.float64, reference.linear_logp, upstream)
    baseline, base_grads = gradients(problem, torch.float32, plain_logp, upstream)
    rows, grads = run(problem, upstream, keep=keep)
    again = rows.offset - rows.z_y * launch.LOG2E > 32
    assert again.nonzero()[:, 0].tolist() == list(range(0, 20, 3))
    assert float(truth.min()) < -1000
    assert_no_worse(rows.logp(), baseline, truth, name="logp")
    for name, *three in zip(("hidden", "weight", "bias"), grads, base_grads, true_grads, strict=False):
        assert_no_worse(*three, name=name)


def test_chunks_are_whole_tiles_of_about_one_size():
    assert _gemm.row_chunk(100, 1000, 2, 128) == 100
    chunk = _gemm.row_chunk(4000, 151646, 2, 128)
    assert chunk % 128 == 0
    assert chunk * 151648 * 2 <= _gemm.WORKSPACE_BYTES
    assert -(-4000 // chunk) * chunk - 4000 < 3 * 128
    assert _gemm.column_block(8192, 151646, 4, 1024) % 1024 == 0
    assert _gemm.column_block(1, 17, 4, 1024) == 17


@pytest.mark.parametrize(
    "beta",
    [0.1, torch.tensor([0.3, 0.1]), lambda s, r: (s - r).abs().mean() / 10],
    ids=["number", "tensor", "function"],
)
def test_objective(beta):
    g = torch.Generator().manual_seed(0)
    logp, weight = -torch.rand(12, generator=g), torch.rand(12, generator=g)
    o = reference.Objective(
        torch.tensor([0, 4, 6, 12]),
        torch.tensor([[0, 1], [2, 0]]),
        token_weight=weight,
        reduction="mean",
        reference_scores=torch.randn(3, generator=g),
        beta=beta,
        sft_weight=0.5,
    )
    leaf = logp.clone().requires_grad_()
    expected = o(leaf)
    (coef,) = torch.autograd.grad(expected.loss, leaf)
    found, ours = _triton.objective(o, logp)
    assert torch.allclose(ours, coef, rtol=1e-5, atol=1e-7)
    for f in dataclasses.fields(found):
        assert torch.allclose(getattr(found, f.name), getattr(expected, f.name), rtol=1e-5, atol=1e-6), f.name


def test_refuses_what_it_cannot_take():
    half = torch.zeros(2, 2, dtype=torch.float16)
    assert "float32 and bfloat16, not float16" in _triton.refuse((half, half))
    assert "not float64" in _triton.refuse((half.double(),))
    assert _triton.refuse((half.float(),)) is None
    assert "interpreter takes float32 only" in _triton.refuse((half.bfloat16(),))
