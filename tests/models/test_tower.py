"""The vision tower in one attention call a layer: the same features as a call a window, and who is left alone.

The kernel is a stand-in that runs SDPA a piece on the CPU; what is tested is what it is handed, and by whom.
"""

from __future__ import annotations

import copy

import pytest
import torch

from mmrlhf.models import tower, varlen, vision
from mmrlhf.models.parts import vision_modules
from mmrlhf.models.shared_prefix import response_hidden
from tiny import tiny_batch, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def calls(monkeypatch):
    """Every call of the kernel: how many pieces it was given, and the longest."""
    found = []
    monkeypatch.setattr(tower, "kernel", lambda *kind: (one_call(found), "stand-in"))
    return found


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def test_features_and_gradients_are_those_of_a_call_a_window(family, calls, monkeypatch):
    model, processor = tiny_model(family)
    batch = tiny_batch(model, processor)
    own = copy.deepcopy(model)
    monkeypatch.setattr(tower, "install", lambda model: False)
    want = vision.encode(own, batch, grad=True).image.tokens
    want.square().sum().backward()
    assert calls == []
    monkeypatch.undo()
    monkeypatch.setattr(tower, "kernel", lambda *kind: (one_call(calls), "stand-in"))
    got = vision.encode(model, batch, grad=True).image.tokens
    got.square().sum().backward()
    assert calls  # one a layer
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(model.named_parameters(), own.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)


def one_call(found):
    def run(query, key, value, ends, longest, scale):
        lengths = ends.diff().tolist()
        assert ends.dtype == torch.int32
        assert (longest, query.shape[0]) == (max(lengths), sum(lengths))
        found.append(len(lengths))
        return tower.sdpa_pieces(*(t.transpose(0, 1) for t in (query, key, value)), lengths, scale=scale)

    return run


def test_the_decoder_keeps_its_own(calls):
    """The tower's function and the packed one live side by side; a copy of the model keeps both."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = tiny_batch(model, processor)
    twin = copy.deepcopy(model)
    first = response_hidden(model, batch)
    (_, found), *_ = vision_modules(model, projector=False)
    assert found.config._attn_implementation == tower.NAME
    assert model.config.text_config._attn_implementation == "mmrlhf"
    count = len(calls)
    assert count == len(found.blocks)
    torch.testing.assert_close(response_hidden(copy.deepcopy(model), batch), first)
    assert len(calls) == 2 * count
    torch.testing.assert_close(response_hidden(twin, batch), first)


def test_without_a_kernel_nothing_is_set():
    model, processor = tiny_model("qwen2_5_vl")
    response_hidden(model, tiny_batch(model, processor))
    (_, found), *_ = vision_modules(model, projector=False)
    assert found.config._attn_implementation == "sdpa"
    run, reason = tower.kernel(CPU, torch.bfloat16, 80)
    assert run is None
    assert "this is cpu" in reason


def test_a_choice_of_the_user_stays(calls):
    model, processor = tiny_model("qwen2_5_vl")
    model.set_attn_implementation({"vision_config": "eager"})
    vision.encode(model, tiny_batch(model, processor))
    assert calls == []


def test_a_model_that_was_moved_away_runs_sdpa(calls, monkeypatch):
    """The name stays set when the kernel no longer applies: then SDPA a piece, with the lengths it was handed."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = tiny_batch(model, processor)
    want = vision.encode(model, batch).image.tokens
    monkeypatch.setattr(tower, "kernel", lambda *kind: (None, "moved"))
    count = len(calls)
    torch.testing.assert_close(vision.encode(model, batch).image.tokens, want)
    assert len(calls) == count


def test_kernels_are_tested_before_they_are_used(monkeypatch):
    def right(query, key, value, ends, longest, scale):
        return tower.sdpa_pieces(*(t.transpose(0, 1) for t in (query, key, value)), ends.diff().tolist(), scale=scale)

    def wrong(*arguments):
        return right(*arguments) * 1.5

    real = tower.self_test
    assert real(right, CPU, torch.float32, 16) == ""
    assert "self-test error" in real(wrong, CPU, torch.float32, 16)
    listed = [("absent", None, "not available"), ("wrong", wrong, ""), ("right", right, "")]
    monkeypatch.setattr(varlen, "bidirectional", lambda: iter(listed))
    monkeypatch.setattr(tower, "self_test", lambda run, device, *rest: real(run, CPU, *rest))
    choose = tower.kernel.__wrapped__
    assert choose(torch.device("cuda"), torch.bfloat16, 16) == (right, "right")
    monkeypatch.setattr(varlen, "bidirectional", lambda: iter(listed[:2]))
    run, reason = choose(torch.device("cuda"), torch.bfloat16, 16)
    assert run is None
    assert "absent: not available; wrong: self-test error" in reason


@pytest.mark.parametrize("scaled", [True, False], ids=["2.11", "2.10"])
def test_launchers_scale_as_asked(monkeypatch, scaled):
    """torch 2.10's function has no scale; the query takes it."""

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None):
        return tower.sdpa_pieces(
            *(t.transpose(0, 1) for t in (query, key, value)),
            cu_q.diff().tolist(),
            scale=scale or query.shape[-1] ** -0.5,
        )

    def older(query, key, value, cu_q, cu_k, max_q, max_k):
        return varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k)

    monkeypatch.setattr(varlen, "_find", lambda module, name: (varlen_attn if scaled else older, ""))
    _, run, _ = next(varlen.bidirectional())
    assert tower.self_test(run, CPU, torch.float32, 16) == ""
    tensors = [torch.randn(9, 2, 8) for _ in range(3)]
    want = tower.sdpa_pieces(*(t.transpose(0, 1) for t in tensors), [4, 5], scale=0.1)
    torch.testing.assert_close(run(*tensors, torch.tensor([0, 4, 9], dtype=torch.int32), 5, 0.1), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("width", [64, 80, 128])
def test_a_kernel_of_this_torch_passes(width):
    """80 is the head size of Qwen2.5-VL's tower."""
    run, name = tower.kernel(torch.device("cuda", 0), torch.bfloat16, width)
    assert run is not None, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_features_on_a_device():
    """bfloat16 on CUDA against float32 on the CPU: the error of bfloat16 in a tower of two layers."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = tiny_batch(model, processor)
    want = vision.encode(model, batch).image.tokens
    device = copy.deepcopy(model).to("cuda", torch.bfloat16)
    got = vision.encode(device, batch.to("cuda")).image.tokens.float().cpu()
    (_, found), *_ = vision_modules(device, projector=False)
    assert found.config._attn_implementation == tower.NAME
    assert (got - want).norm() < 5e-2 * want.norm()
