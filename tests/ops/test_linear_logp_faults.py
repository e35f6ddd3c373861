"""linear_logp under the named faults: wrong arguments, strange memory, ignored and non-finite rows, extreme logits."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import LoraAdapter, linear_logp, reference
from numerics import HeadProblem, assert_no_worse, check_linear_logp

pytestmark = [
    pytest.mark.usefixtures("head_backend"),
    pytest.mark.parametrize("head_backend", ["torch", "cpu", "triton"], indirect=True),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, in Triton's interpreter, of the infinities
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden": lambda t: t.double()},
            r"hidden must be float32 or bfloat16 or float16, got float64.*ops.reference",
        ),
        ({"hidden": lambda t: t.int()}, "hidden must be float32 or bfloat16 or float16, got int32"),
        ({"hidden": lambda t: t.tolist()}, "hidden must be a tensor of float32 .* got list"),
        ({"weight": lambda t: t.double()}, "weight must be float32 .*, got float64"),
        ({"weight": lambda t: t.bfloat16()}, "weight is bfloat16 but hidden is float32.*autocast"),
        ({"targets": lambda t: t.float()}, "targets must be int32 or int64, got float32"),
        ({"bias": lambda t: t.long()}, "bias must be float32 .*, got int64"),
    ],
)
def test_k01_wrong_dtype(change, message):
    problem = HeadProblem.random(4, 8, 11, bias=True)
    given = {"hidden": problem.hidden, "weight": problem.weight, "targets": problem.targets, "bias": problem.bias}
    given.update({name: turn(given[name]) for name, turn in change.items()})
    with pytest.raises(TypeError, match=message):
        linear_logp(given["hidden"], given["weight"], given["targets"], bias=given["bias"])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((4, 8), (11, 9), (4,), None),
            r"weight must have shape \[V, H\] with H = 8 of hidden \[4, 8\], got \[11, 9\]",
        ),
        (((4, 8), (8,), (4,), None), r"weight must have shape \[V, H\].*got \[8\]"),
        (((4, 8), (0, 8), (4,), None), "weight must have at least one row"),
        (((4, 8), (11, 8), (5,), None), r"targets must have shape \[4\].*hidden \[4, 8\].*got \[5\]"),
        (((4, 8), (11, 8), (2, 2), None), r"targets must have shape \[4\].*got \[2, 2\]"),
        (((4, 8), (11, 8), (4,), (12,)), r"bias must have shape \[11\].*got \[12\]"),
    ],
)
def test_k02_shape_mismatch(shapes, message):
    hidden, weight, targets, bias = shapes
    with pytest.raises(ValueError, match=message):
        linear_logp(
            torch.zeros(hidden),
            torch.zeros(weight),
            torch.zeros(targets, dtype=torch.int64),
            bias=None if bias is None else torch.zeros(bias),
        )


def test_k04_strided_input():
    problem = HeadProblem.random(12, 10, 301, bias=True)
    expected = linear_logp(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    wide = torch.full((25, 23), float("nan"))
    wide[1::2, 2:22:2] = problem.hidden
    strided = linear_logp(
        wide[1::2, 2:22:2],
        problem.weight.T.contiguous().T,
        problem.targets.repeat_interleave(2)[::2],
        bias=problem.bias.repeat(2)[301:],
    )
    assert torch.equal(strided, expected)
    for budget in (None, 0):  # gradients of a transposed weight and a strided hidden
        whole = problem.leaves()
        storage = whole["weight"].detach().T.contiguous().requires_grad_()
        doubled = whole["hidden"].detach().repeat_interleave(2, 0).requires_grad_()
        for hidden, weight in ((whole["hidden"], whole["weight"]), (doubled[::2], storage.T)):
            linear_logp(hidden, weight, problem.targets, memory_budget=budget).square().sum().backward()
        assert torch.equal(storage.grad.T, whole["weight"].grad)
        assert torch.equal(doubled.grad[::2], whole["hidden"].grad)
    row = problem.hidden[:1].expand(12, 10)  # stride 0
    assert torch.equal(
        linear_logp(row, problem.weight, problem.targets), linear_logp(row.clone(), problem.weight, problem.targets)
    )


@pytest.mark.parametrize("bad", [11, -1, 2**40, -101])
def test_k05_label_out_of_range(bad):
    problem = HeadProblem.random(4, 8, 11)
    problem.targets[2] = bad
    with pytest.raises(
        ValueError, match=rf"targets must be token ids in \[0, 11\) or ignore_index -100; entry 2 is {bad}"
    ):
        linear_logp(problem.hidden, problem.weight, problem.targets)


def test_k06_ignored_rows():
    problem = HeadProblem.random(10, 8, 31)
    problem.targets[[0, 4]] = -100
    problem.hidden[4] = float("nan")  # an ignored row may hold anything
    leaves = problem.leaves()
    logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets)
    logp.sum().backward()
    assert (logp[[0, 4]] == 0).all()
    assert (leaves["hidden"].grad[[0, 4]] == 0).all()
    kept = [i for i in range(10) if i not in (0, 4)]
    again = HeadProblem(problem.hidden[kept], problem.weight, problem.targets[kept]).leaves()
    part = linear_logp(again["hidden"], again["weight"], problem.targets[kept])
    part.sum().backward()
    assert torch.equal(logp[kept], part)
    assert torch.equal(leaves["weight"].grad, again["weight"].grad)
    everything = torch.full((10,), 3)
    out = linear_logp(problem.leaves()["hidden"], problem.weight, everything, ignore_index=3)
    assert (out == 0).all()
    out.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8, 5), (1, 1, 1), (1, 3, 1), (1, 5, 7919)], ids=str)
def test_k07_empty_and_tiny(shape):
    out, grads = check_linear_logp(HeadProblem.random(*shape))
    assert out.shape == shape[:1]
    assert grads["weight"].shape == (shape[2], shape[1])
    if shape[2] == 1:
        assert (out == 0).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_k08_nonfinite_row(poison, head_backend):
    problem = HeadProblem.random(12, 8, 1100 if head_backend == "triton" else 2500)
    clean = problem.leaves()
    expected = linear_logp(clean["hidden"], problem.weight, problem.targets)
    expected.sum().backward()
    problem.hidden[5, 2] = poison
    leaves = problem.leaves()
    logp = linear_logp(leaves["hidden"], problem.weight, problem.targets)
    logp.sum().backward()
    others = [i for i in range(12) if i != 5]
    assert not logp[5].isfinite()
    assert torch.equal(logp[others], expected[others])
    assert torch.equal(leaves["hidden"].grad[others], clean["hidden"].grad[others])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_k08_nonfinite_row_without_upstream_spoils_nothing(compiled):
    """A row that counts, is not finite, and whose log-probability nothing depends on: it has no gradient, and leaves
    none to the others; by way of an adapter's rows neither."""
    torch._dynamo.reset()
    problem = HeadProblem.random(6, 8, 11)
    problem.hidden[2] = float("nan")
    g = torch.Generator().manual_seed(1)
    adapter = LoraAdapter(torch.randn(3, 8, generator=g), torch.randn(11, 3, generator=g))
    function = torch.compile(linear_logp, fullgraph=True, backend="aot_eager") if compiled else linear_logp
    for given in ({"adapter": adapter},) if compiled else ({}, {"adapter": adapter}):
        hidden = problem.hidden.clone().requires_grad_()
        logp = function(hidden, problem.weight, problem.targets, **given)
        assert logp.isnan().tolist() == [False, False, True, False, False, False]
        logp.backward(torch.tensor([1.0, -2.0, 0.0, 3.0, 0.0, 0.5]))
        assert hidden.grad.isfinite().all()
        assert (hidden.grad[[2, 4]] == 0).all()
        assert (hidden.grad[[0, 1, 3, 5]] != 0).any(1).all()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_k09_extreme_logits(dtype, budget, head_backend):
    """Logits of about +-1e4, targets at the top, the bottom and in between."""
    if head_backend == "triton" and dtype != torch.float32:
        pytest.skip("Triton's interpreter takes float32 only; tests/kernels/test_device.py has it in bfloat16")
    problem = HeadProblem.random(24, 16, 1500, dtype=dtype, spread=3000.0)
    logits = problem.hidden.double() @ problem.weight.double().T
    problem.targets[:8], problem.targets[8:16] = logits.argmax(-1)[:8], logits.argmin(-1)[8:16]
    out, _ = check_linear_logp(problem, memory_budget=budget)
    assert out.min() < -1e4


