"""The short way through LoRA layers against PEFT's own, and what is left to PEFT. Its device is put in the CPU's place.

In float64, where rounding A and B to the dtype of the input changes nothing, both compute the same numbers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmrlhf.models import adapters

peft = pytest.importorskip("peft")


@pytest.fixture
def everywhere(monkeypatch):
    """The short way on any device and dtype; counts how often it is gone."""
    calls = []
    real = adapters.adapted_linear
    monkeypatch.setattr(adapters, "_takes", lambda x: True)
    monkeypatch.setattr(adapters, "adapted_linear", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def adapted(*, dropout=0.0, bias=True, trained_base=False, **options):
    """(model with adapters whose B is not zero, the same with the short way), in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=bias), nn.Tanh(), nn.Linear(10, 4, bias=bias)).double()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "2"], lora_dropout=dropout, **options)
    plain = peft.get_peft_model(model, config)
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
        elif trained_base:
            parameter.requires_grad_(True)
    short = copy.deepcopy(plain)
    adapters.install(short)
    return plain, short


def outcome(model, x):
    """Output and every gradient, that of the input included."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6)])
def test_values_and_gradients_are_pefts(everywhere, bias, shape):
    plain, short = adapted(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    want, got = outcome(plain, x), outcome(short, x)
    assert len(everywhere) == 2
    assert list(got) == list(want)
    assert sum("lora_" in name for name in got) == 4
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12, msg=name)


def test_the_first_layer_has_no_gradient_of_its_input(everywhere):
    plain, short = adapted()
    x = torch.randn(3, 6, dtype=torch.float64)
    for model in (plain, short):
        model(x).sum().backward()
    for one, other in zip(plain.parameters(), short.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_gradients_keep_the_adapters_dtype(everywhere):
    """A bfloat16 layer with float32 adapters, as PEFT makes them: float32 gradients, bfloat16 rows."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(16, 8)).bfloat16(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    adapters.install(model)
    out = model(torch.randn(5, 16).bfloat16())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert all(g.abs().sum() > 0 for g in grads)
    assert len(everywhere) == 1


@pytest.mark.parametrize(
    "options", [{"dropout": 0.5}, {"trained_base": True}, {"use_dora": True}, {"lora_bias": True}], ids=str
)
def test_what_it_does_not_cover_goes_to_peft(everywhere, options):
    plain, short = adapted(**options)
    x = torch.randn(3, 6, dtype=torch.float64)
    found = []
    for model in (plain, short):
        torch.manual_seed(1)  # dropout's
        found.append(model(x))
    torch.testing.assert_close(*found)
    assert everywhere == []


def test_the_reference_is_the_model_without_adapters(everywhere):
    plain, short = adapted()
    x = torch.randn(3, 6, dtype=torch.float64)
    with short.disable_adapter(), plain.disable_adapter():
        assert torch.equal(short(x), plain(x))
    assert everywhere == []
    short.eval()
    short.merge_adapter()
    torch.testing.assert_close(short(x), plain(x))
    assert everywhere == []


def test_two_adapters_at_once_go_to_peft(everywhere):
    plain, short = adapted()
    for model in (plain, short):
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(short(x), plain(x))
    assert len(everywhere) == 1  # layer 2 has one


def test_a_copy_runs_its_own_weights(everywhere):
    """A bound method in an instance's dict must not stay bound to the layer it was copied from."""
    _, short = adapted()
    twin = copy.deepcopy(short)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert twin(x).abs().sum() == 0
    assert short(x).abs().sum() > 0
    assert adapters.install(short) == 0


def test_a_cpu_is_left_to_peft():
    plain, short = adapted()
    x = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(plain(x), short(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_it_is_nearer_to_float64_than_twice_pefts_error():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(256, 384)).to("cuda", torch.bfloat16)
    config = peft.LoraConfig(r=16, target_modules=["0"], init_lora_weights=False)
    plain = peft.get_peft_model(base, config)
    short, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    adapters.install(short)
    x = torch.randn(500, 256, device="cuda").bfloat16()
    truth, want, got = outcome(exact, x.double()), outcome(plain, x), outcome(short, x)
    for name, value in truth.items():
        error, allowed = ((one[name].double() - value).norm() / value.norm() for one in (got, want))
        assert error <= 2 * allowed + 1e-2, name
        assert got[name].dtype == want[name].dtype
