"""The named faults that are about devices, memory and offsets, and those of the head as a whole.

K03, K14, K15 and part of K24 need GPUs; what of them the CPU can say is here too: a meta tensor is on another device,
an allocation that fails can be arranged, and 2^31 is passed by a stride over memory that nobody touches.
"""

from __future__ import annotations

import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmrlhf.kernels.triton import configs, launch, launch_redo
from mmrlhf.ops import _triton, backend, checks, fused_preference_loss, linear_logp, reference
from mmrlhf.ops.token_statistics import token_statistics
from numerics import HeadProblem, assert_no_worse, plain_logp

CU, PAIRS = torch.tensor([0, 7, 15, 20]), torch.tensor([[0, 1], [2, 1]])
gpu = pytest.mark.gpu


def needs(devices: int):
    return pytest.mark.skipif(torch.cuda.device_count() < devices, reason=f"needs {devices} CUDA devices")


def fused(hidden, weight, targets, **options):
    cu, pairs, scores = (tensor.to(hidden.device) for tensor in (CU, PAIRS, torch.zeros(3)))
    return fused_preference_loss(hidden, weight, targets, cu, pairs, reference_scores=scores, sft_weight=0.5, **options)


@pytest.mark.parametrize("name", ["weight", "targets", "bias"])
@pytest.mark.parametrize("op", [linear_logp, token_statistics, fused], ids=lambda op: op.__name__)
def test_k03_mixed_device(op, name):
    """The message names both tensors and both devices; the meta device is as foreign as a GPU."""
    given = {
        "hidden": torch.zeros(20, 8),
        "weight": torch.zeros(11, 8),
        "targets": torch.zeros(20, dtype=torch.int64),
        "bias": torch.zeros(11),
    }
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=rf"{name} is on meta but hidden is on cpu: they must be on one device"):
        op(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


@gpu
@needs(1)
def test_k03_mixed_device_on_a_gpu():
    with pytest.raises(ValueError, match="weight is on cpu but hidden is on cuda:0"):
        linear_logp(torch.zeros(2, 8).cuda(), torch.zeros(11, 8), torch.zeros(2, dtype=torch.int64).cuda())


class OnCuda(torch.Tensor):
    """A CPU tensor that says it is on a GPU; `Looks` sees whether its values are looked at."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0)


class Looks(TorchDispatchMode):
    """How many operators ran: a comparison is a launch, and a bool() of it waits for the device."""

    ran = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran += 1
        return func(*args, **(kwargs or {}))


def on_cuda(*values: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).as_subclass(OnCuda)


ROWS = torch.zeros(2, 8).as_subclass(OnCuda)
LOOKED_AT = [
    (
        (checks.targets, on_cuda(3, 11), ROWS, 11, -100),
        r"targets must be token ids in \[0, 11\) or ignore_index -100; entry 1 is 11",
    ),
    ((checks.cu_seqlens, on_cuda(0, 5, 3, 6), 6), "cu_seqlens must be in ascending order; entry 1 is 3"),
    ((checks.cu_seqlens, on_cuda(0, 5), 6), "cu_seqlens must run from 0 to 6"),
    ((checks.pairs, on_cuda(0, 2).view(1, 2), 2), r"pairs must be responses in \[0, 2\); entry 1 is 2"),
    (
        (checks.finite_weights, "token_weight", on_cuda(1, -1, dtype=torch.float32), 2, "one a token", ROWS),
        "token_weight must be finite and 0 or more; entry 1 is -1.0",
    ),
]


@pytest.mark.parametrize(("call", "message"), LOOKED_AT, ids=["targets", "order", "tokens", "pairs", "weights"])
def test_k05_a_device_is_looked_at_where_that_is_asked_for(call, message, monkeypatch):
    """Values on a GPU are not even compared, which would be launches and a wait; with MMRLHF_CHECK_VALUES=1 they are
    checked as on the CPU."""
    check, *arguments = call
    for value in ("", "0"):
        monkeypatch.setenv("MMRLHF_CHECK_VALUES", value)
        with Looks() as inside:
            check(*arguments)
        assert inside.ran == 0
    monkeypatch.setenv("MMRLHF_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=message):
        check(*arguments)


@gpu
@needs(1)
def test_k05_label_out_of_range_on_a_gpu(monkeypatch):
    monkeypatch.setenv("MMRLHF_CHECK_VALUES", "1")
    hidden, weight = torch.randn(4, 8, device="cuda"), torch.randn(11, 8, device="cuda")
    for bad in (11, -1):
        targets = torch.tensor([3, 4, bad, 5], device="cuda")
        with pytest.raises(ValueError, match=rf"targets must be token ids in \[0, 11\).*; entry 2 is {bad}"):
            linear_logp(hidden, weight, targets)


def untouched(rows: int, width: int, stride: int) -> torch.Tensor:
    """[rows, width] float32 with a huge row stride, over address space of which only these rows are ever memory.

    Below them are 2^31 entries more, which are 0: there a 32-bit offset lands, and not outside of the process.
    """
    size = 4 * ((1 << 31) + (rows - 1) * stride + width)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    flat = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.float32))
    return flat.as_strided((rows, width), (stride, 1), 1 << 31)


@pytest.mark.skipif(not launch.interpreted(), reason="test_device.py has 2.3e9 real exponentials")
def test_k12_int64_offsets():
    """A row of weight, hidden rows and exponentials whose offset is above 2^31: read and written where they are.

    As 32-bit numbers these offsets are negative, which is what a kernel without a cast to 64 bits would take.
    """
    stride = (1 << 30) + 16
    assert np.array(2 * stride).astype(np.int32) < 0
    problem = HeadProblem.random(3, 16, 3)
    config = configs.GemmConfig(4, 1, 16, 64, 16)
    z_y, offset, partial = torch.empty(3), torch.empty(3), torch.empty(1, 1, 3)
    wide = [untouched(3, 16, stride), untouched(3, 16, stride), untouched(3, 3, stride)]
    wide[0].copy_(problem.hidden)
    wide[1].copy_(problem.weight)
    results = []
    for hidden, weight, e in (wide, (problem.hidden, problem.weight, torch.empty(3, 3))):
        common = {"bias": None, "epilogue": launch.Epilogue()}
        launch.target_logit(hidden, weight, problem.targets, z_y=z_y, slope_y=None, offset=offset, **common)
        launch.exp2_gemm(
            hidden, weight, e, target=problem.targets, offset=offset, partial=partial, config=config, **common
        )
        results.append((z_y.clone(), e.clone(), partial.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not launch.interpreted(), reason="test_device.py has 2.3e9 real exponentials")
def test_k12_int64_offsets_of_tiles_and_rows_done_again():
    """The same of every other matrix: the epilogue's tile and exponentials, the product and the gradient by the rows,
    and each of rows that are done again, an adapter's parts included."""
    problem = HeadProblem.random(3, 16, 3)
    g = torch.Generator().manual_seed(1)
    low, up, product = (torch.randn(3, width, generator=g) for width in (4, 4, 16))
    target, rest, z_y, slope_y = torch.arange(3), torch.rand(3, generator=g), torch.zeros(3), None
    everything = launch_redo.select(torch.full((3,), float("inf")), z_y=z_y, offset=z_y)

    def run(matrix):
        """`matrix(width)`: an empty [3, width]."""

        def of(values):
            return matrix(values.shape[1]).copy_(values)

        hidden, weight = of(problem.hidden), of(problem.weight)
        common = {"target": target, "bias": None, "epilogue": launch.Epilogue()}
        vectors = {"z_y": z_y, "rest": rest, "slope_y": slope_y, "logit_scale": 1.0}
        e, calm, offset = matrix(3), torch.zeros(3), torch.full((3,), float("-inf"))
        sums = [torch.empty(1, 1, 3) for _ in range(3)]
        config = configs.EpilogueConfig(4, 1, 4, 64)
        tile = of(problem.hidden @ problem.weight.T)
        launch.exp2_epilogue(tile, e, start=0, offset=calm, partial=sums[0], config=config, **common)
        unit = matrix(16)
        launch.unit_gradient_(of(product), weight, target, offset=calm, out=unit, **vectors)
        adapter = {"low": of(low), "up": of(up)}
        launch_redo.maximum_(hidden, weight, everything, offset=offset, **common, **adapter)
        found = [e, unit, offset, *sums]
        for by_row, partial in ((False, sums[1]), (True, sums[2])):
            kept, again = matrix(3), matrix(16)
            shared = common | adapter | {"offset": offset, "partial": partial, "by_row": by_row}
            launch_redo.exponentials(hidden, weight, kept, everything, **shared)
            launch_redo.unit_gradient_(
                again, kept, weight, everything, target=target, offset=offset, by_row=by_row, **vectors
            )
            found += [kept, again]
        return found

    far = run(lambda width: untouched(3, width, (1 << 30) + 16))
    near = run(lambda width: torch.full((3, width), float("nan")))
    for got, want in zip(far, near, strict=True):
        assert want.isfinite().all()
        assert torch.equal(got, want)


@gpu
@needs(1)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_k14_side_stream(frozen):
    """On another stream than the default, its inputs freed and their memory given to others right after the call."""
    problem = HeadProblem.random(20, 64, 5003, dtype=torch.bfloat16, bias=True)

    def run():
        leaves = {k: v.cuda().detach().requires_grad_(k == "hidden" or not frozen) for k, v in problem.leaves().items()}
        loss = fused(leaves["hidden"], leaves["weight"], problem.targets.cuda(), bias=leaves["bias"]).loss
        loss.backward()
        return loss.detach(), *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)

    expected = run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            found = run()
            junk = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
            del junk
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@gpu
@needs(2)
def test_k15_second_device():
    """Tensors on cuda:1 while the current device is cuda:0, which it is again afterwards."""
    problem = HeadProblem.random(20, 64, 5003, dtype=torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        hidden = problem.hidden.to(device).requires_grad_()
        loss = fused(hidden, problem.weight.to(device), problem.targets.to(device)).loss
        loss.backward()
        results.append((loss.detach().cpu(), hidden.grad.cpu()))
        assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("arch", "reason"), [(75, "it needs compute capability 8.0, this device has 7.5"), (90, None)])
