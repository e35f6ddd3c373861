"""LoRA on the lm_head against float64 truth: values and the gradients of hidden, weight, bias, a and b, in any subset.

PyTorch's own path, the baseline, is what PEFT runs: base(h) + scale * b(a(h)), then log_softmax in float32. The truth
is that of `ops.reference` in float64, or, in one test, of a weight with the adapter merged into it.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from mmrlhf.losses import LinearLogp, PreferenceLoss
from mmrlhf.ops import LoraAdapter, fused_preference_loss, linear_logp, reference
from numerics import HeadProblem, assert_no_worse

pytestmark = pytest.mark.usefixtures("head_backend")

RANK = 5
NAMES = ("hidden", "weight", "bias", "a", "b")
CU = torch.tensor([0, 9, 14, 21, 21, 33, 34, 47])
PAIRS = torch.tensor([[1, 0], [2, 4], [5, 2], [4, 5]])
CHUNKED = 20 * 4 * 1301  # bytes: whole groups in three chunks, of which the first two keep their exponentials


def tensors(problem: HeadProblem, dtype=torch.float32, *, train=NAMES, rank=RANK) -> dict[str, torch.Tensor]:
    """Hidden, weight, bias, a and b, fresh; b is not zero, as it is when training starts, for a to have a gradient."""
    g = torch.Generator().manual_seed(11)
    a = torch.randn(rank, problem.hidden.shape[1], generator=g) / problem.hidden.shape[1] ** 0.5
    b = 0.3 * torch.randn(problem.weight.shape[0], rank, generator=g)
    given = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias, "a": a, "b": b}
    low = problem.weight.dtype  # as the head, so that the baseline is all in one dtype
    return {
        name: value.to(low).detach().clone().to(dtype).requires_grad_(name in train)
        for name, value in given.items()
        if value is not None
    }


def plain_logp(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, adapter=None):
    linear = torch.nn.functional.linear
    logits = linear(hidden, weight) + linear(linear(hidden, adapter.a), adapter.b) * adapter.scale
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32)) * logit_scale
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets.long()[:, None])[:, 0]


def run(function, problem, given, upstream, **ours):
    adapter = LoraAdapter(given["a"], given["b"], 1.5)
    bias = {"bias": given["bias"]} if "bias" in given else {}
    logp = function(
        given["hidden"], given["weight"], problem.targets, **bias, **problem.options, adapter=adapter, **ours
    )
    logp.backward(upstream.to(logp.dtype))
    return logp, {name: value.grad for name, value in given.items()}


def check(problem, *, train=NAMES, **ours):
    upstream = torch.randn(problem.targets.shape, generator=torch.Generator().manual_seed(7))
    low = problem.weight.dtype
    truth, true = run(reference.linear_logp, problem, tensors(problem, torch.float64, train=train), upstream)
    base, plain = run(plain_logp, problem, tensors(problem, low, train=train), upstream)
    out, grads = run(linear_logp, problem, tensors(problem, low, train=train), upstream, **ours)
    assert_no_worse(out, base, truth, name="logp")
    for name, grad in grads.items():
        assert (grad is not None) == (name in train)
        if grad is not None:
            assert grad.dtype == low
            assert_no_worse(grad, plain[name], true[name], name=f"grad of {name}")
    return out


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "train", [subset for size in range(1, 6) for subset in itertools.combinations(NAMES, size)], ids="+".join
)
def test_gradients_of_every_subset(train, budget):
    check(HeadProblem.random(23, 11, 501, bias=True, logit_scale=0.7), train=train, memory_budget=budget)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head_backend", ["triton"], indirect=True)
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "train", [*((name,) for name in NAMES), ("hidden", "a"), ("weight", "b"), ("bias", "a", "b"), NAMES], ids="+".join
)
def test_gradients_of_subsets_in_triton(train, budget):
    """Each alone, each of the rows' two with and without the head's, and all."""
    check(HeadProblem.random(18, 7, 90, bias=True, softcap=9.0), train=train, memory_budget=budget)


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 6.0, "logit_scale": 1.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 8, 13), (37, 19, 2301)], ids=str)
def test_shapes(shape, options, budget):
    """No row and a single one; V of one and of several blocks. Several tiles of rows: every other test here."""
    train = tuple(name for name in NAMES if name != "bias" or "bias" in options)
    check(HeadProblem.random(*shape, **options), train=train, memory_budget=budget)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precisions(dtype, budget):
    check(HeadProblem.random(64, 48, 3001, dtype=dtype, bias=True, softcap=20.0), memory_budget=budget)


def test_a_float32_adapter_on_a_bfloat16_head():
    """What PEFT makes of a bfloat16 model; its gradients stay float32."""
    problem = HeadProblem.random(33, 64, 700, dtype=torch.bfloat16)
    upstream = torch.linspace(-1, 2, 33)

    def given(head, adapter):
        made = tensors(problem, head, train=("hidden", "a", "b"))
        return made | {name: made[name].detach().to(adapter).requires_grad_() for name in ("a", "b")}

    truth, true = run(reference.linear_logp, problem, given(torch.float64, torch.float64), upstream)
    base, plain = run(plain_logp, problem, given(torch.bfloat16, torch.bfloat16), upstream)
    out, grads = run(linear_logp, problem, given(torch.bfloat16, torch.float32), upstream)
    assert_no_worse(out, base, truth)
    assert (out - truth).abs().max() < 2e-5  # the logits are float32, the adapter's part included
    for name in ("hidden", "a", "b"):
        assert grads[name].dtype == (torch.bfloat16 if name == "hidden" else torch.float32)
        assert_no_worse(grads[name], plain[name], true[name], name=name)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("softcap", [None, 500.0])
@pytest.mark.parametrize("far", [[3, 17], [*range(11), 17]], ids=["two rows", "more than a tile"])
def test_rows_done_again(softcap, budget, far):
    """logp < -100 nats because of the adapter too: the rows' true maximum is that of head and adapter together."""
    problem = HeadProblem.random(40, 16, 3000, softcap=softcap)
    problem.hidden[far] *= 150
    given = tensors(problem)
    merged = given["weight"].detach() + 1.5 * given["b"].detach() @ given["a"].detach()
    problem.targets[far] = (problem.hidden[far] @ merged.T).argmin(-1)
    out = check(problem, train=("hidden", "weight", "a", "b"), memory_budget=budget)
    assert (out[far] < -100).all()