@pytest.mark.usefixtures("small_tiles")
def test_k13_poisoned_empty(head_backend):
    """Memory that torch.empty hands out is full of NaN: nothing of it reaches a result."""
    problem = HeadProblem.random(40, 16, 300 if head_backend == "triton" else 2100, bias=True)
    problem.targets[7] = -100
    with torch.no_grad():
        problem.hidden[3] *= 200
    for budget in (None, 0):
        leaves = problem.leaves()
        torch.use_deterministic_algorithms(True)  # with fill_uninitialized_memory, on by default, fills empty with NaN
        try:
            logp = linear_logp(
                leaves["hidden"], leaves["weight"], problem.targets, bias=leaves["bias"], memory_budget=budget
            )
            logp.sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert logp.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("names", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("budget", [None, 0])
def test_k16_partial_grads(names, budget):
    problem = HeadProblem.random(20, 8, 1100, bias=True)

    def run(wanted):
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in problem.leaves().items()}
        linear_logp(
            *(leaves[k] for k in ("hidden", "weight")), problem.targets, bias=leaves["bias"], memory_budget=budget
        )[:15].square().sum().backward()
        return {k: v.grad for k, v in leaves.items()}

    everything, some = run(("hidden", "weight", "bias")), run(names)
    for name in ("hidden", "weight", "bias"):
        if name in names:
            assert torch.equal(some[name], everything[name])
        else:
            assert some[name] is None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0])
