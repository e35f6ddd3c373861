"""Liger's layer kernels in the decoder agree with transformers' layers, through the packed path, mRoPE included.

Without a GPU the kernels run in Triton's interpreter, which hands a kernel Python floats where it expects scalars and
has none of libdevice: `interpreted` gives it both. That is slow, so two decoders run there; all of them on a GPU.
"""

from __future__ import annotations

import logging

import pytest
import torch

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

from mmrlhf.models import liger, shared_prefix
from mmrlhf.models.parts import decoder
from ordinary import assert_same, ordinary_hidden, pair
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model

CPU_FAMILIES = {"qwen2_5_vl": 1, "llava_onevision": 0}  # pictures: mRoPE; and one that liger-kernel has nothing for


@pytest.fixture
def interpreted(monkeypatch):
    import numpy as np
    import triton.language as tl
    from liger_kernel.ops import geglu, rms_norm
    from triton.runtime import interpreter

    real = interpreter._implicit_cvt

    def convert(argument):
        if type(argument) is float:
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return real(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.math.rsqrt(x))
    monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.fixture(autouse=True)
def originals(monkeypatch):
    """The rotary functions of transformers' modules as they were, after each test."""
    import importlib

    for family in ("llama", "qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "mistral"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name in liger._ROTARY:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("family", CPU_FAMILIES)
def test_agrees_with_the_models_own_layers(family, interpreted, caplog):
    """One prompt and two short responses: hidden states and every gradient."""
    model, other, processor = pair(family)
    groups = tiny_groups(
        processor, (2,), seed=1, response_len=(1, 2), prompts=("a cat",), images=(CPU_FAMILIES[family],)
    )
    want = ordinary_hidden(other, groups)  # before the rotary function of both is patched
    with caplog.at_level(logging.INFO, logger="mmrlhf"):
        assert liger.apply(model) == ("rms_norm", "swiglu", "rope")
    assert "rms_norm in 5 modules, swiglu in 2, rope" in caplog.text
    hidden = shared_prefix.response_hidden(model, batch_of(groups))
    assert_same(model, other, hidden, want, tolerance=1e-5)
    assert liger.apply(model) == liger.applied(model) == ("rms_norm", "swiglu", "rope")
    assert liger.applied(other) == ()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_on_cuda(family):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model, other, processor = pair(family)
    model, other = model.cuda(), other.cuda()
    batch = batch_of(tiny_groups(processor, (2, 3), seed=1))
    batch = shared_prefix.prepare(model, batch).to("cuda")
    want = shared_prefix.response_hidden(other, batch)
    want.sum().backward()
    assert "rms_norm" in liger.apply(model)
    hidden = shared_prefix.response_hidden(model, batch)
    hidden.sum().backward()
    # tf32 is off in tests; the kernels' own sums are float32
    assert (hidden - want).norm() <= 1e-4 * want.norm()
    largest = max(p.grad.norm() for p in other.parameters() if p.grad is not None)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        if theirs.grad is not None:
            assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_kernels(family, monkeypatch):
    """Norms and MLPs of the decoder, and only there; nothing in transformers changes but the rotary function."""
    import sys

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, _ = tiny_model(family)
    module = sys.modules[type(decoder(model)).__module__]
    before = dict(vars(module))
    found = liger.apply(model)
    assert found[0] == "rms_norm"
    assert found[1] == ("geglu" if family == "gemma3" else "swiglu")
    assert ("rope" in found) == (family != "glm4v")
    changed = {name for name, value in vars(module).items() if before.get(name) is not value}
    assert changed <= set(liger._ROTARY)
    own = {id(part) for part in decoder(model).modules()}
    patched = [part for part in model.modules() if "forward" in vars(part)]
    assert patched
    assert all(id(part) in own for part in patched)
    names = [type(part).__name__ for part in decoder(model).modules()]
    assert sum(name.endswith("RMSNorm") for name in names) + 2 == len(patched)


def test_rotary_function_of_other_devices_stays_the_original(monkeypatch):
    """A model of the same family on the CPU computes what it did before, to the last bit."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model, other, processor = pair("llava")
    ids = batch_of(tiny_groups(processor, (2,), images=(0,))).input_ids[None]
    want = other(input_ids=ids).logits
    liger.apply(model)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert torch.equal(other(input_ids=ids).logits, want)


def test_refuses_what_it_cannot_do(monkeypatch):
    model, _ = tiny_model("llava")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"model\.liger: Liger's kernels run on CUDA, the model is on cpu"):
            liger.apply(model)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model.config.text_config.hidden_act = "gelu"
    with pytest.raises(ValueError, match=r"LigerSwiGLUMLP computes silu, this decoder's MLP has gelu"):
        liger.apply(model)
    model.config.text_config.hidden_act = "silu"
    model.config.text_config.model_type = "mamba"
    with pytest.raises(ValueError, match=r"no kernels are known for LlamaModel \(decoders: gemma3, glm4v, llama"):
        liger.apply(model)
    model.config.text_config.model_type = "llama"
    import sys

    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match=r"model\.liger needs liger-kernel"):
        liger.apply(model)
    assert liger.applied(model) == ()
