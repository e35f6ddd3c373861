"""The pieces of linear_logp on Triton, run in a row: every way of making E, against float64 truth.

Shapes: N around the row tile of 16 (1, 7, 33) and none; V = 1, below, at and above a column tile, and odd; H odd for
the ways that allow it. Buffers start as NaN, so that what a kernel forgets to write shows.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mmrlhf.kernels.triton import configs, launch
from mmrlhf.ops import reference
from mmrlhf.ops._gemm import padded
from numerics import HeadProblem, assert_no_worse, plain_logp

EPILOGUE = configs.EpilogueConfig(4, 1, 4, 64)
POINTER = configs.GemmConfig(4, 1, 16, 64, 16, group_m=2)
DESCRIPTOR = configs.GemmConfig(4, 1, 16, 64, 16, group_m=2, split=2, loads="descriptor")
DEVICE = configs.GemmConfig(4, 1, 16, 64, 16, loads="device_descriptor", warp_specialize=True)
pytestmark = pytest.mark.skipif(not launch.interpreted(), reason="test_device.py is for a GPU")
WAYS = {"epilogue": EPILOGUE, "pointer": POINTER, "descriptor": DESCRIPTOR, "device_descriptor": DEVICE}
LOG2E = launch.LOG2E


def nan(*shape):
    return torch.full(shape, float("nan"))


def run(hidden, weight, targets, config, *, bias=None, logit_scale=1.0, softcap=None, statistics=True, offset=None):
    """Everything from hidden rows to log-probabilities, statistics and dlogp/dh, as a launcher of ops would."""
    n, vocab = hidden.shape[0], weight.shape[0]
    epilogue = launch.Epilogue(logit_scale, softcap)
    z_y, k, rest, logp = nan(n), nan(n), nan(n), nan(n)
    slope = None if softcap is None else nan(n)
    launch.target_logit(hidden, weight, targets, bias=bias, epilogue=epilogue, z_y=z_y, slope_y=slope, offset=k)
    k = k if offset is None else offset
    found = launch.Statistics.empty(n, hidden.device) if statistics else None
    partial = nan(5 if statistics else 1, launch.partial_tiles(vocab, config), n)
    common = {"target": targets, "offset": k, "epilogue": epilogue, "config": config}
    if isinstance(config, configs.EpilogueConfig):
        e = nan(n, vocab)
        cut = min(vocab, 2 * config.block_v)  # two blocks of columns where there are enough
        for start, stop in ((0, cut), (cut, vocab)):
            block, part = weight[start:stop], partial[:, -(-start // config.block_v) :]
            part = part[:, : launch.partial_tiles(stop - start, config)]
            tile = hidden @ block.T
            own = None if bias is None else bias[start:stop]
            if stop > start:
                launch.exp2_epilogue(tile, e[:, start:stop], start=start, bias=own, partial=part, **common)
    else:
        e = nan(n, padded(vocab))[:, :vocab]
        launch.exp2_gemm(hidden, weight, e, bias=bias, partial=partial, **common)
    launch.finish(partial, z_y=z_y, offset=k, vocab=vocab, rest=rest, logp=logp, statistics=found)
    scalars = {"z_y": z_y, "offset": k, "rest": rest, "slope_y": slope}
    unit = launch.unit_gradient_(e @ weight, weight, targets, logit_scale=logit_scale, **scalars)
    return SimpleNamespace(logp=logp, unit=unit, e=e, statistics=found, partial=partial, **scalars)


def check(problem: HeadProblem, config, **kwargs):
    """Values and dlogp/dh against float64, at most twice as far from it as PyTorch in float32."""
    expected = []
    for dtype, how in ((torch.float64, reference.linear_logp), (torch.float32, plain_logp)):
        leaves = problem.leaves(dtype)
        logp = how(targets=problem.targets, **leaves, **problem.options)
        grad = torch.autograd.grad(logp.sum(), leaves["hidden"])[0]
        expected.append((logp, grad))
    (truth, unit), (baseline, base_unit) = expected
    out = run(problem.hidden, problem.weight, problem.targets, config, bias=problem.bias, **problem.options, **kwargs)
    assert_no_worse(out.logp, baseline, truth, name="logp")
    assert_no_worse(out.unit, base_unit, unit, name="dlogp/dh")
    return out


def logits(problem: HeadProblem, dtype=torch.float64):
    """z [N, V]"""
    z = problem.hidden.to(dtype) @ problem.weight.to(dtype).T * problem.options.get("logit_scale", 1.0)
    z = z if problem.bias is None else z + problem.bias.to(dtype)
    cap = problem.options.get("softcap")
    return z if cap is None else cap * torch.tanh(z / cap)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("n", "h", "v"), [(0, 16, 17), (1, 16, 1), (7, 32, 17), (33, 48, 129), (17, 16, 64), (16, 16, 257)]
)
def test_matches_truth(way, n, h, v):
    check(HeadProblem.random(n, h, v), WAYS[way], statistics=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options", [{"softcap": 4.0}, {"logit_scale": 0.3}, {"softcap": 30.0, "logit_scale": 1.7}], ids=str
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_softcap_bias_and_scale(way, options, bias):
    check(HeadProblem.random(9, 16, 129, bias=bias, seed=3, **options), WAYS[way], statistics=False)


@pytest.mark.parametrize("way", ["epilogue", "pointer"])
@pytest.mark.parametrize("h", [1, 17, 31])
def test_odd_width(way, h):
    check(HeadProblem.random(5, h, 67, seed=h), WAYS[way], statistics=False)


@pytest.mark.parametrize("way", ["epilogue", "pointer"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_strided_input(way, dtype):
    """A slice of wider matrices, poisoned outside, equals the contiguous run: bitwise where the GEMM is ours."""
    problem = HeadProblem.random(7, 16, 67, seed=5)
    expected = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    wide_hidden, wide_weight = nan(14, 40), nan(67, 40)
    wide_hidden[::2, 3:19], wide_weight[:, 3:19] = problem.hidden, problem.weight
    targets = torch.stack([problem.targets, problem.targets], 1).to(dtype)[:, 1]
    out = run(wide_hidden[::2, 3:19], wide_weight[:, 3:19], targets, WAYS[way])
    assert torch.equal(out.logp, expected.logp)
    if way == "pointer":
        assert torch.equal(out.unit, expected.unit)
    else:  # the library picks its GEMM by leading dimension and threads: the same to the last few roundings
        torch.testing.assert_close(out.unit, expected.unit, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_statistics(way):
    """Entropy, sum of p^2, top-1, mean logit and the maximum, of the capped and biased logits, target counted in."""
    problem = HeadProblem.random(33, 16, 129, bias=True, seed=7, softcap=20.0, logit_scale=1.2)
    problem.targets[::3] = logits(problem)[::3].argmax(1)
    out = check(problem, WAYS[way]).statistics
    expected = []
    for dtype in (torch.float64, torch.float32):
        z = logits(problem, dtype)
        logp = z.log_softmax(1)
        p = logp.exp()
        expected.append((-(p * logp).sum(1), (p * p).sum(1), z.mean(1), z.amax(1)))
    found = (out.entropy, out.sum_p2, out.mean_logit, out.maximum)
    for name, ours, truth, baseline in zip(("entropy", "sum_p2", "mean", "max"), found, *expected, strict=True):
        assert_no_worse(ours, baseline, truth, name=name)
    assert torch.equal(out.is_top1.bool(), logits(problem).argmax(1) == problem.targets)
    assert 0 < int(out.is_top1.sum()) < 33


@pytest.mark.parametrize("way", ["epilogue", "descriptor"])
def test_sure_rows_keep_relative_precision(way):
    """p_y up to 1 - 1e-13: logp is exact to float32 relative precision, where 1 - p in float32 would be 0."""
    problem = HeadProblem.random(8, 16, 129, seed=11)
    # The other rows of the head keep to dimensions 1 .. 15; the target's logit is a multiple of dimension 0.
    problem.weight[:, 0] = 0
    problem.targets[:] = 5
    problem.weight[5] = 0
    problem.weight[5, 0] = 1
    problem.hidden[:, 0] = torch.linspace(20, 38, 8)
    z = logits(problem)
    others = (z - z[:, 5:6]).exp()
    others[:, 5] = 0
    truth = -torch.log1p(others.sum(1))  # a float64 log_softmax is 6e-4 off here
    out = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    assert float(truth.abs().min()) < 1e-12
    assert float(((out.logp.double() - truth) / truth).abs().max()) < 4e-6


@pytest.mark.parametrize("way", WAYS)
def test_rows_far_below_are_found_and_run_again(way):
    """logp of -1000 nats: S' says so (above 2^64, or inf), the maximum is right, and a second run is exact."""
    problem = HeadProblem.random(9, 16, 129, seed=13)
    problem.hidden[::2] *= 200
    problem.targets[:] = logits(problem).argmin(1)
    first = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    bad = ~(first.rest <= 2.0**64)
    assert bad.tolist() == [True, False] * 4 + [True]
    assert torch.allclose(first.statistics.maximum, logits(problem).amax(1).float(), rtol=1e-5)
    again = torch.where(bad, (first.statistics.maximum * LOG2E).round(), first.offset)
    out = run(problem.hidden, problem.weight, problem.targets, WAYS[way], offset=again)
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets)
    baseline = plain_logp(problem.hidden, problem.weight, problem.targets)
    assert float(truth.min()) < -1000
    assert_no_worse(out.logp, baseline, truth)
    assert out.unit.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_target_outside_the_vocabulary_is_not_read(way):
    problem = HeadProblem.random(5, 16, 17)
    expected = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    problem.targets[[1, 3]] = torch.tensor([-1, 2**40])
    out = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    assert out.logp[[1, 3]].isnan().all()
    assert torch.equal(out.logp[[0, 2, 4]], expected.logp[[0, 2, 4]])