def test_k17_scaled_and_uneven_upstream_gradients(budget):
    """Every row its own upstream gradient, zeros and large ones too (Liger-Kernel #1298 used the first for all)."""
    problem = HeadProblem.random(30, 12, 1300, bias=True)
    upstream = torch.linspace(-3, 4, 30) ** 3
    upstream[::7] = 0
    check_linear_logp(problem, upstream=upstream, memory_budget=budget)
    whole, halves = problem.leaves(), problem.leaves()
    linear_logp(whole["hidden"], whole["weight"], problem.targets).mul(upstream).sum().backward()
    for part in (slice(0, 13), slice(13, 30)):  # accumulation over micro-batches
        logp = linear_logp(halves["hidden"][part], halves["weight"], problem.targets[part])
        (logp * upstream[part]).sum().backward()
    truth = problem.leaves(torch.float64)
    reference.linear_logp(truth["hidden"], truth["weight"], problem.targets).mul(upstream).sum().backward()
    for name in ("hidden", "weight"):
        assert_no_worse(halves[name].grad, whole[name].grad, truth[name].grad, name=name)


def test_k18_double_backward():
    problem = HeadProblem.random(4, 8, 11)
    leaves = problem.leaves()
    logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets)
    with pytest.raises(RuntimeError, match=r"linear_logp has no double backward.*create_graph=True.*reference"):
        torch.autograd.grad(logp.sum(), leaves["hidden"], create_graph=True)
    logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets, backend="reference")
    (first,) = torch.autograd.grad(logp.sum(), leaves["hidden"], create_graph=True)
    first.square().sum().backward()
    assert (leaves["hidden"].grad != 0).any()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0])
def test_k19_backward_twice_and_inputs_intact(budget):
    problem = HeadProblem.random(20, 8, 1100, bias=True)
    problem.hidden[2] *= 300
    leaves = problem.leaves()
    before = {k: v.detach().clone() for k, v in leaves.items()}
    targets = problem.targets.clone()
    logp = linear_logp(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], memory_budget=budget)
    value = logp.detach().clone()
    wanted = list(leaves.values())
    first = torch.autograd.grad(logp.sum(), wanted, retain_graph=True)
    second = torch.autograd.grad(logp.sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())
    assert torch.equal(targets, problem.targets)
    assert torch.equal(logp, value)


def test_k20_modes(head_backend):
    problem = HeadProblem.random(6, 16, 101)
    expected = linear_logp(problem.hidden, problem.weight, problem.targets)
    with torch.inference_mode():
        assert torch.equal(linear_logp(problem.hidden, problem.weight, problem.targets), expected)
    with torch.no_grad():
        leaves = problem.leaves()
        assert not linear_logp(leaves["hidden"], leaves["weight"], problem.targets).requires_grad
    if head_backend == "triton":
        return  # its interpreter takes float32 only, and autocast has none of it
    leaves = problem.leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets)
    logp.sum().backward()
    assert torch.equal(logp, linear_logp(problem.hidden.bfloat16(), problem.weight.bfloat16(), problem.targets))
    assert leaves["hidden"].grad.dtype == leaves["weight"].grad.dtype == torch.float32


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0])
def test_k21_determinism(budget, head_backend):
    problem = HeadProblem.random(*((40, 8, 300) if head_backend == "triton" else (60, 8, 1300)))

    def run():
        leaves = problem.leaves()
        logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets, memory_budget=budget)
        logp.square().sum().backward()
        return logp, leaves["hidden"].grad, leaves["weight"].grad

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale must be finite and positive, got 0.0"),
        ({"logit_scale": float("nan")}, "logit_scale must be finite and positive, got nan"),
        ({"softcap": -1.0}, "softcap must be finite and positive, got -1.0"),
        ({"memory_budget": -1}, "memory_budget must be finite and 0 or more, got -1"),
    ],
)
def test_k11_bad_options(options, message):
    problem = HeadProblem.random(4, 8, 11)
    with pytest.raises(ValueError, match=message):
        linear_logp(problem.hidden, problem.weight, problem.targets, **options)
