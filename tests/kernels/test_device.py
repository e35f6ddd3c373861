"""On a CUDA device: bfloat16 through every configuration for this device, and the loss kernel, against float64; the
whole loss step without a wait for the device, and inside a CUDA graph.

V is ragged (32001, 50257, 151646: no multiple of a tile), and one case has over 2^31 exponentials, so that a 32-bit
offset would show.
"""

from __future__ import annotations

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
from mmrlhf.kernels.triton import configs, launch
from mmrlhf.ops import LoraAdapter, _triton, fused_preference_loss, linear_logp, reference
from mmrlhf.ops.token_statistics import token_statistics
from numerics import assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or launch.interpreted(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 30.0, "bias": True}], ids=str)
@pytest.mark.parametrize("v", [32001, 50257, 151646])
@pytest.mark.parametrize("n", [33, 1000])
def test_every_configuration(n, v, options, monkeypatch):
    problem = on_device(n, 512, v, **options)
    truth, baseline = both(problem)
    shape = launch.problem(problem.hidden, problem.weight, bias=problem.bias, softcap=problem.options.get("softcap"))
    candidates = [rule.config for rule in configs.CANDIDATES if configs.fits(rule, shape)]
    for config in (configs.pick(shape), *candidates, configs.pick_epilogue(shape)):
        monkeypatch.setattr(configs, "pick", lambda problem, config=config: config)
        rows, _ = _triton.forward(problem.head(), problem.hidden, problem.targets)
        assert_no_worse(rows.logp(), baseline, truth, name=str(config))


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
@pytest.mark.parametrize("options", [{"bias": True}, {"softcap": 30.0, "bias": True, "logit_scale": 1.2}], ids=str)
def test_every_gradient(options, keep):
    check_every_gradient(_triton, on_device(300, 512, 32001, **options), keep=keep, sum_dtype=torch.float32)


def test_offsets_beyond_32_bits():
    check_offsets_beyond_32_bits(_triton)


@pytest.mark.parametrize("kind", ["sigmoid", "bco_pair", "orpo"])
def test_loss_kernel(kind):
    check_objective(_triton, *objective(kind))


def preference_step(problem, trained, **options):
    """(loss, gradients) of four responses, two pairs, with weights, a margin's beta and the sft term."""
    leaves = [problem.hidden] + ([problem.weight, problem.bias] if trained else [])
    out = fused_preference_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        options["cu_seqlens"],
        options["pairs"],
        token_weight=options["token_weight"],
        reduction="mean",
        reference_scores=options["reference_scores"],
        beta=options["beta"],
        sft_weight=0.25,
        bias=problem.bias,
        memory_budget=options["budget"],
        backend="triton",
    )
    return out.loss, torch.autograd.grad(out.loss, leaves)


def scene(trained, budget, *, far=False, seed=0):
    """256 rows, of which `far` puts every fifth more than 44 nats below its largest logit."""
    problem = on_device(256, 256, 32001, bias=True, seed=seed)
    if far:
        problem.hidden[::5] *= 60
        problem.targets[::5] = (problem.hidden @ problem.weight.T + problem.bias).argmin(1)[::5]
    problem.hidden.requires_grad_()
    problem.weight.requires_grad_(trained)
    problem.bias.requires_grad_(trained)
    options = {
        "cu_seqlens": torch.tensor([0, 60, 130, 200, 256]).cuda(),
        "pairs": torch.tensor([[0, 1], [2, 3]]).cuda(),
        "token_weight": torch.rand(256).cuda(),
        "reference_scores": torch.randn(4).cuda(),
        "beta": torch.tensor([0.1, 0.2]).cuda(),
        "budget": budget,
    }
    return problem, options


CASES = [(False, None), (True, None), (True, 0)]


@pytest.mark.parametrize(("trained", "budget"), CASES, ids=["frozen", "kept", "recomputed"])
def test_the_loss_step_never_waits_for_the_device(trained, budget):
    """Also where rows have to be run again: the second step has 52 of them, and nobody on the host knows."""
    for far in (False, True):
        problem, options = scene(trained, budget, far=far)
        preference_step(problem, trained, **options)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss, grads = preference_step(problem, trained, **options)
            logp = linear_logp(problem.hidden, problem.weight, problem.targets, backend="triton", memory_budget=budget)
            logp.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(("trained", "budget"), CASES, ids=["frozen", "kept", "recomputed"])
