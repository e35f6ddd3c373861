"""The CUDA kernels, their launchers and bindings as host code (emulate.h), under the engine that uses them.

What this holds without a device: indices, grids, barriers, sums in one order whatever the threads' order, ragged and
unaligned shapes, and every formula. What it cannot: the compiler for the device, and memory ordering between warps.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mmrlhf.ops import LOSS_KINDS, fused_preference_loss, reference, streaming
from mmrlhf.ops.loss_kinds import LOSSES
from mmrlhf.ops.streaming import Head
from numerics import HeadProblem, assert_no_worse, check_linear_logp, plain_logp

pytest.importorskip("mmrlhf._C", reason="the extension is not built")
from mmrlhf.ops import _cpu

pytestmark = pytest.mark.slow


def gradients(problem, dtype, how, upstream):
    leaves = problem.leaves(dtype)
    logp = how(targets=problem.targets, **leaves, **problem.options)
    return logp, torch.autograd.grad((logp * upstream.to(dtype)).sum(), list(leaves.values()))


def run(engine, problem, upstream, *, keep):
    """The rows, and the gradients of hidden, weight and bias, from poisoned buffers."""
    head = Head(problem.weight, problem.bias, problem.options.get("logit_scale", 1.0), problem.options.get("softcap"))
    kept = engine.Kept.empty(problem.hidden.shape[0], head) if keep else None
    if kept is not None:
        kept.flat.fill_(float("nan"))
    rows, unit = engine.forward(head, problem.hidden, problem.targets, unit=True, keep=kept)
    grads = [torch.full(problem.weight.shape, float("nan"))]
    if problem.bias is not None:
        grads.append(torch.full(problem.bias.shape, float("nan")))
    of_bias = grads[1] if len(grads) > 1 else None
    plain = streaming.Rows(rows.targets, rows.z_y, rows.slope_y, rows.offset, rows.rest, rows.redone)  # as autograd has
    engine.weight_grad(head, problem.hidden, plain, upstream, grad_weight=grads[0], grad_bias=of_bias, keep=kept)
    return rows, (unit * upstream[:, None], *grads)


def check(engine, problem, *, keep):
    upstream = torch.randn(problem.hidden.shape[0], generator=torch.Generator().manual_seed(1))
    truth, true_grads = gradients(problem, torch.float64, reference.linear_logp, upstream)
    baseline, base_grads = gradients(problem, torch.float32, plain_logp, upstream)
    rows, grads = run(engine, problem, upstream, keep=keep)
    assert_no_worse(rows.logp(), baseline, truth, name="logp")
    for name, *three in zip(("hidden", "weight", "bias"), grads, base_grads, true_grads, strict=False):
        assert_no_worse(*three, name=name)
    return rows, truth


# Widths that vectors take and that they do not; vocabularies of a part of a tile, of whole ones and of both.
@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize(
    ("n", "h", "v", "options"),
    [
        (0, 16, 17, {}),
        (1, 1, 1, {}),
        (7, 16, 1024, {"bias": True}),
        (9, 33, 2049, {"bias": True, "logit_scale": 0.7}),
        (17, 24, 3001, {"softcap": 5.0, "bias": True, "logit_scale": 1.3}),
    ],
    ids=str,
)
def test_every_gradient(engine, keep, n, h, v, options):
    check(engine, HeadProblem.random(n, h, v, seed=n, **options), keep=keep)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
def test_rows_far_below_are_run_again(engine, keep):
    problem = HeadProblem.random(10, 16, 1100, seed=2, bias=True)
    problem.hidden[::3] *= 200
    z = problem.hidden @ problem.weight.T + problem.bias
    problem.targets[:] = z.argmin(1)
    rows, truth = check(engine, problem, keep=keep)
    assert (rows.offset - rows.z_y * streaming.LOG2E > 32).nonzero()[:, 0].tolist() == list(range(0, 10, 3))
    assert float(truth.detach().min()) < -1000


@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["recompute", "keep"])
def test_linear_logp_through_autograd(public, budget):
    problem = HeadProblem.random(9, 12, 1040, seed=5, bias=True, softcap=6.0)
    check_linear_logp(problem, backend="cuda", memory_budget=budget)
    problem.hidden[4] *= 300
    problem.options.clear()
    check_linear_logp(problem, backend="cuda", memory_budget=budget)


@pytest.mark.parametrize("budget", [0, 7 * 1040 * 4, 1 << 20], ids=["recompute", "two chunks", "keep"])
def test_fused_through_autograd(public, budget):
    problem = HeadProblem.random(12, 12, 1035, seed=6)
    ends, pairs = torch.tensor([0, 3, 6, 8, 12]), torch.tensor([[0, 1], [3, 2]])
    settings = {"reference_scores": torch.randn(4, generator=torch.Generator().manual_seed(0)), "sft_weight": 0.25}
    found = []
    for dtype, name in ((None, "cuda"), (torch.float32, "reference"), (torch.float64, "reference")):
        leaves = problem.leaves(dtype)
        out = fused_preference_loss(
            targets=problem.targets,
            cu_seqlens=ends,
            pairs=pairs,
            memory_budget=budget,
            backend=name,
            **leaves,
            **settings,
        )
        found.append((out.loss, *torch.autograd.grad(out.loss, list(leaves.values()))))
    for name, *three in zip(("loss", "hidden", "weight"), *found, strict=True):
        assert_no_worse(*three, name=name)


def test_targets_that_are_certain_keep_their_digits(engine):
    """p_y -> 1: logp of -1e-9 and below, where a difference from 1 would be 0."""
    problem = HeadProblem.random(8, 16, 1030, seed=3)
    problem.hidden *= 0.01
    weight = problem.weight.clone()
    weight[problem.targets] = 0
    weight[problem.targets, :] += 300 * problem.hidden / problem.hidden.pow(2).sum(1, keepdim=True).sqrt()
    problem = dataclasses.replace(problem, weight=weight, hidden=problem.hidden * 3)
    check(engine, problem, keep=False)


def test_a_nonfinite_row_stays_its_own(engine):
    problem = HeadProblem.random(9, 16, 1100, seed=4)
    clean, grads = run(engine, problem, torch.ones(9), keep=False)
    problem.hidden[4, 3] = float("nan")
    rows, lost = run(engine, problem, torch.ones(9), keep=False)
    others = torch.arange(9) != 4
    assert rows.logp()[4].isnan()
    assert torch.equal(rows.logp()[others], clean.logp()[others])
    assert torch.equal(lost[0][others], grads[0][others])


@pytest.mark.parametrize("columns", [1, 3, 1024, 1027, 3072])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("how", ["apart", "in place", "bfloat16", "sums alone", "odd stride", "odd address"])
def test_epilogue(emulated, columns, softcap, how):
    """One pass over a block that starts at column 5: E, 0 at the targets, nothing written beside it, sums a tile."""
    rows, start = 11, 5
    g = torch.Generator().manual_seed(columns)
    leading = columns + (1 if how == "odd stride" else -columns % 4 + 4)
    store = torch.full((rows, leading + 1), 7.0)[:, how == "odd address" :]
    store = store.as_strided((rows, columns), (leading, 1))
    store.copy_(torch.randn(rows, columns, generator=g) * 3)
    raw, bias = store.clone(), torch.randn(columns, generator=g)
    target = torch.randint(0, columns + 10, (rows,), generator=g)  # some of them in no column of the block
    offset = torch.randint(-3, 4, (rows,), generator=g).float()
    partial = torch.full((-(-columns // 1024), rows), float("nan"))
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    wide = torch.full((rows, columns + 20), 7.0, dtype=dtype)[:, :columns] if columns % 4 == 0 else None
    out = torch.full((rows, columns), 7.0, dtype=dtype) if wide is None else wide
    given = {"in place": store, "odd address": store, "sums alone": None}.get(how, out)
    emulated.exp2_epilogue_cuda(
        store, given, target, offset, partial, start=start, bias=bias, logit_scale=0.5, softcap=softcap, stream=0
    )
    z = raw.double() * 0.5 + bias.double()
    slope = torch.ones_like(z)
    if softcap:
        slope, z = 1 - torch.tanh(z / softcap) ** 2, softcap * torch.tanh(z / softcap)
    e = torch.exp2(z / torch.tensor(2.0).double().log() - offset[:, None].double())
    own = torch.arange(columns)[None] == (target - start)[:, None]
    e = e.masked_fill(own, 0)
    tiles = torch.stack([part.sum(1) for part in e.split(1024, 1)])
    assert torch.allclose(partial.double(), tiles, rtol=2e-6)
    if given is not None:
        assert torch.allclose(given.double(), e * slope, rtol=2e-6 if dtype == torch.float32 else 2**-8, atol=1e-12)
    if given is not store:
        assert torch.equal(store, raw)
    if wide is not None:
        assert (wide.as_strided((rows, columns + 20), (columns + 20, 1))[:, columns:] == 7).all()


@pytest.mark.parametrize("width", [1, 7, 8, 256, 257, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leading", [0, 16], ids=["packed", "padded"])
def test_target_logit_and_unit_gradient(emulated, width, dtype, leading):
    """Half precision weights too, which the CPU's library GEMM would not take; a target that is no token gives NaN."""
    rows, vocab = 10, 13
    g = torch.Generator().manual_seed(width)

    def matrix(height, dtype):
        """In rows of whole vectors, or side by side; 7 between the rows."""
        whole = torch.full((height, -(-width // leading) * leading if leading else width), 7.0, dtype=dtype)
        whole[:, :width] = torch.randn(height, width, generator=g)
        return whole[:, :width]

    hidden, weight = matrix(rows, dtype), matrix(vocab, dtype)
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[3], target[8] = vocab, -1
    z_y, offset, slope = (torch.full((rows,), 7.0) for _ in range(3))
    emulated.target_logit_cuda(
        hidden, weight, target, z_y, offset, logit_scale=0.3, softcap=2.0, slope_y=slope, stream=0
    )
    known = (target >= 0) & (target < vocab)
    raw = (hidden.double() * weight.double()[target.clamp(0, vocab - 1)]).sum(1) * 0.3 / 2
    assert torch.allclose(z_y[known].double(), 2 * torch.tanh(raw[known]), rtol=1e-5, atol=1e-6)
    assert torch.allclose(slope[known].double(), 1 - torch.tanh(raw[known]) ** 2, rtol=1e-4, atol=1e-6)
    assert torch.equal(offset[known], streaming.offset_of(z_y[known]))
    assert z_y[~known].isnan().all()
    assert offset[~known].isnan().all()
    product = matrix(rows, torch.float32)
    between = product.as_strided((rows, product.stride(0)), (product.stride(0), 1))[:, width:]
    rest = torch.rand(rows, generator=g)
    total = rest.double() + torch.exp2(z_y.double() / torch.tensor(2.0).double().log() - offset.double())
    scale, share = 0.3 / total, 0.3 * rest.double() / total * slope.double()
    expected = share[:, None] * weight.double()[target.clamp(0, vocab - 1)] - scale[:, None] * product.double()
    emulated.unit_gradient_cuda(product, weight, target, z_y, offset, rest, slope_y=slope, logit_scale=0.3, stream=0)
    assert torch.allclose(product[known].double(), expected[known], rtol=1e-4, atol=1e-6)
    assert product[~known].isnan().all()
    assert (between == 7).all()


@pytest.mark.parametrize("tiles", [1, 8, 149])
def test_finish(emulated, tiles):
    """Rows beyond a block's 32, `partial` a part of a wider buffer; in float64, so right to a float32 rounding."""
    g = torch.Generator().manual_seed(tiles)
    rows = 45
    partial = torch.full((tiles, 64), float("nan"))[:, :rows]
    partial.copy_(torch.rand(tiles, rows, generator=g) * 2.0 ** torch.randint(-40, 20, (rows,), generator=g))
    z_y = torch.randn(rows, generator=g) * 30
    offset = streaming.offset_of(z_y)
    offset[::5] += 200  # rows whose offset is another token's: E_y is tiny
    rest, logp = torch.empty(rows), torch.empty(rows)
    emulated.finish_cuda(partial, z_y, offset, rest, logp, stream=0)
    total = partial.double().sum(0)
    own = z_y.double() - offset.double() * torch.tensor(2.0).double().log()
    assert_no_worse(rest, total.float(), total, name="rest")
    truth = torch.where(own < -44, own - torch.log(total + own.exp()), -torch.log1p(total / own.exp()))
    assert torch.allclose(logp.double(), truth, rtol=1e-7, atol=0)


def objective(kind, lengths, pairs, *, weights=True, **settings):
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    logp = -torch.rand(int(ends[-1]), generator=g)
    return reference.Objective(
        ends,
        torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        token_weight=torch.randint(0, 4, logp.shape, generator=g) / 2.0 if weights else None,
        reference_scores=torch.randn(len(lengths), generator=g) if LOSSES[kind].reference else None,
        kind=kind,
        label_smoothing=1e-2 if kind == "exo_pair" else 0.0,
        **settings,
    ), logp


def assert_same_as_cpu(o, logp, engine):
    """Both walk over the same formulas in float64: they agree to a rounding of float32."""
    (ours, coef), (theirs, wanted) = engine.objective(o, logp), _cpu.objective(o, logp)
    for f in dataclasses.fields(ours):
        assert torch.allclose(getattr(ours, f.name), getattr(theirs, f.name), rtol=3e-7, atol=1e-9), f.name
    assert torch.allclose(coef, wanted, rtol=3e-7, atol=1e-9)
    return coef


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_preference_kernel_of_every_kind(engine, kind):
    pairs = [(0, 1), (2, 0), (2, 3), (1, 3)]
    o, logp = objective(kind, (40, 0, 7, 33), pairs, reduction="mean", beta=torch.tensor([0.1, 0.3, 0.5, 1.0]))
    assert_same_as_cpu(dataclasses.replace(o, sft_weight=0.25), logp, engine)


@pytest.mark.parametrize(
    ("lengths", "pairs"),
    [
        ((), []),
        ((3,), []),
        ((0, 0), [(0, 1)]),
        ((700, 300), [(0, 1)]),
        ((5,) * 17, [(i, i + 1) for i in range(16)]),
        ((3,) * 40, [(i, j) for i in range(40) for j in range(i + 1, 40)]),
    ],
    ids=["nothing", "no-pairs", "empty", "two-long", "R17", "P780"],
)
def test_preference_kernel_of_any_size(engine, lengths, pairs):
    """Fewer responses than warps share them, more walk over them; more pairs than threads."""
    for kind in ("sigmoid", "bco_pair"):
        assert_same_as_cpu(*objective(kind, lengths, pairs, sft_weight=0.1), engine)


def test_preference_kernel_does_not_depend_on_the_order_of_threads(engine, emulated):
    o, logp = objective("bco_pair", (31, 70, 5, 64), [(0, 1), (0, 2), (0, 3), (1, 2)], sft_weight=0.5)
    found = []
    for seed in (1, 2, 3):
        emulated.seed(seed)
        found.append(assert_same_as_cpu(o, logp, engine))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_totals_on_the_device_are_read_there(emulated):
    """num_pairs and num_sft_tokens as tensors of one float64, which no host reads."""
    o, logp = objective("sigmoid", (4, 5), [(0, 1)], num_pairs=17.0, num_sft_tokens=900.0, sft_weight=0.5)
    wanted = _cpu.objective(o, logp)[1]
    out = [torch.empty(n) for n in (2, 2, 1, 1, 1, 9)] + [torch.empty(()) for _ in range(3)]
    emulated.preference_cuda(
        logp,
        o.cu_seqlens,
        o.pairs,
        *out,
        token_weight=o.token_weight,
        reference_scores=o.reference_scores,
        sft_weight=0.5,
        scratch=torch.empty(8, dtype=torch.float64),
        num_pairs_tensor=torch.tensor(17.0, dtype=torch.float64),
        num_sft_tokens_tensor=torch.tensor(900.0, dtype=torch.float64),
        stream=0,
    )
    assert torch.allclose(out[5], wanted, rtol=3e-7)


def test_exp2_rowsum_is_bitwise_the_host_path(emulated):
    tile = torch.randn(5, 1031, generator=torch.Generator().manual_seed(0)) * 10
    offset, sums = torch.arange(5.0), torch.empty(5)
    target, target_exp = torch.tensor([0, 3, -1, 1030, 2000]), torch.full((5,), 7.0)
    ours, theirs = tile.clone(), tile.clone()
    emulated.exp2_rowsum_cuda(ours, offset, sums, target_col=target, target_exp=target_exp, stream=0)
    host = torch.empty(5)
    host_exp = torch.full((5,), 7.0)
    _cpu._C.exp2_rowsum_(theirs, offset, host, target_col=target, target_exp=host_exp, isa="scalar")
    assert torch.equal(ours, theirs)
    assert torch.equal(target_exp, host_exp)
    assert torch.allclose(sums, host, rtol=1e-6)


def test_bad_arguments_are_named(emulated):
    tile, vector, index = torch.zeros(2, 5), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"partial must have shape \[1, 2\], got \[2, 2\]"):
        emulated.exp2_epilogue_cuda(tile, None, index, vector, torch.zeros(2, 2), start=0, stream=0)
    with pytest.raises(TypeError, match="target must be int64, got int32"):
        emulated.exp2_epilogue_cuda(tile, None, index.int(), vector, torch.zeros(1, 2), start=0, stream=0)
    with pytest.raises(ValueError, match="slope_y goes with a softcap"):
        emulated.target_logit_cuda(tile, tile, index, vector, vector, softcap=3.0, stream=0)
    with pytest.raises(ValueError, match=r"weight must have shape \[3, 5\], got \[3, 4\]"):
        emulated.target_logit_cuda(tile, torch.zeros(3, 4), index, vector, vector, stream=0)
    with pytest.raises(ValueError, match="tile must have contiguous columns"):
        emulated.exp2_epilogue_cuda(tile.T, None, index, vector, torch.zeros(1, 2), start=0, stream=0)
