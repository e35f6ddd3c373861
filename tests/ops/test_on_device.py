"""The torch backend on a CUDA device, where half-precision GEMMs give float32 themselves: an adapter, dW in blocks."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import LoraAdapter, linear_logp, reference
from numerics import HeadProblem, assert_no_worse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NAMES = ("hidden", "weight", "bias", "a", "b")


def plain_logp(hidden, weight, targets, *, bias, logit_scale, softcap, adapter):
    linear = torch.nn.functional.linear
    logits = (linear(hidden, weight) + linear(linear(hidden, adapter.a), adapter.b) * adapter.scale).float()
    logits = logits * logit_scale + bias.float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_adapter_and_every_gradient(dtype, softcap, budget):
    """9000 rows are two tiles; V = 32001 is four blocks and a ragged end; two rows are done again."""
    problem = HeadProblem.random(9000, 64, 32_001, dtype=dtype, bias=True)
    g = torch.Generator().manual_seed(1)
    tensors = {"hidden": problem.hidden, "weight": problem.weight, "bias": problem.bias}
    tensors |= {"a": torch.randn(5, 64, generator=g) / 8, "b": 0.3 * torch.randn(32_001, 5, generator=g)}
    if softcap is None:
        tensors["hidden"][[3, 8999]] *= 60
    targets, upstream = problem.targets.cuda(), torch.randn(9000, generator=g).cuda()

    def run(function, dtype, **ours):
        leaves = {k: v.to(problem.weight.dtype).to("cuda", dtype).requires_grad_() for k, v in tensors.items()}
        head = {"bias": leaves["bias"], "logit_scale": 0.9, "softcap": softcap}
        adapter = LoraAdapter(leaves["a"], leaves["b"], 1.5)
        logp = function(leaves["hidden"], leaves["weight"], targets, **head, adapter=adapter, **ours)
        logp.backward(upstream.to(logp.dtype))
        return logp, {name: leaf.grad for name, leaf in leaves.items()}

    truth, true = run(reference.linear_logp, torch.float64)
    base, plain = run(plain_logp, dtype)
    out, grads = run(linear_logp, dtype, memory_budget=budget, backend="torch")
    assert_no_worse(out, base, truth, name="logp")
    for name in NAMES:
        assert grads[name].dtype == dtype
        assert_no_worse(grads[name], plain[name], true[name], name=name)
