"""AdamW with master copies, the learning rate, and the state that goes into a checkpoint."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from mmrlhf.config import OptimConfig
from mmrlhf.train.optim import Optimizer, learning_rate


def small_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    (model(inputs.to(next(model.parameters()).dtype)).float().pow(2).sum() * scale).backward()


def test_learning_rate_warms_up_and_falls_to_its_floor():
    settings = OptimConfig(lr=2.0, warmup=0.3, final_lr=0.1)
    rates = [learning_rate(step, 10, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([2 / 3, 4 / 3, 2.0])
    assert rates[3] == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[3:]))
    assert learning_rate(10, 10, settings) == pytest.approx(0.2)
    halfway = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 3 / 7)))
    assert rates[6] == pytest.approx(halfway)


@pytest.mark.parametrize(("warmup", "total"), [(0.0, 1), (1.0, 1), (1.0, 4), (0.1, 3)])
def test_learning_rate_is_positive_at_every_step(warmup, total):
    rates = [learning_rate(step, total, OptimConfig(lr=1.0, warmup=warmup)) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)


def test_steps_are_those_of_torch_with_decay_on_matrices_only():
    settings = OptimConfig(lr=1e-2, weight_decay=0.1, clip=0.5, betas=(0.8, 0.95), eps=1e-6)
    mine, theirs = small_model(), small_model()
    optimizer = Optimizer(mine.named_parameters(), settings)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in theirs.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    for step in range(5):
        optimizer.zero_grad()
        adamw.zero_grad()
        backward(mine, step)
        backward(theirs, step)
        norm = optimizer.grad_norm()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert float(norm) == pytest.approx(float(expected), rel=1e-6)
        assert float(norm) > 0.5, "the test must clip"
        optimizer.step(lr=1e-2, grad_norm=float(norm))
        adamw.step()
    for name, parameter in mine.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-6, atol=1e-7)


def test_bfloat16_gradients_add_up_in_float32():
    """256 micro-batches of the same gradient: a bfloat16 sum would stop growing at 256 times its last bit."""
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    backward(model, 0)
    once = [g.clone() for g in optimizer.gradients()]
    for _ in range(255):
        backward(model, 0)
    for total, single in zip(optimizer.gradients(), once, strict=True):
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, single * 256, rtol=1e-5, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_bfloat16_follows_float32():
    """The rounded model's masters go where a float32 model goes, to the noise of bfloat16 gradients."""
    settings = OptimConfig(lr=1e-4, eps=1e-3)
    narrow, wide = small_model(torch.bfloat16), small_model(torch.bfloat16).float()
    start = {name: p.detach().clone() for name, p in wide.named_parameters()}
    optimizers = [Optimizer(model.named_parameters(), settings) for model in (narrow, wide)]
    for step in range(20):
        for model, optimizer in zip((narrow, wide), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step(lr=1e-4, grad_norm=float(optimizer.grad_norm()))
    for name, parameter in wide.named_parameters():
        moved = parameter - start[name]
        apart = optimizers[0].stepped[name] - parameter
        assert apart.norm() < 0.05 * moved.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_back_bitwise(dtype):
    settings = OptimConfig(lr=1e-2)
    model = small_model(dtype)
    optimizer = Optimizer(model.named_parameters(), settings)

    def steps(model: nn.Module, optimizer: Optimizer, numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step(lr=1e-2, grad_norm=float(optimizer.grad_norm()))

    steps(model, optimizer, range(3))
    saved = {key: value.clone() for key, value in optimizer.state().items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, optimizer, range(3, 6))

    again = small_model(dtype, seed=1)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            parameter.copy_(weights[name])
    restored = Optimizer(again.named_parameters(), settings)
    restored.load_state(saved)
    steps(again, restored, range(3, 6))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    for key, value in optimizer.state().items():
        assert torch.equal(value, restored.state()[key]), key


def test_state_of_another_model_is_refused():
    optimizer = Optimizer(small_model().named_parameters(), OptimConfig())
    with pytest.raises(ValueError, match=r"1 parameters that are not trained here: 7\.weight"):
        optimizer.load_state({"7.weight/exp_avg": torch.zeros(3)})


def test_close_gives_the_model_back():
    model = small_model(torch.bfloat16)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    backward(model, 0)
    optimizer.close()
    backward(model, 0)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_float16_and_nothing_to_train_are_refused():
    with pytest.raises(ValueError, match=r"0\.weight is float16.*set model\.dtype to bfloat16 or float32"):
        Optimizer(small_model(torch.float16).named_parameters(), OptimConfig())
    with pytest.raises(ValueError, match="every parameter is frozen"):
        Optimizer(small_model().requires_grad_(False).named_parameters(), OptimConfig())