def test_k23_wrong_arch(arch, reason, monkeypatch):
    """A device older than the kernels says so before anything is launched; the choice then falls to the next row."""
    tensor = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda"))
    monkeypatch.setattr(launch, "arch", lambda tensor: arch)
    assert _triton.refuse((tensor, tensor)) == reason
    if reason is None:
        return
    rows = [row for row in backend.BACKENDS if row.name in ("triton", "torch")]
    monkeypatch.setattr(backend, "BACKENDS", tuple(rows))
    choice = backend.choose("linear_logp", tensor, tensor)
    assert choice.name == "torch"
    assert f"not triton: {reason}" in choice.reason
    with pytest.raises(RuntimeError, match=f"cannot run linear_logp on these tensors: {reason}"):
        backend.choose("linear_logp", tensor, tensor, requested="triton")


class Allocations(TorchDispatchMode):
    """Counts the operators that make a tensor with memory of its own; the one of number `failing` finds none left."""

    def __init__(self, failing: int = 0):
        super().__init__()
        self.failing, self.count = failing, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)}
        out = func(*args, **(kwargs or {}))
        made = (each for each in tree_leaves(out) if torch.is_tensor(each) and each.numel())
        if any(each.untyped_storage().data_ptr() not in given for each in made):
            self.count += 1
            if self.count == self.failing:
                raise torch.OutOfMemoryError("arranged")
        return out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("head_backend", ["torch", "cpu", "triton"], indirect=True)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_k24_oom_in_forward(one_tile, trained):
    """Whichever allocation fails, first to last: the error comes through, no input and no gradient was written to, and
    the next call is as if nothing had been. Where they are many, 60 of them; 12 of triton's, interpreted."""
    problem = HeadProblem.random(20, 8, 50, bias=True)
    leaves = {k: v.detach().requires_grad_(trained or k == "hidden") for k, v in problem.leaves().items()}
    before = {k: v.detach().clone() for k, v in leaves.items()}

    def step():
        out = fused(leaves["hidden"], leaves["weight"], problem.targets, bias=leaves["bias"])
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        return [out.loss.detach(), *torch.autograd.grad(out.loss, wanted)]

    with Allocations() as every:
        expected = step()
    assert every.count > 30
    most = 12 if one_tile == "triton" else 60
    for failing in range(1, every.count + 1, every.count // most + 1):
        with pytest.raises(torch.OutOfMemoryError, match="arranged"), Allocations(failing):
            step()
    assert all(torch.equal(leaf, before[key]) and leaf.grad is None for key, leaf in leaves.items())
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


@gpu
@needs(1)
def test_k24_oom_on_a_gpu():
    """A head that does not fit the memory left: OutOfMemoryError, and the smaller batch then works."""
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50257, 256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 50257, (64,), device="cuda")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (200 << 20)) / total)
    try:
        many = hidden.detach().repeat(128, 1).requires_grad_()
        with pytest.raises(torch.OutOfMemoryError):
            linear_logp(many, weight, targets.repeat(128)).sum().backward()
        linear_logp(hidden[:8], weight, targets[:8]).sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(11, 8, dtype=torch.int8), "weight must be float32 .*, got int8"),
        (torch.zeros(11, 8, dtype=torch.uint8), "weight must be float32 .*, got uint8"),
        (torch.zeros(11, 8).to(torch.float8_e4m3fn), "weight must be float32 .*, got float8_e4m3fn"),
        (torch.nn.Linear(8, 11), "weight must be a tensor .* got Linear"),
    ],
    ids=["int8", "4-bit", "float8", "module"],
)
@pytest.mark.parametrize("op", [linear_logp, token_statistics, fused], ids=lambda op: op.__name__)
def test_k25_unsupported_head(op, weight, message):
    """A quantised weight is not taken for numbers, nor a module for its weight."""
    with pytest.raises(TypeError, match=message):
        op(torch.zeros(20, 8), weight, torch.zeros(20, dtype=torch.int64))


