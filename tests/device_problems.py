"""Problems on a CUDA device and what is asked of an engine there (triton's and cuda's), the same of both.

An engine is a module with `forward`, `weight_grad`, `objective` and `Kept`.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mmrlhf.ops import reference
from mmrlhf.ops.loss_kinds import LOSSES
from numerics import HeadProblem, assert_no_worse, gradients, plain_logp


def on_device(n, h, v, dtype=torch.bfloat16, **options) -> HeadProblem:
    problem = HeadProblem.random(n, h, v, dtype=dtype, **options)
    for name in ("hidden", "weight", "targets", "bias"):
        value = getattr(problem, name)
        setattr(problem, name, None if value is None else value.cuda())
    return problem


def both(problem: HeadProblem) -> tuple[Tensor, Tensor]:
    """Log-probabilities in float64, and PyTorch's in the problem's dtype. [N] each"""
    arguments = {"bias": problem.bias, **problem.options}
    doubles = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    return truth, plain_logp(problem.hidden, problem.weight, problem.targets, **arguments)


def check_every_gradient(engine: ModuleType, problem: HeadProblem, *, keep: bool, sum_dtype: torch.dtype) -> Tensor:
    """Log-probabilities and the gradients of hidden, weight and bias; returns the true log-probabilities. `sum_dtype`:
    of the dW that the engine writes."""
    rows_dtype, count = problem.weight.dtype, problem.hidden.shape[0]
    upstream = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(problem.hidden.device)
    expected = []
    for dtype, how in ((torch.float64, reference.linear_logp), (rows_dtype, plain_logp)):
        expected.append(gradients(how, problem.leaves(dtype), problem.targets, upstream, **problem.options))
    (truth, true_grads), (baseline, base_grads) = expected
    head = problem.head()
    kept = engine.Kept.empty(count, head) if keep else None
    rows, unit = engine.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
    weight, bias = (
        torch.empty_like(problem.weight, dtype=sum_dtype),
        torch.empty_like(problem.bias, dtype=torch.float32),
    )
    engine.weight_grad(head, problem.hidden, rows, upstream, grad_weight=weight, grad_bias=bias, keep=kept)
    assert_no_worse(rows.logp(), baseline, truth, name="logp")
    ours = {"hidden": unit * upstream[:, None], "weight": weight, "bias": bias}
    for name, grad in ours.items():
        assert_no_worse(grad.to(rows_dtype), base_grads[name], true_grads[name], name=name)
    return truth


def check_offsets_beyond_32_bits(engine: ModuleType) -> None:
    """15,000 rows of 151,646 exponentials kept: 2.3e9 of them. The last rows equal those rows alone."""
    problem = on_device(15_000, 128, 151_646)
    head = problem.head()
    kept = engine.Kept.empty(15_000, head)
    rows, _ = engine.forward(head, problem.hidden, problem.targets, keep=kept)
    last = slice(14_900, 15_000)
    alone, _ = engine.forward(head, problem.hidden[last].clone(), problem.targets[last].clone())
    assert torch.allclose(rows.logp()[last], alone.logp(), rtol=1e-5)
    total = kept.matrix[-1].float().sum()
    assert torch.allclose(total, torch.zeros((), device="cuda"), atol=0.02 * float(rows.rest[-1]))


def objective(kind: str, groups: int = 16, device: str = "cuda") -> tuple[reference.Objective, Tensor]:
    """Groups of 4 responses of 0 to 299 tokens, all pairs; and log-probabilities."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 300, (4 * groups,), generator=g)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logp, weight = -torch.rand(int(ends[-1]), generator=g), torch.rand(int(ends[-1]), generator=g)
    pairs = torch.tensor([(4 * q + i, 4 * q + j) for q in range(groups) for i in range(4) for j in range(i + 1, 4)])
    return reference.Objective(
        ends.to(device),
        pairs.to(device),
        token_weight=weight.to(device),
        reduction="mean",
        reference_scores=torch.randn(4 * groups, generator=g).to(device) if LOSSES[kind].reference else None,
        beta=0.1,
        kind=kind,
        label_smoothing=1e-2 if kind == "exo_pair" else 0.0,
        sft_weight=0.25,
    ), logp.to(device)


def check_objective(engine: ModuleType, o: reference.Objective, logp: Tensor) -> None:
    """The loss and d loss / d logp, no further from float64 than autograd in float32; twice the same bits."""
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = logp.to(dtype).requires_grad_()
        result = o(leaf)
        results.append((result.loss, torch.autograd.grad(result.loss, leaf)[0]))
    (truth, coef), (baseline, base_coef) = results
    first, again = engine.objective(o, logp), engine.objective(o, logp)
    assert_no_worse(first[0].loss, baseline, truth, name="loss")
    assert_no_worse(first[1], base_coef, coef, name="d loss / d logp")
    assert torch.equal(first[1], again[1])
