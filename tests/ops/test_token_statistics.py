"""token_statistics on every backend against float64: entropy, sum of squares, mean logit, logp and top-1."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mmrlhf.ops import backend as backends
from mmrlhf.ops import linear_logp, reference, streaming
from mmrlhf.ops.token_statistics import token_statistics
from numerics import HeadProblem, assert_no_worse

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter, of infinities
VALUES = ("entropy", "sum_p2", "mean_logit", "logp")


@pytest.fixture(params=["torch", "cpu", "triton"])
def head_backend(request):
    """Forces the backend; triton runs in its interpreter, or not here."""
    row = next(row for row in backends.BACKENDS if row.name == request.param)
    refusal = row.refuse((torch.zeros(1, 1),))
    if refusal is not None:
        pytest.skip(refusal)
    with backends.use_backend(request.param):
        yield request.param


def plain(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None):
    """TRL's way, in the dtype of the inputs with a float32 softmax: all logits, log_softmax, and sums over them."""
    logits = torch.nn.functional.linear(hidden, weight).float() * logit_scale
    logits = logits if bias is None else logits + bias.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = logits.log_softmax(-1)
    p = logp.exp()
    own = logp.gather(1, targets.long()[:, None])[:, 0]
    return (-(p * logp).sum(1), (p * p).sum(1), logits.mean(1), own)


