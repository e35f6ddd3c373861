"""Which decoders can share a prefix, image tokens that attend in both directions, and families that run apart."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from mmrlhf.batch import Layout
from mmrlhf.models import footprint, shared_prefix, sharing, vision
from mmrlhf.models.parts import text_config
from ordinary import assert_same, ordinary_hidden, pair, relative
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model


@pytest.mark.parametrize("window", [3, 6, 1000])
@pytest.mark.parametrize("share", [True, False])
def test_gemma3_image_blocks_attend_in_both_directions(window, share):
    """Blocks of 4 tokens under a window of 3 that cuts their past, of 6 that cuts across them, and of none."""
    from transformers.models.gemma3 import modeling_gemma3

    if window < 4 and not hasattr(modeling_gemma3, "create_masks_for_vision_model"):
        pytest.skip("older transformers let a block see past a window that is shorter than it; no real model is so")
    text = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    model, other, processor = pair("gemma3", **text)
    assert shared_prefix.can_share(model)[0]
    groups = tiny_groups(processor, (2, 5, 1), seed=7, images=(1, 2, 0), response_len=(4, 12))
    hidden = shared_prefix.response_hidden(model, batch_of(groups), share_prefix=share)
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


def test_gemma3_without_its_blocks_is_caught(monkeypatch):
    """Causal image tokens (a known fault of DPO trainers) are far off, and the self-check says so."""
    model, processor = tiny_model("gemma3")
    monkeypatch.setattr(shared_prefix, "image_blocks", lambda model, ids: None)
    with pytest.raises(RuntimeError, match="differ from separate rows"):
        shared_prefix.self_check(model, batch_of(tiny_groups(processor, (2, 3))))


def test_other_families_with_image_blocks_run_padded_rows_and_say_so_once(monkeypatch, caplog):
    """A family that masks like Gemma 3 but is not in the table is not packed; the result is the same."""
    monkeypatch.setattr(sharing, "IMAGE_BLOCKS", ())
    model, other, processor = pair("gemma3")
    groups = tiny_groups(processor, (2, 3, 1), seed=7, images=(1, 2, 0))
    with caplog.at_level(logging.INFO, logger="mmrlhf"):
        hidden = shared_prefix.response_hidden(model, batch_of(groups))
        shared_prefix.response_hidden(model, batch_of(groups))
    said = [record.getMessage() for record in caplog.records if "separate rows" in record.getMessage()]
    assert len(said) == 1
    assert "both directions" in said[0]
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_the_table_shares(family):
    assert shared_prefix.can_share(tiny_model(family)[0])[0]


@pytest.mark.parametrize("name", ["Molmo2Model", "Gemma4Model", "PaliGemmaModel"])
def test_families_that_mask_images_in_their_own_way_are_seen(name):
    import transformers as tf

    if not hasattr(tf, name):
        pytest.skip(f"this transformers has no {name}")
    assert sharing._bidirectional(getattr(tf, name))


def test_mllama_runs_text_apart_and_refuses_images():
    import transformers as tf

    own, processor = tiny_model("llava")
    text = {name: getattr(own.config.text_config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    picture = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    picture |= {"attention_heads": 4, "image_size": 28, "patch_size": 14, "vision_output_dim": 64}
    picture |= {"intermediate_layers_indices": [0], "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}
    config = tf.MllamaConfig(text_config={**text, **heads, "pad_token_id": 0}, vision_config=picture)
    model = tf.MllamaForConditionalGeneration(config)
    shared, reason = shared_prefix.can_share(model)
    assert not shared
    assert "cross-attention" in reason
    groups = tiny_groups(processor, (2, 3), images=(0, 0))
    want = ordinary_hidden(model, groups)
    assert relative(shared_prefix.response_hidden(model, batch_of(groups)), want) <= 1e-5
    batch = batch_of(groups).replace(vision={"pixel_values": torch.zeros(1, 1, 1, 3, 28, 28)})
    with pytest.raises(ValueError, match="cross-attention, which is not supported"):
        shared_prefix.response_hidden(model, batch)


def test_molmo2_is_refused_rather_than_mixed_up():
    model, processor = tiny_model("llava")
    batch = batch_of(tiny_groups(processor, (2, 2)))
    pooling = {"image_token_pooling": torch.zeros(8, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"image_token_pooling numbers the patches .*\(Molmo 2\) is not supported"):
        vision.encode(model, batch.replace(vision={**batch.vision, **pooling}))


def qwen3_5():
    """A tiny Qwen3.5 (linear attention and full attention in turn) with the processor of Qwen3-VL."""
    import transformers as tf

    reference, processor = tiny_model("qwen3_vl")
    text = {
        **{name: getattr(reference.config.text_config, name) for name in ("vocab_size", "hidden_size")},
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "pad_token_id": processor.tokenizer.pad_token_id,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        },
    }
    own = reference.config.vision_config
    picture = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    picture |= {"patch_size": own.patch_size, "spatial_merge_size": 2, "num_position_embeddings": 16}
    markers = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = tf.Qwen3_5Config(
        text_config=text, vision_config=picture, **{name: getattr(reference.config, name) for name in markers}
    )
    torch.manual_seed(0)
    return tf.Qwen3_5ForConditionalGeneration(config).train(), processor


def test_linear_attention_is_detected_and_runs_padded_rows(caplog):
    model, processor = qwen3_5()
    shared, reason = shared_prefix.can_share(model)
    assert not shared
    assert "linear_attention" in reason
    model = model.double()  # a decay's gradient is 2e5 times smaller than others here: float32 rounds it too coarsely
    other = copy.deepcopy(model)
    groups = tiny_groups(processor, (2, 3), seed=8)
    with caplog.at_level(logging.WARNING, logger="mmrlhf"):
        hidden = shared_prefix.response_hidden(model, batch_of(groups))
    assert sum("cannot share a prompt" in record.getMessage() for record in caplog.records) == 1
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-6)


def test_linear_attention_is_counted_as_the_rows_it_runs(tmp_path):
    model, _ = qwen3_5()
    model.save_pretrained(tmp_path)
    apart, twice = (
        footprint.activations(footprint.skeleton(tmp_path), layout).kept(checkpointing=False)
        for layout in (Layout((64,), ((64,),)), Layout((64,), ((64, 64),)))
    )
    assert 1.9 * apart < twice < 2.1 * apart


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"attn_logit_softcapping": 50.0}, "soft-capped"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"cross_attention_layers": [1]}, "cross-attention"),
    ],
)
def test_can_share_says_why_not(change, word):
    model, _ = tiny_model("llava")
    assert shared_prefix.can_share(model)[0]
    for name, value in change.items():
        setattr(text_config(model), name, value)
    shared, reason = shared_prefix.can_share(model)
    assert not shared
    assert word in reason