@pytest.mark.parametrize(
    "option", [{"logit_scale": 0.5}, {"softcap": 2.0}, {"bias": torch.linspace(-2, 2, 31)}], ids=str
)
@pytest.mark.parametrize("name", ["torch", "cpu", "triton"])
def test_k25_no_part_of_the_head_is_ignored(option, name):
    """Scale, cap and bias change the result, on every backend of every op, and to what the definition says."""
    problem = HeadProblem.random(20, 8, 31)
    tensors = (problem.hidden, problem.weight, problem.targets)
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in option.items()}
    truth = reference.linear_logp(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    baseline = plain_logp(*tensors, **option)
    for got in (
        linear_logp(*tensors, **option, backend=name),
        token_statistics(*tensors, **option, backend=name).logp,
        fused(*tensors, **option, backend=name).logp,
    ):
        assert_no_worse(got, baseline, truth)
        assert (got - linear_logp(*tensors)).abs().max() > 0.1


def test_k25_tied_head_gets_both_gradients():
    """The embedding that is also the lm_head: what it gets as either is added up."""
    weight = torch.randn(31, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    twin = weight.detach().clone().requires_grad_()
    other = weight.detach().clone().requires_grad_()
    tokens, targets = torch.arange(6), torch.arange(6) + 1
    linear_logp(weight[tokens], weight, targets).sum().backward()
    linear_logp(twin[tokens], other, targets).sum().backward()
    torch.testing.assert_close(weight.grad, twin.grad + other.grad)
