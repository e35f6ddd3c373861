"""Rows whose target is more than 44 nats below the largest logit: run again on the device, without a host read.

Both ways to E, exponentials kept and made again, a workspace of a few rows so that the rows run again come in several
parts, and every option of the head. Buffers start as NaN where this file makes them.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmrlhf.kernels.triton import configs, launch, launch_redo
from mmrlhf.ops import _gemm, _triton, reference
from mmrlhf.ops.streaming import Head
from numerics import HeadProblem, assert_no_worse, plain_logp

pytestmark = [
    pytest.mark.skipif(not launch.interpreted(), reason="test_device.py is for a GPU"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of the infinities that are looked for
]
N, H, V = 21, 16, 67
FAR = {"some": slice(0, None, 3), "all": slice(0, None), "first": slice(0, 1), "last": slice(N - 1, N)}


@pytest.fixture(params=["epilogue", "gemm"])
def way(request, monkeypatch):
    """How E is made; 16 rows of exponentials at a time."""
    small = configs.EpilogueConfig(4, 1, 8, 64) if request.param == "epilogue" else configs.GemmConfig(4, 1, 16, 64, 16)
    monkeypatch.setattr(configs, "pick", lambda problem: small)
    monkeypatch.setattr(configs, "REDO_FLOAT", configs.GemmConfig(4, 1, 16, 64, 16))
    monkeypatch.setattr(_gemm, "WORKSPACE_BYTES", 16 * 80 * 4)
    monkeypatch.setattr(_triton, "ROW_STEP", 16)
    return request.param


def scene(far="some", factor=200.0, **options):
    return HeadProblem.unlikely(N, H, V, far=FAR[far], factor=factor, **options)


def run(problem, upstream, *, keep):
    """logp, and the gradients of hidden, weight and bias."""
    head = problem.head()
    kept = _triton.Kept.empty(N, head) if keep else None
    if kept is not None:
        kept.flat.fill_(float("nan"))
    rows, unit = _triton.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
    weight = torch.full(problem.weight.shape, float("nan"))
    bias = None if problem.bias is None else torch.full(problem.bias.shape, float("nan"))
    _triton.weight_grad(head, problem.hidden, rows, upstream, grad_weight=weight, grad_bias=bias, keep=kept)
    return rows, [grad for grad in (unit * upstream[:, None], weight, bias) if grad is not None]


def check(problem, *, keep):
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(2))
    expected = []
    for dtype, how in ((torch.float64, reference.linear_logp), (torch.float32, plain_logp)):
        leaves = problem.leaves(dtype)
        logp = how(targets=problem.targets, **leaves, **problem.options)
        expected.append((logp, *torch.autograd.grad((logp * upstream.to(dtype)).sum(), list(leaves.values()))))
    rows, grads = run(problem, upstream, keep=keep)
    for name, out, truth, baseline in zip(
        ("logp", "hidden", "weight", "bias"), [rows.logp(), *grads], *expected, strict=False
    ):
        assert_no_worse(out, baseline, truth, name=name)
    return rows, expected[0][0].detach()


@pytest.mark.parametrize(
    ("far", "keep"),
    [("some", False), ("some", True), ("all", False), ("first", True), ("last", False)],
)
def test_wherever_they_are(way, far, keep):
    rows, truth = check(scene(far), keep=keep)
    assert truth[FAR[far]].max() < -100
    again = rows.offset - rows.z_y * launch.LOG2E > 32
    assert torch.equal(again.nonzero()[:, 0], torch.arange(N)[FAR[far]])


@pytest.mark.parametrize(
    ("options", "keep"),
    [({"bias": True}, True), ({"softcap": 90.0, "bias": True}, False), ({"softcap": 70.0, "logit_scale": 0.5}, True)],
    ids=str,
)
def test_every_option_of_the_head(way, options, keep):
    """A cap of 90 still leaves logp at -180: below the limit, and above it where the logits are small."""
    rows, truth = check(scene(factor=60.0, **options), keep=keep)
    assert truth.min() < -100
    assert 0 < int((rows.offset - rows.z_y * launch.LOG2E > 32).sum()) < N


def test_between_44_and_88_nats(way):
    """Where S' overflows nothing yet, but is above 2^64: the rows of which a float32 sum alone would do."""
    rows, truth = check(scene(factor=7.0), keep=False)
    assert ((truth < -46) & (truth > -88)).sum() > 3
    assert torch.equal(rows.offset - rows.z_y * launch.LOG2E > 32, truth < -46)


def test_none_of_them_and_nothing_changes(way, monkeypatch):
    """Launched for nothing, it leaves every number bitwise as it was."""
    problem = HeadProblem.random(N, H, V, bias=True)
    upstream = torch.linspace(-1, 2, N)
    rows, grads = run(problem, upstream, keep=False)
    monkeypatch.setattr(_triton, "redo", lambda *args, **kwargs: None)
    plain_rows, plain_grads = run(problem, upstream, keep=False)
    assert torch.equal(rows.logp(), plain_rows.logp())
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


