"""The cuda engine over emulated kernels (emulate.h): rows that are run again, an adapter on the head, a vocabulary on
several ranks; each against float64, from poisoned buffers, in parts of a few rows."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmrlhf.ops import LoraAdapter, linear_logp, reference, streaming
from mmrlhf.ops.streaming import Head
from numerics import HeadProblem, assert_no_worse, plain_logp

pytest.importorskip("mmrlhf._C", reason="the extension is not built")
pytestmark = pytest.mark.slow
N, H, V = 21, 16, 300
FAR = {"some": slice(0, None, 3), "all": slice(0, None), "first": slice(0, 1), "last": slice(N - 1, N)}


@pytest.fixture(autouse=True)
def small(engine, monkeypatch):
    """A workspace of 4 rows of exponentials: rows run again come in 6 parts."""
    from mmrlhf.ops import _gemm

    monkeypatch.setattr(_gemm, "WORKSPACE_BYTES", 4 * 304 * 4)


def scene(far="some", factor=200.0, **options):
    return HeadProblem.unlikely(N, H, V, far=FAR[far], factor=factor, **options)


def run(engine, head, hidden, targets, upstream, *, keep, **low):
    """The rows, and the gradients of hidden, weight and bias, and with an adapter of low and up."""
    kept = engine.Kept.empty(hidden.shape[0], head) if keep else None
    if kept is not None:
        kept.flat.fill_(torch.nan)
    unit_low = {"unit_low": torch.full_like(low["low"], torch.nan)} if low else {}
    rows, unit = engine.forward(head, hidden, targets, unit=True, keep=kept, **low, **unit_low)
    out = {
        name: None if like is None else torch.full(like.shape, torch.nan)
        for name, like in (("grad_weight", head.weight), ("grad_bias", head.bias), ("grad_up", head.up))
    }
    given = {k: v for k, v in out.items() if k != "grad_up"} | ({"grad_up": out["grad_up"], **low} if low else {})
    saved = streaming.Rows(rows.targets, rows.z_y, rows.slope_y, rows.offset, rows.rest, rows.redone)  # as autograd has
    engine.weight_grad(head, hidden, saved, upstream, keep=kept, **given)
    of_rows = [each * upstream[:, None] for each in (unit, unit_low.get("unit_low")) if each is not None]
    return rows, [*of_rows, *(grad for grad in out.values() if grad is not None)]


def upstream_of(n=N):
    return torch.randn(n, generator=torch.Generator().manual_seed(2))


def check(engine, problem, *, keep):
    upstream, expected = upstream_of(), []
    for dtype, how in ((torch.float64, reference.linear_logp), (torch.float32, plain_logp)):
        leaves = problem.leaves(dtype)
        logp = how(targets=problem.targets, **leaves, **problem.options)
        expected.append((logp, *torch.autograd.grad((logp * upstream.to(dtype)).sum(), list(leaves.values()))))
    rows, grads = run(engine, problem.head(), problem.hidden, problem.targets, upstream, keep=keep)
    for name, out, truth, baseline in zip(
        ("logp", "hidden", "weight", "bias"), [rows.logp(), *grads], *expected, strict=False
    ):
        assert_no_worse(out, baseline, truth, name=name)
    return rows, expected[0][0].detach()


def again(rows):
    return rows.offset - rows.z_y * streaming.LOG2E > 32


@pytest.mark.parametrize(
    ("far", "keep"), [("some", False), ("some", True), ("all", False), ("first", True), ("last", False)]
)
def test_wherever_they_are(engine, far, keep):
    rows, truth = check(engine, scene(far), keep=keep)
    assert truth[FAR[far]].max() < -100
    assert torch.equal(again(rows).nonzero()[:, 0], torch.arange(N)[FAR[far]])


@pytest.mark.parametrize(
    ("options", "keep"),
    [({"bias": True}, True), ({"softcap": 90.0, "bias": True}, False), ({"softcap": 70.0, "logit_scale": 0.5}, True)],
    ids=str,
)
def test_every_option_of_the_head(engine, options, keep):
    """A cap of 90 still leaves logp at -180: below the limit, and above it where the logits are small."""
    rows, truth = check(engine, scene(factor=60.0, **options), keep=keep)
    assert truth.min() < -100
    assert 0 < int(again(rows).sum()) < N


def test_between_44_and_88_nats(engine):
    """Where S' overflows nothing yet, but is above 2^64."""
    rows, truth = check(engine, scene(factor=6.0), keep=False)
    assert ((truth < -46) & (truth > -88)).sum() >= 3
    assert again(rows)[truth < -46].all()
    assert not again(rows)[truth > -43].any()


