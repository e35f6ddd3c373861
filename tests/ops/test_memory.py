"""What the head's ops allocate, and that saving it costs no exactness. Every tensor that PyTorch makes is seen."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmrlhf.ops import LoraAdapter, fused_preference_loss, linear_logp, streaming
from numerics import HeadProblem

pytestmark = pytest.mark.usefixtures("head_backend")

V, H, N = 20_000, 512, 16
CU, PAIRS = torch.tensor([0, 5, 10, 16]), torch.tensor([[0, 1], [2, 1]])


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that was made inside; what was there before does not count."""

    def __init__(self, *before: torch.Tensor):
        super().__init__()
        self.before, self.bytes = {each.untyped_storage().data_ptr() for each in before}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.before:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


def test_an_adapter_makes_nothing_as_large_as_the_weight():
    """Frozen head, trained a and b: no merged weight, no [V, H] gradient; the largest are tiles and kept exponentials
    (4 N V bytes = 1.3 MB; a tile is 2 MB; the weight is 41 MB)."""
    weight, b = torch.randn(V, H) / H**0.5, torch.randn(V, 4).requires_grad_()
    hidden, a = torch.randn(N, H, requires_grad=True), torch.randn(4, H, requires_grad=True)
    with Largest(weight) as largest:
        linear_logp(hidden, weight, torch.arange(N), adapter=LoraAdapter(a, b)).sum().backward()
    assert all(leaf.grad is not None for leaf in (hidden, a, b))
    assert largest.bytes <= 4 << 20


def loss(op, hidden, weight, targets, budget):
    if op == "linear_logp":
        upstream = torch.linspace(-1, 2, N)
        return (linear_logp(hidden, weight, targets, memory_budget=budget) * upstream).sum()
    scores = torch.full((3,), -40.0)
    return fused_preference_loss(hidden, weight, targets, CU, PAIRS, reference_scores=scores, memory_budget=budget).loss


@pytest.mark.parametrize("op", ["linear_logp", "fused"])
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("far", [False, True], ids=["calm", "done again"])
def test_half_precision_weight_gradient(op, budget, far):
    """dW of a bfloat16 head is summed in float32 a block at a time and rounded once, bitwise as if it had been float32
    whole; that float32 matrix (4 V H bytes, 2.2 GB of a 152k x 3584 head) is not made.

    Rows done again where E is made again are added apart, and need it; so does a loss that is cut into chunks."""
    problem = HeadProblem.random(N, H, V, dtype=torch.bfloat16)
    if far:
        problem.hidden[3] *= 60
        problem.targets[3] = (problem.hidden[3].float() @ problem.weight.float().T).argmin()
    wide = problem.hidden.float(), problem.weight.float().requires_grad_()  # the values are the same numbers
    loss(op, *wide, problem.targets, 4 * N * V if budget is None else budget).backward()
    leaves = problem.leaves()
    with Largest(leaves["weight"]) as largest:
        loss(op, leaves["hidden"], leaves["weight"], problem.targets, budget).backward()
    assert leaves["weight"].grad.dtype == torch.bfloat16
    assert torch.equal(leaves["weight"].grad, wide[1].grad.bfloat16())
    if not (far and budget == 0):
        assert largest.bytes == 2 * V * H
    assert streaming.pick(N, V).columns < V  # several blocks


def test_blocks_of_several_row_tiles():
    """Without kept exponentials a block of dW is whole only after the last tile of rows (512 each)."""
    rows = 700
    problem = HeadProblem.random(rows, 24, 5000, dtype=torch.bfloat16)
    wide = problem.leaves(torch.float32)
    upstream = torch.linspace(-1, 2, rows)
    (linear_logp(wide["hidden"], wide["weight"], problem.targets, memory_budget=0) * upstream).sum().backward()
    leaves = problem.leaves()
    (linear_logp(leaves["hidden"], leaves["weight"], problem.targets, memory_budget=0) * upstream).sum().backward()
    assert torch.equal(leaves["weight"].grad, wide["weight"].grad.bfloat16())
