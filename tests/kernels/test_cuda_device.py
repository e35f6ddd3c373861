"""On a CUDA device: the cuda backend against float64, each of its two ways to the exponentials, and its loss kernel.

The grids are those of test_device.py. Its kernels' arithmetic and indices are held on the host by
tests/csrc/test_cuda_emulated.py; here it is the device's compiler, its memory and its streams.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from device_problems import (
    both,
    check_every_gradient,
    check_objective,
    check_offsets_beyond_32_bits,
    objective,
    on_device,
)
from mmrlhf.ops import (
    LOSS_KINDS,
    LoraAdapter,
    backend,
    fused_preference_loss,
    linear_logp,
    reference,
    token_statistics,
)
from mmrlhf.ops.streaming import LOG2E
from numerics import assert_no_worse, plain_logp

_C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
from mmrlhf.ops import _cuda, _cuda_passes  # noqa: E402  (import the extension)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.build_info()["cuda"]), reason="needs a CUDA device and a build for it"
    ),
]


@pytest.fixture(params=["hopper", "epilogue"])
def way(request, monkeypatch):
    """How E is made. The Hopper GEMM is taken where it is built and fits; the other way is forced."""
    if request.param == "hopper":
        if not _cuda_passes._hopper(torch.cuda.current_device()):
            pytest.skip("no Hopper GEMM in this build, or another device")
    else:
        monkeypatch.setattr(_cuda, "hopper_plan", lambda head, hidden: None)
        monkeypatch.setattr(_cuda_passes, "hopper_plan", lambda head, hidden: None)
    return request.param


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 30.0, "bias": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "v"),
    [(torch.bfloat16, 32001), (torch.bfloat16, 50257), (torch.bfloat16, 151646), (torch.float32, 32001)],
    ids=str,
)
@pytest.mark.parametrize("n", [33, 1000])
def test_logp(way, dtype, n, v, options):
    problem = on_device(n, 512, v, dtype, **options)
    truth, baseline = both(problem)
    rows, _ = _cuda.forward(problem.head(), problem.hidden, problem.targets)
    assert_no_worse(rows.logp(), baseline, truth, name="logp")


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 30.0, "bias": True, "logit_scale": 1.2}], ids=str)
@pytest.mark.parametrize("width", [512, 333])
def test_every_gradient(way, options, keep, width):
    check_every_gradient(_cuda, on_device(300, width, 32001, **options), keep=keep, sum_dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_public_ops_when_asked_for(dtype):
    """backend="cuda" through autograd, a frozen and a trained head, and what the choice says."""
    problem = on_device(40, 64, 3001, dtype, bias=True)
    with backend.use_backend("cuda"):
        assert backend.choose("linear_logp", problem.hidden).name == "cuda"
    expected = []
    for kind, how in ((torch.float64, reference.linear_logp), (dtype, plain_logp)):
        leaves = problem.leaves(kind)
        logp = how(targets=problem.targets, **leaves)
        expected.append((logp, torch.autograd.grad(logp.sum(), list(leaves.values()))))
    for budget in (0, 1 << 30):
        leaves = problem.leaves()
        logp = linear_logp(targets=problem.targets, **leaves, backend="cuda", memory_budget=budget)
        grads = torch.autograd.grad(logp.sum(), list(leaves.values()))
        (truth, true_grads), (baseline, base_grads) = expected
        assert_no_worse(logp, baseline, truth, name="logp")
        for name, ours, base, true in zip(leaves, grads, base_grads, true_grads, strict=True):
            assert_no_worse(ours, base, true, name=name)


def test_fused_is_the_composition():
    problem = on_device(60, 64, 3001)
    ends, pairs = torch.tensor([0, 20, 45, 60]).cuda(), torch.tensor([[0, 1], [2, 1]]).cuda()
    settings = {"reference_scores": torch.zeros(3).cuda(), "sft_weight": 0.25, "reduction": "mean"}
    leaves, again = problem.leaves(), problem.leaves()
    fused = fused_preference_loss(
        targets=problem.targets, cu_seqlens=ends, pairs=pairs, **leaves, **settings, backend="cuda"
    )
    fused.loss.backward()
    logp = linear_logp(targets=problem.targets, **again, backend="cuda")
    composed = reference.Objective(ends, pairs, **settings)(logp)
    composed.loss.backward()
    assert torch.allclose(fused.loss, composed.loss, rtol=1e-6)
    for name in leaves:
        assert torch.allclose(leaves[name].grad.float(), again[name].grad.float(), rtol=0.02, atol=1e-5), name


def test_rows_far_below_are_run_again(way):
    problem = on_device(50, 64, 3001, bias=True)
    problem.hidden[::7] *= 200
    z = problem.hidden.float() @ problem.weight.float().T + problem.bias.float()
    problem.targets[::7] = z.argmin(1)[::7]
    truth, baseline = both(problem)
    rows, unit = _cuda.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    far = truth < -46
    assert far.any()
    assert (rows.offset - rows.z_y * LOG2E > 32)[far].all()
    assert_no_worse(rows.logp(), baseline, truth, name="logp")
    assert unit.isfinite().all()


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("far", [False, True], ids=["near", "far"])
def test_a_graph_holds_the_whole_loss(way, keep, far):
    """forward, objective and weight_grad never wait, and their capture replayed on new rows gives what a call gives,
    also where only the new rows have some to run again."""
    problem = on_device(60, 64, 3001, bias=True)
    if far:
        problem.hidden[::7] *= 200
        z = problem.hidden.float() @ problem.weight.float().T
        problem.targets[:] = z.argmin(1)
    head = problem.head()
    o = reference.Objective(
        torch.tensor([0, 20, 45, 60]).cuda(), torch.tensor([[0, 1], [2, 1]]).cuda(), reduction="mean", sft_weight=0.25
    )
    weight, bias = torch.empty_like(problem.weight), torch.empty_like(problem.bias.float())

    def step(hidden):
        kept = _cuda.Kept.empty(60, head) if keep else None
        rows, unit = _cuda.forward(head, hidden, problem.targets, unit=True, keep=kept)
        result, coef = _cuda.objective(o, rows.logp())
        _cuda.weight_grad(head, hidden, rows, coef, grad_weight=weight, grad_bias=bias, keep=kept)
        return result.loss, unit

    wanted = [each.clone() for each in (*step(problem.hidden), weight, bias)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(problem.hidden)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static, graph = torch.zeros_like(problem.hidden), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, unit = step(static)
    static.copy_(problem.hidden)
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip((loss, unit, weight, bias), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2 if found.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


def test_an_adapter_and_statistics():
    """A LoRA's gradients and token statistics in bfloat16, next to the torch backend's on the same device."""
    problem, found = on_device(50, 64, 3001, bias=True), {}
    a, b = torch.randn(4, 64, device="cuda") / 8, torch.randn(3001, 4, device="cuda") / 8
    for name in ("cuda", "torch"):
        leaves = [each.clone().requires_grad_() for each in (problem.hidden, a, b)]
        adapter = LoraAdapter(leaves[1], leaves[2], 0.5)
        logp = linear_logp(leaves[0], problem.weight, problem.targets, bias=problem.bias, adapter=adapter, backend=name)
        told = token_statistics(problem.hidden, problem.weight, problem.targets, bias=problem.bias, backend=name)
        grads = torch.autograd.grad(logp.sum(), leaves)
        found[name] = [logp.detach(), told.entropy, told.sum_p2, told.mean_logit, told.logp, *grads]
    for ours, theirs in zip(found["cuda"], found["torch"], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))


def test_a_nonfinite_row_stays_its_own(way):
    problem = on_device(50, 64, 3001)
    clean, unit = _cuda.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    problem.hidden[7, 3] = float("nan")
    rows, lost = _cuda.forward(problem.head(), problem.hidden, problem.targets, unit=True)
    others = torch.arange(50, device="cuda") != 7
    assert rows.logp()[7].isnan()
    assert torch.equal(rows.logp()[others], clean.logp()[others])
    assert torch.equal(lost[others], unit[others])


def test_offsets_beyond_32_bits(way):
    check_offsets_beyond_32_bits(_cuda)


@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_loss_kernel(kind):
    check_objective(_cuda, *objective(kind))


def test_loss_kernel_never_waits_and_a_graph_holds_it():
    """No wait for the device, and a captured launch computes from new values of its inputs."""
    o, logp = objective("bco_pair")
    o = dataclasses.replace(o, num_pairs=torch.tensor(96.0, device="cuda"))
    wanted, _ = _cuda.objective(o, logp), torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _cuda.objective(o, logp)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static, graph = torch.zeros_like(logp), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result, coef = _cuda.objective(o, static)
    static.copy_(logp)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result.loss, wanted[0].loss)
    assert torch.equal(coef, wanted[1])


def test_another_stream_is_used():
    """The launch goes to torch's current stream: behind what that stream does, not beside it."""
    o, logp = objective("sigmoid")
    wanted, stream, late = _cuda.objective(o, logp), torch.cuda.Stream(), torch.zeros_like(logp)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(logp)
        found = _cuda.objective(o, late)
    stream.synchronize()
    assert torch.equal(found[1], wanted[1])


def test_a_cpu_tensor_is_refused_with_the_reason():
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for .*its tensors must be on a CUDA device, not cpu"):
        backend.choose("linear_logp", torch.zeros(2, 3), requested="cuda")
    with pytest.raises(RuntimeError, match=r"it takes float32 and bfloat16, not float16"):
        backend.choose("linear_logp", torch.zeros(2, 3, dtype=torch.float16, device="cuda"), requested="cuda")
