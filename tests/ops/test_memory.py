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


@pytest.mark.usefixtures("small_tiles")
def test_blocks_of_several_row_tiles():
    """Without kept exponentials a block of dW is whole, and rounded, only after the last tile of rows."""
    rows = 45
    problem = HeadProblem.random(rows, 24, 700, dtype=torch.bfloat16)
    wide = problem.leaves(torch.float32)
    upstream = torch.linspace(-1, 2, rows)
    (linear_logp(wide["hidden"], wide["weight"], problem.targets, memory_budget=0) * upstream).sum().backward()
    leaves = problem.leaves()
    (linear_logp(leaves["hidden"], leaves["weight"], problem.targets, memory_budget=0) * upstream).sum().backward()
    assert torch.equal(leaves["weight"].grad, wide["weight"].grad.bfloat16())


class Copies(TorchDispatchMode):
    """Names of the operators that wrote hidden, or a copy of it, once more; not the float64 of the targets' logits."""

    NAMES = ("clone", "_to_copy", "index", "index_select", "where")

    def __init__(self, hidden: torch.Tensor):
        super().__init__()
        self.known, self.made = [hidden], []  # kept, so that no address is used again

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, known = func.overloadpacket.__name__, {each.untyped_storage().data_ptr() for each in self.known}
        given = [each for each in args if isinstance(each, torch.Tensor) and each.is_floating_point()]
        written = name in self.NAMES and out.dtype != torch.float64
        if written and any(each.untyped_storage().data_ptr() in known for each in given):
            self.known.append(out)
            self.made.append(name)
        return out


@pytest.mark.parametrize(
    ("dtype", "shifted", "ignored", "expected"),
    [
        (torch.float32, False, False, []),
        (torch.float32, False, True, ["index"]),
        (torch.float32, True, False, ["clone"]),
        (torch.float32, True, True, ["index"]),
        (torch.bfloat16, False, False, ["_to_copy"]),
        (torch.bfloat16, True, True, ["index", "_to_copy"]),
    ],
    ids=["plain", "ignored", "shifted", "shifted and ignored", "half", "half, shifted and ignored"],
)
def test_hidden_is_copied_where_it_has_to_be(dtype, shifted, ignored, expected):
    """The gaps of hidden[:, :-1] are closed, and rows that do not count left out, in one copy; half precision is raised
    once a pass. Values and gradients are those of the rows that count, alone."""
    problem = HeadProblem.random(24, 16, 300, dtype=dtype)
    whole, targets = problem.hidden.view(3, 8, 16).requires_grad_(), problem.targets.view(3, 8).clone()
    if ignored:
        targets[1, 2:5] = -100
    hidden, targets = (whole[:, :-1], targets[:, 1:]) if shifted else (whole, targets)
    with Copies(hidden.detach()) as copies:
        logp = linear_logp(hidden, problem.weight, targets)
    assert copies.made == expected
    counts = targets != -100
    alone = hidden[counts].detach().requires_grad_()
    own = linear_logp(alone, problem.weight, targets[counts])
    assert torch.equal(logp[counts], own)
    assert (logp[~counts] == 0).all()
    (grad,), (of_alone,) = (torch.autograd.grad(each.sum(), leaf) for each, leaf in ((logp, whole), (own, alone)))
    grad = grad[:, :-1] if shifted else grad
    assert torch.equal(grad[counts], of_alone)
    assert (grad[~counts] == 0).all()


def test_a_single_row_that_does_not_count():
    hidden, weight = torch.randn(16, requires_grad=True), torch.randn(30, 16)
    logp = linear_logp(hidden, weight, torch.tensor(-100))
    assert logp.shape == ()
    assert logp == 0
    logp.backward()
    assert (hidden.grad == 0).all()