def test_a_cuda_graph_holds_the_loss_and_its_gradients(trained, budget):
    """Captured on ordinary rows, replayed on others, of which some have to be run again: as an eager step on those."""
    problem, options = scene(trained, budget)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            preference_step(problem, trained, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grads = preference_step(problem, trained, **options)
    for far in (False, True):
        other, _ = scene(trained, budget, far=far, seed=7)
        with torch.no_grad():
            for name in ("hidden", "weight", "bias", "targets"):
                getattr(problem, name).copy_(getattr(other, name))
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_grads = preference_step(problem, trained, **options)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for ours, eager in zip(grads, expected_grads, strict=True):
            scale = float(eager.float().abs().max())
            torch.testing.assert_close(ours.float(), eager.float(), rtol=2e-2, atol=1e-3 * scale)


@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_rows_far_below_in_bfloat16(keep):
    """Every third row run again, by tensor cores: values and gradients as near to float64 as PyTorch's."""
    problem = on_device(200, 256, 32001, bias=True)
    problem.hidden[::3] *= 60
    problem.targets[:] = (problem.hidden @ problem.weight.T + problem.bias).argmin(1)
    truth = check_every_gradient(_triton, problem, keep=keep, sum_dtype=torch.float32)
    assert truth.min() < -100


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
def test_an_adapter(budget):
    """A LoRA on the head beside a bfloat16 weight, some rows run again: gradients of everything, a and b in float32."""
    problem = on_device(200, 256, 32001, bias=True)
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(*shape, generator=g).cuda() * 0.1 for shape in ((16, 256), (32001, 16)))
    problem.hidden[::3] *= 60
    problem.targets[::3] = (problem.hidden @ problem.weight.T).argmin(1)[::3]
    upstream = torch.randn(200, generator=g).cuda()

    def plain(hidden, weight, targets, *, bias, adapter):
        logits = (
            hidden @ weight.T + 0.5 * ((hidden @ adapter.a.to(hidden.dtype).T) @ adapter.b.to(hidden.dtype).T) + bias
        )
        return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    results = []
    for dtype, how in (
        (torch.float64, reference.linear_logp),
        (torch.bfloat16, plain),
        (torch.bfloat16, lambda *args, **k: linear_logp(*args, **k, backend="triton", memory_budget=budget)),
    ):
        low = torch.promote_types(dtype, torch.float32)
        leaves = problem.leaves(dtype) | {n: t.clone().to(low).requires_grad_() for n, t in (("a", a), ("b", b))}
        adapter = LoraAdapter(leaves["a"], leaves["b"], 0.5)
        logp = how(leaves["hidden"], leaves["weight"], problem.targets, bias=leaves["bias"], adapter=adapter)
        results.append((logp, *torch.autograd.grad((logp * upstream.to(logp.dtype)).sum(), list(leaves.values()))))
    for name, truth, baseline, ours in zip(("logp", *leaves), *results, strict=True):
        assert_no_worse(ours, baseline, truth, name=name)


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"softcap": 30.0, "bias": True}], ids=str)
def test_token_statistics(options):
    """One pass of the kernels with statistics, in bfloat16, some rows run again."""
    problem = on_device(300, 512, 32001, **options)
    problem.hidden[::7] *= 60
    given = {"bias": problem.bias, **problem.options}
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    truth = reference.token_statistics(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    logits = torch.nn.functional.linear(problem.hidden, problem.weight).float()  # rounded to bfloat16, in plain PyTorch
    logits = logits if problem.bias is None else logits + problem.bias.float()
    logits = torch.tanh(logits / 30.0) * 30.0 if problem.options else logits
    logp = logits.log_softmax(-1)
    own = logp.gather(1, problem.targets[:, None])[:, 0]
    base = reference.TokenStatistics(-(logp.exp() * logp).sum(1), (2 * logp).exp().sum(1), logits.mean(1), own)
    out = token_statistics(problem.hidden, problem.weight, problem.targets, **given, backend="triton")
    for name in ("entropy", "sum_p2", "mean_logit", "logp"):
        assert_no_worse(getattr(out, name), getattr(base, name), getattr(truth, name), name=name)
    assert (out.is_top1 == truth.is_top1).float().mean() > 0.99