@pytest.mark.parametrize("way", WAYS)
def test_nonfinite_row_stays_alone(way):
    problem = HeadProblem.random(20, 16, 67)
    expected = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    problem.hidden[3] = float("nan")
    out = run(problem.hidden, problem.weight, problem.targets, WAYS[way])
    others = torch.arange(20) != 3
    assert not out.logp[3].isfinite()
    assert torch.equal(out.logp[others], expected.logp[others])
    assert torch.equal(out.unit[others], expected.unit[others])


@pytest.mark.parametrize("way", WAYS)
def test_masked_token_weighs_nothing(way):
    """A bias of -inf takes a token out: E is 0 there, and the entropy stays a number."""
    problem = HeadProblem.random(6, 16, 67, bias=True)
    problem.targets[:] = 3
    problem.bias[10] = float("-inf")
    out = run(problem.hidden, problem.weight, problem.targets, WAYS[way], bias=problem.bias)
    keep = torch.arange(67) != 10
    truth = reference.linear_logp(
        problem.hidden.double(), problem.weight[keep].double(), problem.targets, bias=problem.bias[keep].double()
    )
    assert torch.allclose(out.logp.double(), truth, rtol=1e-5)
    assert out.e[:, 10].eq(0).all()
    assert out.statistics.entropy.isfinite().all()


