"""linear_logp and fused_preference_loss, forward and backward, in units of U: one matmul of hidden and lm_head.

    pytest benchmarks/test_linear_logp.py                         a small head, seconds
    MMRLHF_BENCH=full pytest benchmarks/test_linear_logp.py       Qwen2-0.5B's head: H 896, V 151,936, 512 rows

The floor is the flops: 1 U without gradients, 2 U with a frozen head, 3 U with a trained one (4 U where the
exponentials do not fit the budget). U is measured before every round of every case, and `units` is the fastest round
over the fastest U, so that other load on the machine, which is there for both, weighs little. No case is timed before
its values and gradients pass the numeric gate against float64 (all rows; 64 rows of dW).
Not covered: memory, half precision, other devices.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmrlhf.batch import cumulative
from mmrlhf.ops import fused_preference_loss, linear_logp
from numerics import assert_no_worse

SIZES = {"small": (256, 256, 16_000), "full": (512, 896, 151_936)}
ROUNDS = {"small": 10, "full": 5}
SIZE = os.environ.get("MMRLHF_BENCH", "small")


@dataclass
class Problem:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    upstream: Tensor  # [N]
    sampled: Tensor  # [64] rows of dW that are checked

    def truth(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """logp [N], dX [N, H] and the sampled rows of dW, by the plain formulas, 32 rows of logits at a time."""
        weight = self.weight.to(dtype)
        logp, grads, sampled = [], [], torch.zeros(64, weight.shape[1], dtype=dtype)
        for at in range(0, self.hidden.shape[0], 32):
            h, y = self.hidden[at : at + 32].to(dtype), self.targets[at : at + 32]
            table = (h @ weight.T).log_softmax(-1)
            logp.append(table.gather(1, y[:, None])[:, 0])
            slope = table.exp_().neg_()
            slope[torch.arange(len(y)), y] += 1
            slope *= self.upstream[at : at + 32].to(dtype)[:, None]
            grads.append(slope @ weight)
            sampled += slope[:, self.sampled].T @ h
        return torch.cat(logp), torch.cat(grads), sampled


@pytest.fixture(scope="module")
def problem() -> Problem:
    n, h, v = SIZES[SIZE]
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, v, (n,), generator=g)
    return Problem(
        torch.randn(n, h, generator=g),
        torch.randn(v, h, generator=g) * (2.0 / h**0.5),
        targets,
        torch.randn(n, generator=g),
        torch.cat([targets[:32], torch.randint(0, v, (32,), generator=g)]),
    )


@pytest.fixture(scope="module")
def truths(problem):
    return problem.truth(torch.float64), problem.truth(torch.float32)


@pytest.fixture(scope="module")
def unit(problem):
    """Seconds of one U: the matmul into memory that is there already."""
    out = torch.empty(problem.hidden.shape[0], problem.weight.shape[0])

    def seconds() -> float:
        start = time.perf_counter()
        torch.mm(problem.hidden, problem.weight.T, out=out)
        return time.perf_counter() - start

    seconds()
    return seconds


def timed(benchmark, unit, step, floor: float) -> None:
    spent: list[float] = []
    benchmark.pedantic(step, setup=lambda: spent.append(unit()), rounds=ROUNDS[SIZE], iterations=1)
    one = min(spent)
    benchmark.extra_info.update(
        size=SIZE,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        unit_ms=round(one * 1e3, 2),
        units=round(benchmark.stats.stats.min / one, 3),
        floor_units=floor,
    )


def ours(**options):
    return lambda hidden, weight, targets: linear_logp(hidden, weight, targets, **options)


def trl(hidden, weight, targets):
    from benchmarks.peers.trl import chunked_logp

    return chunked_logp(hidden, weight, targets)


def plain(hidden, weight, targets):
    return (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]


SIDES = {"mmrlhf": ours(), "mmrlhf-recompute": ours(memory_budget=0), "trl": trl, "pytorch": plain}
# floors in U: forward alone, frozen head, trained head
FLOORS = {"mmrlhf": (1, 2, 3), "mmrlhf-recompute": (1, 2, 4), "trl": (1, 3, 4), "pytorch": (1, 2, 3)}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head", ["no_grad", "frozen", "trained"])
def test_linear_logp(benchmark, problem, truths, unit, side, head):
    if side == "trl":
        pytest.importorskip("trl", minversion="1.16")
    if side == "mmrlhf-recompute" and head != "trained":
        pytest.skip("the same as mmrlhf: only a trained head keeps or recomputes")
    function, trained = SIDES[side], head == "trained"
    hidden = problem.hidden.clone().requires_grad_(head != "no_grad")
    weight = problem.weight.clone().requires_grad_(trained)

    def step():
        hidden.grad = weight.grad = None
        logp = function(hidden, weight, problem.targets)
        if head != "no_grad":
            logp.backward(problem.upstream)
        return logp

    (logp, grad, sampled), (base_logp, base_grad, base_sampled) = truths
    assert_no_worse(step(), base_logp, logp, name="logp")
    if head != "no_grad":
        assert_no_worse(hidden.grad, base_grad, grad, name="grad of hidden")
    if trained:
        assert_no_worse(weight.grad[problem.sampled], base_sampled, sampled, name="grad of weight")
    timed(benchmark, unit, step, FLOORS[side][("no_grad", "frozen", "trained").index(head)])


@pytest.mark.parametrize("budget", [None, 0.3, 0.0], ids=["kept", "four chunks", "recomputed"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_fused_preference_loss(benchmark, problem, truths, unit, head, budget):
    """Eight pairs, one after another; four chunks of two pairs keep 30% of the exponentials at a time."""
    if head == "frozen" and budget is not None:
        pytest.skip("a frozen head keeps nothing")
    n, v = problem.hidden.shape[0], problem.weight.shape[0]
    lengths = [n // 16] * 16
    pairs = torch.arange(16).view(8, 2)
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_(head == "trained")
    limit = None if budget is None else int(budget * 4 * n * v)

    def step():
        hidden.grad = weight.grad = None
        out = fused_preference_loss(
            hidden,
            weight,
            problem.targets,
            cumulative(lengths),
            pairs,
            reference_scores=torch.zeros(16),
            memory_budget=limit,
        )
        out.loss.backward()
        return out

    out = step()
    (logp, grad, _), (base_logp, base_grad, _) = truths
    assert_no_worse(out.logp, base_logp, logp, name="logp")
    # One coefficient a response scales the rows: the gate's gradients have the upstream of each row divided out.
    scores = logp.view(16, -1).sum(1).requires_grad_()
    torch.nn.functional.logsigmoid(0.1 * (scores[0::2] - scores[1::2])).mean().neg().backward()
    coef = scores.grad.repeat_interleave(n // 16) / problem.upstream.double()
    base_coef = coef.float()[:, None]
    assert_no_worse(hidden.grad, base_grad * base_coef, grad * coef[:, None], name="grad of hidden")
    if head == "trained":
        assert weight.grad.isfinite().all()
    timed(benchmark, unit, step, 2 if head == "frozen" else 4 if budget == 0.0 else 3)
