"""The one numeric gate, and the problems it is put to.

    assert_no_worse(out, baseline, truth)     out may be at most twice as far from truth as PyTorch's own path is

`truth` is float64 (ops.reference), `baseline` PyTorch's plain path in the dtype under test. No test has a tolerance of
its own. The floor, one rounding of the largest true value in the dtype of `out`, is for the rare case in which the
baseline happens to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrlhf.ops import linear_logp, reference
from mmrlhf.ops.head import Head


def worst(out: Tensor, truth: Tensor) -> tuple[float, tuple[int, ...]]:
    """Largest absolute error and where it is."""
    error = (out.detach().double() - truth.detach().double()).abs()
    if error.numel() == 0:
        return 0.0, ()
    at = int(torch.where(error.isnan(), torch.inf, error).argmax())
    return float(error.flatten()[at]), tuple(int(i) for i in torch.unravel_index(torch.tensor(at), error.shape))


def assert_no_worse(
    out: Tensor,
    baseline: Tensor,
    truth: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
    name: str = "out",
) -> None:
    """`out` is finite wherever `truth` is, and its largest error is at most factor * the baseline's + floor."""
    assert out.shape == truth.shape, f"{name}: shape {list(out.shape)}, truth {list(truth.shape)}"
    assert truth.dtype == torch.float64, f"{name}: truth must be float64"
    if truth.numel() == 0:
        return
    lost = ~out.detach().isfinite() & truth.isfinite()
    assert not lost.any(), f"{name}: {int(lost.sum())} non-finite entries, the first at {lost.nonzero()[0].tolist()}"
    if floor is None:
        floor = torch.finfo(out.dtype).eps * float(truth.detach().abs().max())
    ours, at = worst(out, truth)
    theirs, their_at = worst(baseline, truth)
    allowed = factor * theirs + floor
    assert ours <= allowed, (
        f"{name}: error {ours:.3e} at {at} ({float(out[at])!r}, truth {float(truth[at])!r}) is more than "
        f"{allowed:.3e} = {factor} x {theirs:.3e} (PyTorch's, at {their_at}) + {floor:.3e}"
    )


@dataclass
class HeadProblem:
    """Hidden rows, a head and targets, in one dtype; `leaves()` makes fresh copies that ask for gradients."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    bias: Tensor | None = None  # [V]
    options: dict = field(default_factory=dict)  # logit_scale, softcap

    @classmethod
    def random(cls, n, h, v, *, dtype=torch.float32, bias=False, seed=0, spread=2.0, **options) -> HeadProblem:
        """Logits with a standard deviation of about `spread`."""
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(n, h, generator=g)
        weight = torch.randn(v, h, generator=g) * (spread / max(h, 1) ** 0.5)
        targets = torch.randint(0, v, (n,), generator=g)
        offset = torch.randn(v, generator=g).to(dtype) if bias else None
        return cls(hidden.to(dtype), weight.to(dtype), targets, offset, options)

    @classmethod
    def unlikely(cls, n, h, v, *, far, factor, **options) -> HeadProblem:
        """Rows of which `far` are scaled up, and whose target is the least likely token."""
        problem = cls.random(n, h, v, seed=2, **options)
        problem.hidden[far] *= factor
        z = problem.hidden @ problem.weight.T * options.get("logit_scale", 1.0)
        problem.targets[:] = (z if problem.bias is None else z + problem.bias).argmin(1)
        return problem

    def head(self) -> Head:
        return Head(self.weight, self.bias, self.options.get("logit_scale", 1.0), self.options.get("softcap"))

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        named = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {k: v.detach().clone().to(dtype or v.dtype).requires_grad_() for k, v in named.items() if v is not None}


def plain_logp(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None):
    """PyTorch's own path in the dtype of its inputs: linear, then log_softmax in float32, then gather."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden, weight).to(dtype) * logit_scale
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets.long()[:, None])[:, 0]


def gradients(function, leaves, targets, upstream, **options):
    logp = function(leaves["hidden"], leaves["weight"], targets, bias=leaves.get("bias"), **options)
    logp.backward(upstream.to(logp.dtype))
    return logp, {name: leaf.grad for name, leaf in leaves.items()}


def check_linear_logp(problem: HeadProblem, upstream=None, **ours):
    """linear_logp against reference in float64 and plain PyTorch, value and gradients."""
    g = torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(7)) if upstream is None else upstream
    truth, true_grads = gradients(
        reference.linear_logp, problem.leaves(torch.float64), problem.targets, g, **problem.options
    )
    base, base_grads = gradients(plain_logp, problem.leaves(), problem.targets, g, **problem.options)
    out, grads = gradients(linear_logp, problem.leaves(), problem.targets, g, **problem.options, **ours)
    assert out.dtype == torch.float32
    assert_no_worse(out, base, truth, name="logp")
    for name, grad in grads.items():
        assert grad.dtype == getattr(problem, name).dtype
        assert_no_worse(grad, base_grads[name], true_grads[name], name=f"grad of {name}")
    return out, grads
