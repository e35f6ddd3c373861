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


def with_lora(**settings):
    """A tiny model with a LoRA on its lm_head, whose b is not zero."""
    from peft import LoraConfig, get_peft_model

    model, _ = tiny_model("llava")
    options = {"r": 2, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"], **settings}
    return randomised(get_peft_model(model, LoraConfig(**options)))


def randomised(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def assert_models_logits(model):
    whole, ids = base_model(model), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        hidden = whole.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(lm_head(model).logits(hidden), whole(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_lora_on_the_head_gives_its_factors():
    """Of every adapter that is active, as PEFT would add it: several, none where switched off, none where merged."""
    from peft import LoraConfig

    model = with_lora()
    layer = base_model(model).lm_head
    head = lm_head(model)
    assert head.weight is layer.base_layer.weight
    ((a, b, scale),) = head.adapters
    assert (a is layer.lora_A["default"].weight, b is layer.lora_B["default"].weight, scale) == (True, True, 4.0)
    assert_models_logits(model)
    model.add_adapter("other", LoraConfig(r=3, use_rslora=True, target_modules=["lm_head"]))
    randomised(model).base_model.set_adapter(["default", "other"])
    assert [a.shape[0] for a, _, _ in lm_head(model).adapters] == [2, 3]
    assert_models_logits(model)
    with model.disable_adapter():
        assert lm_head(model).adapters == ()
        assert_models_logits(model)
    model.merge_adapter()
    assert lm_head(model).adapters == ()
    assert_models_logits(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "'default' is DoRA or another variant"),
        ({"lora_bias": True}, "'default' has a bias of its own"),
        ({"lora_dropout": 0.25}, "'default' is trained with a dropout of 0.25"),
    ],
    ids=str,
)
def test_adapters_that_are_more_than_a_lora_are_refused(settings, message):
    model = with_lora(**settings)
    with pytest.raises(ValueError, match=f"lm_head carries an adapter .*{message}"):
        lm_head(model)
    if "lora_dropout" in settings:  # which acts in training alone
        with torch.no_grad():
            assert len(lm_head(model).adapters) == 1
        model.eval().requires_grad_(False)
        assert_models_logits(model)


def test_other_adapters_and_quantised_heads_are_refused():
    from peft import LoHaConfig, LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llava")[0], LoHaConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head carries an adapter \(peft\.tuners\.loha.* only a plain LoRA"):
        lm_head(model)
    merged = with_lora()
    merged.merge_adapter()
    base_model(merged).lm_head.enable_adapters(False)
    with pytest.raises(ValueError, match="merged into the weight and switched off at once"):
        lm_head(merged)
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