def test_ignored_rows_and_a_nonfinite_one():
    """An ignored row reaches nothing, the gradient of a included, be it not finite."""
    problem = HeadProblem.random(12, 8, 31)
    given = tensors(problem, train=("hidden", "a", "b"))
    counted = torch.tensor([0, 1, 3, 4, 6, 7, 8, 9, 10, 11])
    few = {name: value[counted] if name == "hidden" else value for name, value in tensors(problem).items()}
    few = {name: value.detach().requires_grad_() for name, value in few.items()}
    targets = problem.targets.clone()
    targets[[2, 5]] = -100
    with torch.no_grad():
        given["hidden"][5] = float("nan")
    logp = linear_logp(given["hidden"], given["weight"], targets, adapter=LoraAdapter(given["a"], given["b"]))
    logp.square().sum().backward()
    want = linear_logp(few["hidden"], few["weight"], targets[counted], adapter=LoraAdapter(few["a"], few["b"]))
    want.square().sum().backward()
    assert torch.equal(logp[counted], want)
    assert (logp[[2, 5]] == 0).all()
    assert torch.equal(given["hidden"].grad[counted], few["hidden"].grad)
    assert (given["hidden"].grad[[2, 5]] == 0).all()
    for name in ("a", "b"):
        assert torch.equal(given[name].grad, few[name].grad)


def fused_settings(dtype=torch.float32):
    g = torch.Generator().manual_seed(5)
    return {
        "token_weight": (1 + 4 * (torch.rand(47, generator=g) > 0.7).float()).to(dtype),
        "reference_scores": (torch.randn(7, generator=g) - 40).to(dtype),
        "beta": 0.3,
        "sft_weight": 0.25,
    }


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("budget", [None, CHUNKED, 0], ids=["kept", "chunks", "recomputed"])
@pytest.mark.parametrize(
    "train", [NAMES, ("hidden", "a", "b"), ("a",), ("b",), ("hidden",), ("weight", "a")], ids="+".join
)
def test_fused(train, budget):
    problem = HeadProblem.random(47, 24, 1301, bias=True, seed=3, logit_scale=0.8)

    def loss_of(function, dtype=torch.float32, **ours):
        given = tensors(problem, dtype, train=train)
        adapter, head = LoraAdapter(given["a"], given["b"], 0.5), {"bias": given["bias"], **problem.options}
        settings = fused_settings(dtype)
        if function is plain_logp:
            logp = plain_logp(given["hidden"], given["weight"], problem.targets, **head, adapter=adapter)
            out = reference.Objective(CU, PAIRS, **settings)(logp)
        else:
            arguments = (given["hidden"], given["weight"], problem.targets, CU, PAIRS)
            out = function(*arguments, **head, adapter=adapter, **settings, **ours)
        (out.loss * 0.7).backward()
        return out, {name: given[name].grad for name in given}

    truth, true = loss_of(reference.fused_preference_loss, torch.float64)
    base, plain = loss_of(plain_logp)
    out, grads = loss_of(fused_preference_loss, memory_budget=budget)
    assert_no_worse(out.logp, base.logp, truth.logp, name="logp")
    assert_no_worse(out.loss, base.loss, truth.loss, name="loss")
    for name, grad in grads.items():
        assert (grad is not None) == (name in train)
        if grad is not None:
            assert_no_worse(grad, plain[name], true[name], name=f"grad of {name}")