def check(problem: HeadProblem):
    """Every field no further from float64 than twice the plain path; top-1 where it is no tie of a rounding."""
    options = {"bias": problem.bias, **problem.options}
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = reference.token_statistics(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    out = token_statistics(problem.hidden, problem.weight, problem.targets, **options)
    baseline = plain(problem.hidden, problem.weight, problem.targets, **options)
    for name, base in zip(VALUES, baseline, strict=True):
        assert getattr(out, name).dtype == torch.float32
        assert_no_worse(getattr(out, name), base, getattr(truth, name), name=name)
    assert torch.equal(out.is_top1, truth.is_top1)
    assert not any(getattr(out, name).requires_grad for name in VALUES)
    return out, truth


@pytest.mark.parametrize("shape", [(0, 8, 5), (0, 1, 1), (1, 1, 1), (1, 3, 1), (13, 17, 523), (7, 16, 2)], ids=str)
def test_k07_empty_and_tiny(head_backend, shape):
    out, _ = check(HeadProblem.random(*shape))
    assert out.entropy.shape == shape[:1]
    if shape[2] == 1:
        assert (out.entropy == 0).all()
        assert out.is_top1.all()


@pytest.mark.parametrize(
    "options", [{"softcap": 4.0}, {"logit_scale": 0.3, "bias": True}, {"softcap": 30.0, "bias": True}], ids=str
)
def test_softcap_bias_and_scale(head_backend, options):
    check(HeadProblem.random(19, 12, 301, seed=3, **options))


@pytest.mark.parametrize("spread", [0.0, 20.0, 300.0])
def test_flat_and_peaked_rows(head_backend, spread):
    """From uniform (entropy log V) to one token above all others, which is, or is not, the target."""
    problem = HeadProblem.random(24, 16, 301, seed=5, spread=spread)
    logits = problem.hidden.double() @ problem.weight.double().T
    problem.targets[:8], problem.targets[8:16] = logits.argmax(-1)[:8], logits.argmin(-1)[8:16]
    out, truth = check(problem)
    if spread == 0:
        assert (out.entropy - math.log(301)).abs().max() < 1e-6
    else:
        assert out.is_top1.sum() == truth.is_top1.sum() >= 8


def test_k09_extreme_logits_far_below(head_backend):
    """Targets 1e4 nats under the largest logit, between ordinary rows."""
    problem = HeadProblem.random(20, 16, 301, seed=2, bias=True)
    problem.hidden[::3] *= 2000
    problem.targets[:] = (problem.hidden @ problem.weight.T + problem.bias).argmin(1)
    out, truth = check(problem)
    assert truth.logp.min() < -1e4
    assert torch.isfinite(out.entropy).all()


def test_the_entropy_of_a_sure_row_keeps_its_digits(head_backend):
    """p_y up to 1 - 1e-13: entropy, logp and 1 - sum p^2 come from sums without the target's 1 in them."""
    problem = HeadProblem.random(8, 16, 129, seed=11)
    problem.weight[:, 0] = 0
    problem.targets[:] = 5
    problem.weight[5] = 0
    problem.weight[5, 0] = 1
    problem.hidden[:, 0] = torch.linspace(20, 38, 8)
    z = problem.hidden.double() @ problem.weight.double().T
    below = z - z[:, 5:6]
    others = below.exp()
    others[:, 5] = 0
    rest = others.sum(1)
    truth = torch.log1p(rest) - (others * below).sum(1) / (1 + rest)  # a float64 log_softmax is 1e-3 off here
    out = token_statistics(problem.hidden, problem.weight, problem.targets)
    assert float(truth.min()) < 1e-11
    assert float(((out.entropy - truth) / truth).abs().max()) < 1e-5
    assert float(((out.logp + torch.log1p(rest)) / rest).abs().max()) < 1e-5


def test_k06_ignored_rows(head_backend):
    """Zeros and False where the target is ignored, whatever the row holds; the others as if alone."""
    problem = HeadProblem.random(12, 16, 67)
    expected = token_statistics(problem.hidden, problem.weight, problem.targets)
    problem.hidden[[2, 7]], problem.targets[[2, 7]] = float("nan"), -100
    out = token_statistics(problem.hidden, problem.weight, problem.targets.int())
    others = [i for i in range(12) if i not in (2, 7)]
    for field in dataclasses.fields(out):
        got = getattr(out, field.name)
        assert (got[[2, 7]] == 0).all(), field.name
        torch.testing.assert_close(got[others], getattr(expected, field.name)[others], rtol=1e-6, atol=1e-6)
    everything = token_statistics(problem.hidden, problem.weight, torch.full((12,), 3), ignore_index=3)
    assert not everything.is_top1.any()


def test_k08_nonfinite_row(head_backend):
    problem = HeadProblem.random(12, 16, 67)
    expected = token_statistics(problem.hidden, problem.weight, problem.targets)
    others = [i for i in range(12) if i != 5]
    for poison in (float("nan"), float("inf")):
        problem.hidden[5, 2] = poison
        out = token_statistics(problem.hidden, problem.weight, problem.targets)
        for name in VALUES:
            assert not getattr(out, name)[5].isfinite(), name
            assert torch.equal(getattr(out, name)[others], getattr(expected, name)[others]), name


def test_a_masked_token_weighs_nothing(head_backend):
    """A bias of -inf, over more columns than a block: probability 0, no part in entropy, and a mean logit of -inf."""
    problem = HeadProblem.random(6, 16, 90, bias=True)
    problem.targets[:] = 80
    problem.bias[:70] = float("-inf")
    out = token_statistics(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    kept = {"bias": problem.bias[70:].double()}
    truth = reference.token_statistics(
        problem.hidden.double(), problem.weight[70:].double(), problem.targets - 70, **kept
    )
    for name in ("entropy", "sum_p2", "logp"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(truth, name), rtol=1e-5, atol=1e-6)
    assert (out.mean_logit == -math.inf).all()


def test_without_targets(head_backend):
    """Any leading shape; the fields of the distribution alone, and no target to overflow from."""
    problem = HeadProblem.random(12, 16, 131, spread=60.0)
    truth = reference.token_statistics(problem.hidden.double(), problem.weight.double())
    base = plain(problem.hidden, problem.weight, problem.targets)
    out = token_statistics(problem.hidden.reshape(3, 4, 16), problem.weight)
    assert out.logp is None
    assert out.is_top1 is None
    for name, baseline in zip(VALUES[:3], base, strict=False):
        assert getattr(out, name).shape == (3, 4)
        assert_no_worse(getattr(out, name).flatten(), baseline, getattr(truth, name), name=name)


def test_a_tie_counts_as_top1(head_backend):
    """Two tokens with the same largest logit: whichever is the target is on top."""
    weight = torch.tensor([[1.0, 0.0], [4.0, 0.0], [4.0, 0.0], [2.0, 0.0]])
    hidden = torch.tensor([[2.0, 0.0]]).expand(4, 2)
    out = token_statistics(hidden, weight, torch.arange(4))
    assert out.is_top1.tolist() == [False, True, True, False]


def test_logp_is_that_of_linear_logp(head_backend):
    problem = HeadProblem.random(15, 16, 301, bias=True, softcap=20.0)
    options = {"bias": problem.bias, "softcap": 20.0}
    out = token_statistics(problem.hidden, problem.weight, problem.targets, **options)
    torch.testing.assert_close(
        out.logp, linear_logp(problem.hidden, problem.weight, problem.targets, **options), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype):
    """The logits of half-precision inputs are float32: TRL's plain path is 1e-2 nats off where this is 1e-5."""
    problem = HeadProblem.random(40, 64, 2500, dtype=dtype, bias=True)
    out, truth = check(problem)
    assert float((out.entropy - truth.entropy).abs().max()) < 1e-5
    assert float((out.logp - truth.logp).abs().max()) < 1e-5


@pytest.mark.parametrize("tiles", [(512, 1), (4, 7), (1, 64)], ids=str)
def test_blocks_do_not_show(tiles, monkeypatch):
    """However the vocabulary and the rows are cut, down to one column a block."""
    monkeypatch.setattr(streaming, "pick", lambda n, v, kind: streaming.Tiles(min(n, tiles[0]) or 1, min(v, tiles[1])))
    check(HeadProblem.random(11, 8, 67, seed=9, spread=8.0))


def test_strided_inputs_and_int32_targets():
    problem = HeadProblem.random(12, 10, 301, bias=True)
    expected = token_statistics(problem.hidden, problem.weight, problem.targets, bias=problem.bias)
    wide = torch.full((25, 23), float("nan"))
    wide[1::2, 2:22:2] = problem.hidden
    weight = problem.weight.T.contiguous().T
    targets = problem.targets.int().repeat_interleave(2)[::2]
    out = token_statistics(wide[1::2, 2:22:2], weight, targets, bias=problem.bias.repeat(2)[301:])
    for field in dataclasses.fields(out):
        assert torch.equal(getattr(out, field.name), getattr(expected, field.name)), field.name


def test_compiled_meta_and_opcheck():
    problem = HeadProblem.random(6, 8, 40, bias=True)
    tensors = (problem.hidden, problem.weight, problem.targets)
    expected = token_statistics(*tensors, bias=problem.bias)
    function = torch.compile(lambda *a: token_statistics(*a, bias=problem.bias), fullgraph=True, backend="aot_eager")
    out = function(*tensors)
    for field in dataclasses.fields(out):
        assert torch.equal(getattr(out, field.name), getattr(expected, field.name)), field.name
    shapes = token_statistics(*(t.to("meta") for t in tensors))
    assert (shapes.entropy.shape, shapes.is_top1.dtype) == ((6,), torch.bool)
    torch.library.opcheck(torch.ops.mmrlhf.token_statistics, (*tensors, None, 1.0, None, -100, "torch"))
    torch.library.opcheck(torch.ops.mmrlhf.token_statistics, (*tensors[:2], None, None, 1.0, None, -100, "torch"))


def test_autocast_and_double():
    problem = HeadProblem.random(6, 8, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = token_statistics(problem.hidden, problem.weight, problem.targets)
    halves = token_statistics(problem.hidden.bfloat16(), problem.weight.bfloat16(), problem.targets)
    assert torch.equal(out.entropy, halves.entropy)
    exact = token_statistics(problem.hidden.double(), problem.weight.double(), backend="reference")
    assert exact.entropy.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "hidden must be float32.*ops.reference"),
        ({"weight": torch.zeros(11, 9)}, ValueError, r"weight must have shape \[V, H\] with H = 8"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"targets must have shape \[4\]"),
        ({"targets": torch.full((4,), 11)}, ValueError, r"targets must be token ids in \[0, 11\)"),
        ({"softcap": -1.0}, ValueError, "softcap must be finite and positive"),
        ({"backend": "tpu"}, ValueError, "backend= must be one of"),
    ],
    ids=["k01", "k02", "k02-targets", "k05", "k11", "backend"],
)
def test_bad_arguments(change, error, message):
    given = {"hidden": torch.zeros(4, 8), "weight": torch.zeros(11, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        token_statistics(**(given | change))