def test_exponentials_with_the_target_left_out():
    """E itself: 2^(z log2(e) - k), 0 at the target; and without storing it, the same sums bitwise."""
    problem = HeadProblem.random(7, 16, 67)
    out = run(problem.hidden, problem.weight, problem.targets, DESCRIPTOR)
    expected = torch.exp2(logits(problem) * LOG2E - out.offset[:, None].double())
    expected.scatter_(1, problem.targets[:, None], 0)
    assert torch.allclose(out.e.double(), expected, rtol=2e-5)
    assert out.e.gather(1, problem.targets[:, None]).eq(0).all()
    partial = torch.full_like(out.partial, float("nan"))
    launch.exp2_gemm(
        problem.hidden,
        problem.weight,
        None,
        target=problem.targets,
        offset=out.offset,
        bias=None,
        epilogue=launch.Epilogue(1.0, None),
        partial=partial,
        config=DESCRIPTOR,
    )
    assert torch.equal(partial, out.partial)


def test_rows_do_not_depend_on_their_neighbours():
    """The same row alone and among 33: the reduction order is fixed, so the result is bitwise the same."""
    problem = HeadProblem.random(33, 16, 257, seed=17)
    many = run(problem.hidden, problem.weight, problem.targets, POINTER)
    for row in (0, 16, 32):
        one = run(problem.hidden[row : row + 1], problem.weight, problem.targets[row : row + 1], POINTER)
        assert torch.equal(one.logp[0], many.logp[row])
        assert torch.equal(one.statistics.entropy[0], many.statistics.entropy[row])