def test_it_is_the_merged_weight_and_two_are_their_sum():
    problem = HeadProblem.random(30, 16, 401)
    given = tensors(problem, torch.float64)
    one = LoraAdapter(given["a"].float(), given["b"].float(), 0.5)
    two = LoraAdapter(torch.randn(2, 16), torch.randn(401, 2), -1.25)
    merged = problem.weight.double() + sum(each.scale * each.b.double() @ each.a.double() for each in (one, two))
    truth = reference.linear_logp(problem.hidden.double(), merged, problem.targets)
    base = torch.nn.functional.linear(problem.hidden, merged.float()).log_softmax(-1)
    base = base.gather(-1, problem.targets[:, None])[:, 0]
    out = linear_logp(problem.hidden, problem.weight, problem.targets, adapter=[one, two])
    assert_no_worse(out, base, truth)
    doubles = [LoraAdapter(each.a.double(), each.b.double(), each.scale) for each in (one, two)]
    composed = linear_logp(
        problem.hidden.double(), problem.weight.double(), problem.targets, adapter=doubles, backend="reference"
    )
    torch.testing.assert_close(composed, truth)
    plain = linear_logp(problem.hidden, problem.weight, problem.targets)
    assert torch.equal(linear_logp(problem.hidden, problem.weight, problem.targets, adapter=[]), plain)


def test_drop_in_modules_take_it():
    problem = HeadProblem.random(47, 24, 301)
    given = tensors(problem)
    adapter = LoraAdapter(given["a"], given["b"], 0.5)
    arguments = (given["hidden"], given["weight"], problem.targets)
    assert torch.equal(LinearLogp()(*arguments, adapter=adapter), linear_logp(*arguments, adapter=adapter))
    settings = {"reference_scores": fused_settings()["reference_scores"]}
    module = PreferenceLoss(beta=0.3)(*arguments, CU, PAIRS, adapter=adapter, **settings)
    assert torch.equal(
        module.loss, fused_preference_loss(*arguments, CU, PAIRS, adapter=adapter, beta=0.3, **settings).loss
    )


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_compiled_whole(budget):
    """torch.compile holds it in one graph: the rank-r rows in plain PyTorch, the rest in the registered ops."""
    torch._dynamo.reset()
    problem = HeadProblem.random(21, 16, 301, bias=True, softcap=9.0)
    upstream = torch.linspace(-1, 2, 21)
    function = torch.compile(linear_logp, fullgraph=True, backend="aot_eager")
    out, grads = run(function, problem, tensors(problem), upstream, memory_budget=budget)
    want, true = run(linear_logp, problem, tensors(problem), upstream, memory_budget=budget)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grads, true)


def test_meta_tensors_give_a_shape():
    def empty(*shape, **options):
        return torch.empty(shape, device="meta", **options)

    adapter = LoraAdapter(empty(2, 8), empty(11, 2))
    logp = linear_logp(empty(2, 3, 8), empty(11, 8), empty(2, 3, dtype=torch.int64), adapter=adapter, backend="torch")
    assert (logp.shape, logp.dtype) == ((2, 3), torch.float32)


def test_autocast_leaves_the_adapter_in_float32():
    problem = HeadProblem.random(9, 8, 31)
    given = tensors(problem)
    adapter = LoraAdapter(given["a"], given["b"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_logp(given["hidden"], given["weight"], problem.targets, adapter=adapter)
    halves = (given["hidden"].bfloat16(), given["weight"].bfloat16(), problem.targets)
    assert torch.equal(got, linear_logp(*halves, adapter=adapter))


BAD = [
    ({"a": torch.zeros(3, 9)}, ValueError, r"adapter.a must have shape \[r, H\] with H = 8"),
    ({"a": torch.zeros(0, 8)}, ValueError, r"adapter.a must have shape \[r, H\]"),
    ({"b": torch.zeros(30, 3)}, ValueError, r"adapter.b must have shape \[31, 3\]"),
    ({"b": torch.zeros(31, 2)}, ValueError, r"adapter.b must have shape \[31, 3\]"),
    ({"a": torch.zeros(3, 8, dtype=torch.int64)}, TypeError, "adapter.a must be float32"),
    ({"b": None}, TypeError, "adapter.b must be a tensor"),
    ({"b": torch.zeros(31, 3, device="meta")}, ValueError, "adapter.b is on meta"),
    ({"scale": float("nan")}, ValueError, "adapter.scale must be a finite number"),
    ({"scale": "2"}, ValueError, "adapter.scale must be a finite number"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=str)
def test_bad_arguments(change, error, message):
    adapter = LoraAdapter(**({"a": torch.zeros(3, 8), "b": torch.zeros(31, 3)} | change))
    with pytest.raises(error, match=message):
        linear_logp(torch.zeros(4, 8), torch.zeros(31, 8), torch.zeros(4, dtype=torch.int64), adapter=adapter)
    with pytest.raises(TypeError, match="adapter must be a LoraAdapter, or several, got Tensor"):
        linear_logp(
            torch.zeros(4, 8), torch.zeros(31, 8), torch.zeros(4, dtype=torch.int64), adapter=[torch.zeros(3, 8)]
        )