def test_none_of_them_and_the_others_are_left_alone(engine, monkeypatch):
    """Launched for nothing it changes no bit; nor does it of the rows beside those that are run again."""
    problem = HeadProblem.random(N, H, V, bias=True)
    found = run(engine, problem.head(), problem.hidden, problem.targets, upstream_of(), keep=False)
    far = scene("some", bias=True)
    mixed = engine.forward(far.head(), far.hidden, far.targets, unit=True)
    far.hidden[FAR["some"]] /= 200
    monkeypatch.setattr(engine, "redo", lambda *args, **kwargs: None)
    plain = run(engine, problem.head(), problem.hidden, problem.targets, upstream_of(), keep=False)
    assert torch.equal(found[0].logp(), plain[0].logp())
    assert all(torch.equal(a, b) for a, b in zip(found[1], plain[1], strict=True))
    others = torch.ones(N, dtype=torch.bool)
    others[FAR["some"]] = False
    alone = engine.forward(far.head(), far.hidden, far.targets, unit=True)
    assert torch.equal(mixed[0].logp()[others], alone[0].logp()[others])


def test_a_nonfinite_row_is_run_again_and_stays_alone(engine):
    """NaN is over the limit too: its row stays NaN, a row far below next to it is exact, the rest is as it was."""
    problem = scene("some")
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets)
    baseline = plain_logp(problem.hidden, problem.weight, problem.targets)
    problem.hidden[[4, 9]] = torch.tensor([torch.nan, torch.inf])[:, None]
    rows, unit = engine.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    others = [i for i in range(N) if i not in (4, 9)]
    assert not rows.logp()[[4, 9]].isfinite().any()
    assert_no_worse(rows.logp()[others], baseline[others], truth[others])
    assert unit[others].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 31, 1024, 2500])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_select(emulated, rows, density):
    """Indices in ascending order over blocks of rows, and how many; a NaN is chosen, nothing else is written."""
    bad = torch.rand(rows, generator=torch.Generator().manual_seed(rows)) < density
    rest = torch.where(bad, torch.inf, 2.0**64).float()
    rest[: rows // 3] = torch.where(bad[: rows // 3], torch.nan, 1.0)
    offset = torch.where(bad, 1e4 + 33.0, 1e4 + 31.0)
    for done in (False, True):
        index, count = torch.full((rows,), -7, dtype=torch.int32), torch.full((1,), -7, dtype=torch.int32)
        z_y = torch.full((rows,), 1e4 / streaming.LOG2E if done else 0.0)
        emulated.select_cuda(rest, z_y, offset, index, count, done=done, stream=0)
        assert index[: int(count)].tolist() == bad.nonzero()[:, 0].tolist()
        assert (index[int(count) :] == -7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["by place", "by row"])
@pytest.mark.parametrize("width", [1, 40, 72])
def test_kernels_in_half_precision(emulated, dtype, by_row, width):
    """maximum, exponentials and unit of some chosen rows, a part of them, with an adapter, a bias, a block's start;
    bfloat16 operands, whose GEMMs the CPU's library would not take. Other rows' entries are not written."""
    g = torch.Generator().manual_seed(width)
    rows, vocab, rank, start = 30, 261, 3, 5
    hidden = (torch.randn(rows, width, generator=g) * 4).to(dtype)
    weight = torch.full((vocab, width + 8 - width % 8), 7.0, dtype=dtype)[:, :width]  # rows of whole vectors
    weight.copy_(torch.randn(vocab, width, generator=g))
    low, up = torch.randn(rows, rank, generator=g), torch.randn(vocab, rank, generator=g)
    bias, target = torch.randn(vocab, generator=g), torch.randint(0, vocab + 20, (rows,), generator=g)
    chosen = torch.tensor([0, 2, 3, *range(5, 24), 29], dtype=torch.int32)
    index = torch.cat([chosen, torch.full((rows - chosen.numel(),), 10_000, dtype=torch.int32)])  # never followed
    count, first, capacity = torch.tensor([chosen.numel()], dtype=torch.int32), 2, 28
    part = {"first": first, "capacity": capacity, "index": index, "count": count, "stream": 0}
    words = {"bias": bias, "low": low, "up": up, "logit_scale": 0.5}
    z = 0.5 * (hidden.double() @ weight.double().T + low.double() @ up.double().T) + bias.double()
    some = chosen[first:].long()
    offset, partial = torch.full((rows,), -1e6), torch.full((3, capacity), torch.nan)
    emulated.redo_maximum_cuda(hidden, weight, target, offset, partial=partial, **words, **part)
    wanted = torch.full((rows,), -1e6)
    wanted[some] = (z[some].amax(1) * streaming.LOG2E).round().float()
    assert torch.equal(offset, wanted)
    out = torch.full((rows if by_row else capacity, vocab), 7.0, dtype=dtype)
    partial.fill_(torch.nan)
    emulated.redo_exponentials_cuda(
        hidden, weight, out, target, offset, partial=partial, start=start, by_row=by_row, **words, **part
    )
    e = torch.exp2(z * streaming.LOG2E - offset[:, None].double())
    e[torch.arange(vocab)[None] == target[:, None] - start] = 0
    places = some if by_row else torch.arange(some.numel())
    eps = 2e-5 if dtype == torch.float32 else 2**-8 + 2e-5
    assert torch.allclose(out[places].double(), e[some], rtol=eps, atol=1e-30)
    left = torch.ones(out.shape[0], dtype=torch.bool)
    left[places] = False
    assert (out[left] == 7).all()
    sums = torch.stack([part.sum(1) for part in e[some].split(128, 1)])
    assert torch.allclose(partial[:, : some.numel()].double(), sums, rtol=2e-5)
    assert partial[:, some.numel() :].isnan().all()
    z_y, rest = torch.randn(rows, generator=g) * 0 + offset / streaming.LOG2E, torch.rand(rows, generator=g)
    for matrix in (weight, up):
        unit = torch.full((rows, matrix.shape[1]), torch.nan)
        vectors = (target, z_y, offset, rest)
        emulated.redo_unit_cuda(unit, out, matrix, *vectors, by_row=by_row, logit_scale=0.5, **part)
        total = rest.double() + torch.exp2(z_y.double() * streaming.LOG2E - offset.double())
        own = torch.where((target < vocab)[:, None], matrix.double()[target.clamp(max=vocab - 1)], 0)
        truth = 0.5 * (rest.double()[some, None] * own[some] - out[places].double() @ matrix.double())
        truth /= total[some, None]
        assert torch.allclose(unit[some].double(), truth, rtol=1e-4, atol=1e-4)
        assert unit[[i for i in range(rows) if i not in some.tolist()]].isnan().all()


READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "repeat_interleave"}


