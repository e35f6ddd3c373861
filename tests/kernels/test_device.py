"""On a CUDA device: bfloat16 through every configuration for this device, and the loss kernel, against float64.

V is ragged (32001, 50257, 151646: no multiple of a tile), and one case has over 2^31 exponentials, so that a 32-bit
offset would show.
"""

from __future__ import annotations

import pytest
import torch

from mmrlhf.kernels.triton import configs, launch
from mmrlhf.ops import _triton, reference
from mmrlhf.ops.streaming import Head
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or launch.interpreted(), reason="needs a CUDA device"),
]


def on_device(n, h, v, **options):
    problem = HeadProblem.random(n, h, v, dtype=torch.bfloat16, **options)
    for name in ("hidden", "weight", "targets", "bias"):
        value = getattr(problem, name)
        setattr(problem, name, None if value is None else value.cuda())
    return problem


def head_of(problem):
    return Head(problem.weight, problem.bias, problem.options.get("logit_scale", 1.0), problem.options.get("softcap"))


def both(problem):
    arguments = {"bias": problem.bias, **problem.options}
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    return truth, plain_logp(problem.hidden, problem.weight, problem.targets, **arguments)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 30.0, "bias": True}], ids=str)
@pytest.mark.parametrize("v", [32001, 50257, 151646])
@pytest.mark.parametrize("n", [33, 1000])
def test_every_configuration(n, v, options, monkeypatch):
    problem = on_device(n, 512, v, **options)
    truth, baseline = both(problem)
    shape = launch.problem(problem.hidden, problem.weight, bias=problem.bias, softcap=problem.options.get("softcap"))
    candidates = [rule.config for rule in configs.CANDIDATES if configs.fits(rule, shape)]
    for config in (configs.pick(shape), *candidates, configs.pick_epilogue(shape)):
        monkeypatch.setattr(configs, "pick", lambda problem, config=config: config)
        rows, _ = _triton.forward(head_of(problem), problem.hidden, problem.targets)
        assert_no_worse(rows.logp(), baseline, truth, name=str(config))


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 30.0, "bias": True, "logit_scale": 1.2}], ids=str)
def test_every_gradient(options, keep):
    problem = on_device(300, 512, 32001, **options)
    upstream = torch.randn(300, device="cuda")
    expected = []
    for dtype, how in ((torch.float64, reference.linear_logp), (torch.bfloat16, plain_logp)):
        leaves = problem.leaves(dtype)
        logp = how(targets=problem.targets, **leaves, **problem.options)
        expected.append(torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), list(leaves.values())))
    head = head_of(problem)
    kept = _triton.Kept.empty(300, head) if keep else None
    rows, unit = _triton.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
    weight, bias = torch.empty_like(problem.weight.float()), torch.empty_like(problem.bias.float())
    _triton.weight_grad(head, problem.hidden, rows, upstream, grad_weight=weight, grad_bias=bias, keep=kept)
    grads = (unit * upstream[:, None], weight, bias)
    for name, ours, truth, baseline in zip(("hidden", "weight", "bias"), grads, *expected, strict=True):
        assert_no_worse(ours.bfloat16(), baseline, truth, name=name)


def test_offsets_beyond_32_bits():
    """15,000 rows of 151,646 exponentials kept: 2.3e9 of them. The last rows equal those rows alone."""
    problem = on_device(15_000, 128, 151646)
    head = head_of(problem)
    kept = _triton.Kept.empty(15_000, head)
    rows, _ = _triton.forward(head, problem.hidden, problem.targets, keep=kept)
    last = slice(14_900, 15_000)
    alone, _ = _triton.forward(head, problem.hidden[last].clone(), problem.targets[last].clone())
    assert torch.allclose(rows.logp()[last], alone.logp(), rtol=1e-5)
    assert torch.allclose(
        kept.matrix[-1].float().sum(), torch.zeros((), device="cuda"), atol=0.02 * float(rows.rest[-1])
    )


@pytest.mark.parametrize("kind", ["sigmoid", "bco_pair", "orpo"])
def test_loss_kernel(kind):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (64,), generator=g)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logp, weight = -torch.rand(int(ends[-1]), generator=g), torch.rand(int(ends[-1]), generator=g)
    pairs = torch.tensor([(4 * q + i, 4 * q + j) for q in range(16) for i in range(4) for j in range(i + 1, 4)])
    scores = None if kind == "orpo" else torch.randn(64, generator=g).cuda()
    o = reference.Objective(
        ends.cuda(),
        pairs.cuda(),
        token_weight=weight.cuda(),
        reduction="mean",
        reference_scores=scores,
        beta=0.1,
        kind=kind,
        sft_weight=0.25,
    )
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = logp.cuda().to(dtype).requires_grad_()
        result = o(leaf)
        results.append((result.loss, torch.autograd.grad(result.loss, leaf)[0]))
    (truth, coef), (baseline, base_coef) = results
    first = _triton.objective(o, logp.cuda())
    again = _triton.objective(o, logp.cuda())
    assert_no_worse(first[0].loss, baseline, truth, name="loss")
    assert_no_worse(first[1], base_coef, coef, name="d loss / d logp")
    assert torch.equal(first[1], again[1])