def test_the_other_rows_are_left_alone(way):
    """The ordinary rows' log-probabilities and dlogp/dh are bitwise those of a run without a row far below."""
    problem = scene("some")
    far = torch.zeros(N, dtype=torch.bool)
    far[FAR["some"]] = True
    rows, unit = _triton.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    problem.hidden[far] /= 200
    plain_rows, plain_unit = _triton.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    assert torch.equal(rows.logp()[~far], plain_rows.logp()[~far])
    if way == "gemm":  # the library's GEMM may add in another order for other numbers of threads
        assert torch.equal(unit[~far], plain_unit[~far])


def test_a_nonfinite_row_is_run_again_and_stays_alone(way):
    """NaN is over the limit too: its row stays NaN, a row far below next to it is exact, the rest is as it was."""
    problem = scene("some")
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets)
    baseline = plain_logp(problem.hidden, problem.weight, problem.targets)
    problem.hidden[[4, 9]] = torch.tensor([float("nan"), float("inf")])[:, None]
    rows, unit = _triton.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    others = [i for i in range(N) if i not in (4, 9)]
    assert not rows.logp()[[4, 9]].isfinite().any()
    assert_no_worse(rows.logp()[others], baseline[others], truth[others])
    assert unit[others].isfinite().all()


@pytest.mark.parametrize(
    "flags", ["", "1", "0110", "1" * 40, "01" * 30 + "1"], ids=["empty", "1", "few", "all", "many"]
)
def test_select(flags, monkeypatch):
    """The indices in ascending order, over several blocks of rows, and how many; a NaN is chosen."""
    monkeypatch.setattr(configs, "SELECT", configs.RowConfig(4, 1, 16))
    bad = torch.tensor([flag == "1" for flag in flags], dtype=torch.bool)
    rest = torch.where(bad, float("inf"), 1.0).float()
    rest[: len(flags) // 3] = torch.where(bad[: len(flags) // 3], float("nan"), 2.0**64)
    if len(flags) == 0:
        return
    found = launch_redo.select(rest, z_y=torch.zeros(len(flags)), offset=torch.zeros(len(flags)))
    assert found.index[: int(found.count)].tolist() == bad.nonzero()[:, 0].tolist()
    offset = torch.where(bad, 1e4 + 33.0, 1e4 + 31.0)
    done = launch_redo.select(rest, z_y=torch.full((len(flags),), 1e4 / launch.LOG2E), offset=offset, done=True)
    assert done.index[: int(done.count)].tolist() == bad.nonzero()[:, 0].tolist()


READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave"}


class NoHostRead(TorchDispatchMode):
    """Raises for what would wait for a device if there were one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [a for a in torch.utils._pytree.tree_leaves(args[1:2]) if isinstance(a, torch.Tensor)]
        reads = name in READS or (
            name in ("index", "index_put", "index_put_") and any(m.dtype == torch.bool for m in masks)
        )
        assert not reads, f"{func} reads from the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_no_host_read(way, keep):
    """forward, objective and weight_grad of rows of which some are far below: no operator that waits for a value."""
    problem = scene(bias=True)
    head = problem.head()
    o = reference.Objective(
        torch.tensor([0, 20, N]),
        torch.tensor([[0, 1]]),
        token_weight=torch.ones(N),
        reduction="mean",
        reference_scores=torch.zeros(2),
        beta=torch.tensor([0.1]),
        sft_weight=0.5,
    )
    weight, bias = torch.empty_like(problem.weight), torch.empty_like(problem.bias)
    with NoHostRead():
        kept = _triton.Kept.empty(N, head) if keep else None
        rows, unit = _triton.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
        _, coef = _triton.objective(o, rows.logp())
        _triton.weight_grad(head, problem.hidden, rows, coef, grad_weight=weight, grad_bias=bias, keep=kept)
    assert weight.isfinite().all()
    with pytest.raises(AssertionError, match="reads from the device"), NoHostRead():
        bool((unit > 0).any())


def test_an_adapter_counts(way):
    """Exponentials, sums and both gradients of the rows run again, with a LoRA's part: those of the merged weight."""
    problem = scene("all")
    low, up = torch.randn(N, 5), torch.randn(V, 5)
    wide = torch.cat([problem.hidden, low], 1), torch.cat([problem.weight, up], 1)
    expected, unit = _triton.forward(Head(wide[1], None, 1.3, None), wide[0], problem.targets, unit=True)
    rows = _triton.DeviceRows(
        problem.targets, expected.z_y, None, (expected.z_y * launch.LOG2E).round(), torch.full((N,), float("inf"))
    )
    grads = torch.full((N, H), float("nan")), torch.full((N, 5), float("nan"))
    head = Head(problem.weight, None, 1.3, None, up)
    _triton.redo(head, problem.hidden, rows, 16, unit=grads[0], low=low, unit_low=grads[1])
    assert torch.equal(rows.offset, expected.offset)
    torch.testing.assert_close(rows.logp(), expected.logp(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(grads, 1), unit, rtol=1e-3, atol=1e-4)
