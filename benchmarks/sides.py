"""Who is measured: ours and the peers, each a function from a problem to (values, loss), with its floor in U.

U = 2 N H V flops, one matmul of hidden and weight. The floor is what the side's design has to multiply: the forward,
and what its backward adds for a frozen and for a trained head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import BETA, GRADS, Outcome, Problem
from benchmarks.peers import cce, liger, pytorch, quack, trl
from mmrlhf.ops import fused_preference_loss, linear_logp

Run = Callable[[Problem, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Side:
    name: str
    run: Run  # (problem, hidden, weight) -> (values, loss)
    floor: tuple[int, int, int]  # U: no gradients, frozen head, trained head
    missing: Callable[[], str | None] = lambda: None
    slow: bool = False  # compiles for tens of seconds: with --full, or by name
    trained_only: bool = False  # elsewhere the same as another side

    def floor_of(self, problem: Problem) -> int:
        return self.floor[GRADS.index(problem.case.grads)]

    def step(self, problem: Problem) -> Callable[[], Outcome]:
        """Forward and backward on fresh leaves; each call makes its gradients anew."""
        grads = problem.case.grads
        hidden = problem.hidden.detach().clone().requires_grad_(grads != "none")
        weight = problem.weight.detach().requires_grad_(grads == "trained")

        def step() -> Outcome:
            hidden.grad = weight.grad = None
            values, loss = self.run(problem, hidden, weight)
            if grads == "none":
                return Outcome(values)
            loss.backward()
            of_weight = None if weight.grad is None else weight.grad[problem.columns]
            assert hidden.grad is not None
            return Outcome(values.detach(), hidden.grad[problem.rows], of_weight)

        return step


def by_logp(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """A side that gives log-probabilities; the rest of the task is plain PyTorch on a short vector."""
    return lambda problem, hidden, weight: problem.finish(function(hidden, weight, problem.targets))


def _ours(**options) -> Run:
    return by_logp(lambda hidden, weight, targets: linear_logp(hidden, weight, targets, **options))


def _ours_fused(**options) -> Run:
    def run(problem: Problem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        tensors = (hidden, weight, problem.targets, problem.cu_seqlens, problem.pairs)
        reference = torch.zeros(problem.responses, device=hidden.device)
        out = fused_preference_loss(*tensors, beta=BETA, reference_scores=reference, **options)
        return out.scores, out.loss

    return run


def _liger(*, compiled: bool) -> Run:
    def run(problem: Problem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        responses = problem.responses
        return liger.dpo(hidden, weight, problem.targets, responses=responses, beta=BETA, compiled=compiled)

    return run


def by_mean_nll(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Run:
    """A side that gives the mean loss alone."""

    def run(problem: Problem, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss = function(hidden, weight, problem.targets)
        return loss, loss

    return run


def _cce(impl: str) -> Run:
    return by_logp(functools.partial(cce.logp, impl=impl))


PYTORCH = Side("pytorch", by_logp(pytorch.logp), (1, 2, 3))
TRL = Side("trl", by_logp(trl.chunked_logp), (1, 3, 4), trl.missing)
LIGER_SCALED = Side("liger-scaled", by_logp(liger.scaled_logp), (1, 4, 4), liger.missing_scaled)
CCE = tuple(Side(impl, _cce(impl), (1, 3, 4), cce.missing_kernels) for impl in ("cce", "cce_exact"))
CCE_COMPILED = Side("cce-compiled", _cce("torch_compile"), (1, 2, 3), cce.missing, slow=True)
OURS = Side("mmrlhf", _ours(), (1, 2, 3))
FUSED = Side("mmrlhf", _ours_fused(), (1, 2, 3))
# The first side of a task is what the gate compares with.
SIDES: dict[str, tuple[Side, ...]] = {
    "linear_logp": (
        PYTORCH,
        OURS,
        Side("mmrlhf-torch", _ours(backend="torch"), (1, 2, 3)),
        Side("mmrlhf-recompute", _ours(memory_budget=0), (1, 2, 4), trained_only=True),
        TRL,
        LIGER_SCALED,
        *CCE,
        CCE_COMPILED,
    ),
    "fused_preference_loss": (
        PYTORCH,
        FUSED,
        Side("mmrlhf-torch", _ours_fused(backend="torch"), (1, 2, 3)),
        Side("mmrlhf-recompute", _ours_fused(memory_budget=0), (1, 2, 4), trained_only=True),
        replace(TRL, name="trl-logp"),
        Side("liger-eager", _liger(compiled=False), (1, 2, 3), liger.missing),
        Side("liger", _liger(compiled=True), (1, 2, 3), liger.missing, slow=True),
    ),
    "mean_nll": (
        PYTORCH,
        OURS,
        Side("torch-chunked", by_mean_nll(pytorch.mean_nll), (1, 2, 3), pytorch.missing_mean_nll),
        Side("quack", by_mean_nll(quack.mean_nll), (1, 2, 3), quack.missing),
    ),
}


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    peers = {"trl": trl, "liger-kernel": liger, "cut-cross-entropy": cce, "quack-kernels": quack}
    return {name: peer.version() for name, peer in peers.items() if peer.missing() is None}