class NoHostRead(TorchDispatchMode):
    """Raises for what would wait for a device if there were one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [a for a in torch.utils._pytree.tree_leaves(args[1:2]) if isinstance(a, torch.Tensor)]
        by_mask = name in ("index", "index_put", "index_put_") and any(m.dtype == torch.bool for m in masks)
        assert name not in READS, f"{func} reads from the device"
        assert not by_mask, f"{func} counts on the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("softcap", [None, 70.0])
def test_no_host_read(engine, keep, softcap):
    """forward, objective and weight_grad of rows of which some are far below: no operator that waits for a value."""
    problem = scene(bias=True, softcap=softcap)
    head, up, low = problem.head(), torch.randn(V, 2), torch.randn(N, 2)
    o = reference.Objective(
        torch.tensor([0, 20, N]),
        torch.tensor([[0, 1]]),
        token_weight=torch.ones(N),
        reduction="mean",
        reference_scores=torch.zeros(2),
        beta=torch.tensor([0.1]),
        sft_weight=0.5,
    )
    adapted = Head(head.weight, head.bias, 1.0, softcap, up)
    with NoHostRead():
        rows, _ = run(engine, head, problem.hidden, problem.targets, torch.ones(N), keep=keep)
        engine.objective(o, rows.logp())
        _, grads = run(engine, adapted, problem.hidden, problem.targets, torch.ones(N), keep=keep, low=low)
        engine.statistics(head, problem.hidden, problem.targets)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["recompute", "keep"])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_an_adapter(public, budget, far):
    """Two of them through autograd: logp and the gradients of hidden, weight, bias, a and b."""
    problem = scene(bias=True) if far else HeadProblem.random(N, H, V, bias=True, softcap=6.0, logit_scale=0.8)
    g, upstream = torch.Generator().manual_seed(0), upstream_of()
    parts = [torch.randn(*shape, generator=g) for shape in ((2, H), (V, 2), (3, H), (V, 3))]
    found = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, "torch"), (None, "cuda")):
        leaves, low = problem.leaves(dtype), [each.to(dtype or torch.float32).requires_grad_() for each in parts]
        adapters = (LoraAdapter(low[0], low[1], 0.1), LoraAdapter(low[2], low[3], 0.05))
        options = {**problem.options, "adapter": adapters, "memory_budget": budget, "backend": name}
        logp = linear_logp(targets=problem.targets, **leaves, **options)
        upstream_here = upstream.to(logp.dtype)
        found.append((logp, *torch.autograd.grad((logp * upstream_here).sum(), [*leaves.values(), *low])))
    for name, *three in zip(("logp", "hidden", "weight", "bias", "a", "b", "a2", "b2"), *found, strict=True):
        assert_no_worse(three[2], three[1], three[0], name=name)


def test_only_an_adapter_is_trained(public):
    """A frozen head: no [V, H] gradient is made, and those of a and b are the whole ones."""
    problem, found = scene(), []
    for wanted in (("a", "b"), ("hidden", "weight", "a", "b")):
        leaves = problem.leaves() | {"a": torch.ones(2, H), "b": torch.linspace(-1, 1, 2 * V).view(V, 2)}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
        adapter = LoraAdapter(leaves["a"], leaves["b"], 0.1)
        logp = linear_logp(leaves["hidden"], leaves["weight"], problem.targets, adapter=adapter, backend="cuda")
        found.append(torch.autograd.grad(logp.sum(), [leaves["a"], leaves["b"]]))
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


class Ranks:
    """Threads in the place of processes, of which one at a time runs: the emulated kernels have one state."""

    def __init__(self, bounds):
        world = len(bounds) - 1
        self.bounds, self.slots = bounds, [None] * world
        self.baton, self.barrier = threading.Lock(), threading.Barrier(world, timeout=60)

    def run(self, function):
        results = [None] * len(self.slots)

        def one(rank):
            with self.baton:
                try:
                    results[rank] = function(Shard(self, rank))
                except BaseException as error:
                    results[rank] = error
                    self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        failed = [each for each in results if isinstance(each, BaseException)]
        if failed:
            raise next((each for each in failed if not isinstance(each, threading.BrokenBarrierError)), failed[0])
        return results


class Shard:
    """`VocabShard` of one of the `Ranks`."""

    def __init__(self, ranks, rank):
        self.ranks, self.rank, self.bounds = ranks, rank, ranks.bounds
        self.start, self.stop = self.bounds[rank : rank + 2]
        self.largest = max(high - low for low, high in zip(self.bounds, self.bounds[1:], strict=False))

    def local(self, targets):
        return torch.where((targets >= self.start) & (targets < self.stop), targets - self.start, -1)

    def _wait(self):
        self.ranks.baton.release()
        try:
            self.ranks.barrier.wait()
        finally:
            self.ranks.baton.acquire()

    def _all(self, tensor):
        self.ranks.slots[self.rank] = tensor.clone()
        self._wait()
        every = torch.stack(self.ranks.slots)
        self._wait()
        return every

    def sum_(self, tensor):
        tensor.copy_(self._all(tensor).sum(0))

    def max_(self, tensor):
        tensor.copy_(self._all(tensor).amax(0))

    def any(self, flags):
        return self._all(flags).any(0)


@pytest.mark.parametrize("keep", [False, True], ids=["recompute", "keep"])
@pytest.mark.parametrize("bounds", [(0, 130, V), (0, 299, 299, V)], ids=["two", "an empty rank"])
@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 70.0}], ids=str)
def test_a_vocabulary_on_several_ranks(engine, keep, bounds, options):
    """Values and every gradient, rows far below included, with a rank that holds nothing; all ranks agree bitwise."""
    problem, upstream, g = scene(**options), upstream_of(), torch.Generator().manual_seed(1)
    low, up = torch.randn(N, 2, generator=g), torch.randn(V, 2, generator=g)
    wide, expected = (torch.cat([problem.hidden, low], 1), torch.cat([problem.weight, up], 1)), []
    for dtype, how in ((torch.float64, reference.linear_logp), (torch.float32, plain_logp)):
        leaves = [each.detach().to(dtype).requires_grad_() for each in wide]
        bias = None if problem.bias is None else problem.bias.to(dtype).requires_grad_()
        logp = how(*leaves, problem.targets, bias=bias, **problem.options)
        wanted = [each for each in (*leaves, bias) if each is not None]
        expected.append((logp, *torch.autograd.grad((logp * upstream.to(dtype)).sum(), wanted)))

    def rank(shard):
        cut = slice(shard.start, shard.stop)
        bias = None if problem.bias is None else problem.bias[cut]
        head = Head(problem.weight[cut], bias, 1.0, problem.options.get("softcap"), up[cut], shard)
        rows, grads = run(engine, head, problem.hidden, problem.targets, upstream, keep=keep, low=low)
        return rows.logp(), rows.offset, grads

    found = Ranks(bounds).run(rank)
    assert all(torch.equal(found[0][0], each[0]) and torch.equal(found[0][1], each[1]) for each in found)
    assert expected[0][0].min() < -100
    of_rows = torch.cat(found[0][2][:2], 1)
    of_weight = torch.cat([torch.cat([each[2][2], each[2][-1]], 1) for each in found])
    ours = [found[0][0], of_rows, of_weight]
    if problem.bias is not None:
        ours.append(torch.cat([each[2][3] for each in found]))
    for name, out, truth, baseline in zip(("logp", "hidden", "weight", "bias"), ours, *expected, strict=False):
        assert_no_worse(out, baseline, truth, name=name)


def test_bad_arguments_of_the_redo_are_named(emulated):
    vector, target = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    index, count = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    part = {"index": index, "count": count, "first": 2, "capacity": 3, "stream": 0}
    matrix, partial = torch.zeros(4, 8), torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"first and capacity must lie within the 4 rows, got 2 and 3"):
        emulated.redo_maximum_cuda(matrix, matrix, target, vector, partial=partial, **part)
    part["capacity"] = 2
    with pytest.raises(ValueError, match=r"partial must have shape \[1, 2\], got \[1, 3\]"):
        emulated.redo_maximum_cuda(matrix, matrix, target, vector, partial=partial, **part)
    with pytest.raises(ValueError, match="low goes with up"):
        emulated.redo_exponentials_cuda(matrix, matrix, None, target, vector, partial=None, low=matrix, **part)
    with pytest.raises(TypeError, match="index must be int32, got int64"):
        emulated.finish_cuda(partial, vector, vector, vector, vector, index=target, count=count, stream=0)
