"""The parts of a model: its head as plain numbers (K25), its wrappers taken off."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.models import shared_prefix
from mmrlhf.models.parts import base_model, lm_head
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model


def test_head_of_every_family_gives_the_models_logits():
    for family in FAMILIES:
        model, processor = tiny_model(family)
        assert shared_prefix.self_check(model, batch_of(tiny_groups(processor, (1,)))).head_error < 1e-6


@pytest.mark.parametrize(
    ("settings", "scale", "softcap"),
    [
        ({}, 1.0, None),
        ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"logits_scaling": 8.0}, 0.125, None),
        ({"lm_head_multiplier": 0.5}, 0.5, None),
        ({"final_logit_softcapping": None, "logit_scale": None}, 1.0, None),
    ],
)
def test_logit_scale_and_softcap(settings, scale, softcap):
    model, _ = tiny_model("llava", **settings)
    head = lm_head(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.weight is model.lm_head.weight
    assert head.bias is None


def test_bad_logit_scale():
    model, _ = tiny_model("llava", logits_scaling=0.0)
    with pytest.raises(ValueError, match=r"logits_scaling .* must be a positive number, got 0\.0"):
        lm_head(model)


def granite_and_cohere():
    import transformers as tf

    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    yield tf.GraniteForCausalLM(tf.GraniteConfig(logits_scaling=4.0, **small))
    yield tf.CohereForCausalLM(tf.CohereConfig(logit_scale=0.25, **small))
    yield tf.Gemma2ForCausalLM(tf.Gemma2Config(final_logit_softcapping=5.0, head_dim=8, **small))


def test_scaled_and_capped_heads_give_the_models_logits():
    ids = torch.tensor([[5, 6, 7, 8]])
    for model in granite_and_cohere():
        head = lm_head(model)
        with torch.no_grad():
            hidden = model.model(input_ids=ids).last_hidden_state
            logits = head.logit_scale * (hidden @ head.weight.T)
            if head.softcap:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_lora_and_quantised_heads_are_refused():
    from peft import LoraConfig, get_peft_model

    model, _ = tiny_model("llava")
    with_adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match="lm_head carries an adapter"):
        lm_head(with_adapter)
    model, _ = tiny_model("llava")
    whole = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    head = lm_head(whole)
    assert head.weight.requires_grad
    assert head.weight is base_model(whole).lm_head.modules_to_save["default"].weight
    model, _ = tiny_model("llava")
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, 64)
    with pytest.raises(ValueError, match="a quantised or custom head is not supported"):
        lm_head(model)


def test_prompt_learning_is_refused():
    from peft import PromptTuningConfig, TaskType, get_peft_model

    model, _ = tiny_model("llava")
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=2,
        token_dim=32,
        num_layers=2,
        num_attention_heads=4,
        num_transformer_submodules=1,
    )
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters add tokens outside the model"):
        base_model(get_peft_model(model, config))
