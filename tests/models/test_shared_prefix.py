"""Packed rows against the model's own ordinary forward, one full row a response: values, gradients, positions."""

from __future__ import annotations

import inspect

import pytest
import torch

from mmrlhf.batch import layout_of
from mmrlhf.models import attention, shared_prefix, vision
from mmrlhf.models.parts import inner_model, text_config, vision_parameters
from ordinary import assert_same, ordinary_hidden, pair, relative
from tiny import FAMILIES, TinyGroup, batch_of, ordinary_tokens, tiny_groups, tiny_image, tiny_model

MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
FOUR = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3")  # plain positions, mRoPE, deepstack, image blocks


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_ordinary_rows(family, share):
    """K = 1, 2 and 5 responses, mixed lengths, one, two and no images of different sizes, in one batch."""
    model, other, processor = pair(family)
    groups = tiny_groups(processor, (2, 5, 1, 2), seed=1, images=(1, 2, 1, 0))
    hidden = shared_prefix.response_hidden(model, batch_of(groups), share_prefix=share)
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_path_of_older_transformers(family, monkeypatch):
    """Without mm_encoder_outputs (transformers < 5.18) features are scattered into the embeddings."""
    monkeypatch.setattr(vision, "takes_encoder_outputs", lambda inner: False)
    model, other, processor = pair(family)
    groups = tiny_groups(processor, (2, 3, 1), seed=3, images=(1, 2, 0))
    hidden = shared_prefix.response_hidden(model, batch_of(groups))
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


@pytest.mark.parametrize(
    ("family", "lora", "checkpointing"),
    [
        *((family, True, True) for family in FAMILIES),
        *((family, lora, not lora) for family in FOUR for lora in (True, False)),
    ],
)
def test_with_lora_and_gradient_checkpointing(family, lora, checkpointing):
    """K = 1, 2 and 5 of different lengths; neither of the two is `test_equals_ordinary_rows`."""
    model, other, processor = pair(family)
    if lora:
        model, other = with_lora(model), with_lora(other)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = tiny_groups(processor, (2, 5, 1), seed=4, images=(1, 2, 1))
    hidden = shared_prefix.response_hidden(model, batch_of(groups))
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.parametrize("window", [3, 9, 1000])
def test_sliding_window_layers(window):
    """A window cuts by position: a response near its prefix's end sees the prefix's last tokens only."""
    text = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    model, other, processor = pair("llava_onevision", **text)
    groups = tiny_groups(processor, (2, 3), seed=6, response_len=(4, 12))
    hidden = shared_prefix.response_hidden(model, batch_of(groups))
    assert_same(model, other, hidden, ordinary_hidden(other, groups), tolerance=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_models_own_for_each_row(family):
    model, processor = tiny_model(family)
    groups = tiny_groups(processor, (2, 3, 1), seed=9, images=(2, 1, 0))
    batch = batch_of(groups)
    layout = layout_of(batch)
    found = shared_prefix.prepare(model, batch).position_ids
    inner = inner_model(model)
    at = 0
    for group in groups:
        prefix = found[:, at : at + len(group.prefix)]
        at += len(group.prefix)
        for response in group.responses:
            row = torch.cat((prefix, found[:, at : at + len(response)]), dim=1)
            at += len(response)
            want = torch.arange(row.shape[1]).expand(row.shape[0], -1)
            if hasattr(inner, "get_rope_index") and group.images:
                types = torch.tensor([group.token_types + [0] * len(response)])
                ids = torch.tensor([group.prefix + response])
                grid = group.vision["image_grid_thw"]
                want = inner.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)[0][:, 0]
            assert torch.equal(row, want)
    assert at == sum(layout.group_len)
    assert found.shape[0] == (3 if family in MROPE else 1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_after_a_video_go_on_from_the_text(family):
    """A video's time positions run ahead of the text after it: responses go on from the text, as in a full row."""
    model, processor = tiny_model(family)
    ids = model.config
    video = [ids.vision_start_token_id, *[ids.video_token_id] * 12, ids.vision_end_token_id]
    types = [0, *[2] * 12, 0]
    grid = {"video_grid_thw": torch.tensor([[3, 4, 4]])}
    if family == "qwen2_5_vl":
        grid["second_per_grid_ts"] = torch.tensor([2.0])
    text = ordinary_tokens(processor)[:5]
    group = TinyGroup(text + video + text, [[40, 41, 42], [50]], grid, [0] * 5 + types + [0] * 5, 1)
    batch = batch_of([group])
    found = shared_prefix.prepare(model, batch).position_ids
    prefix, at = len(group.prefix), len(group.prefix)
    for response in group.responses:
        row = torch.cat((found[:, :prefix], found[:, at : at + len(response)]), dim=1)
        at += len(response)
        full = torch.tensor([group.prefix + response])
        own = torch.tensor([group.token_types + [0] * len(response)])
        known = inspect.signature(inner_model(model).get_rope_index).parameters
        arguments = {name: value for name, value in grid.items() if name in known}
        want, _ = inner_model(model).get_rope_index(full, mm_token_type_ids=own, **arguments)
        assert torch.equal(row, want[:, 0])
    if family == "qwen2_5_vl":
        assert found[:, :prefix].max() >= found[:, prefix].max()  # the case that max + 1 gets wrong


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_frozen_features_are_reused_and_give_the_same(family):
    """One encoding serves two models; no gradient reaches the tower, and it runs once."""
    model, other, processor = pair(family)
    assert vision.is_trained(model)
    assert vision.freeze(model) == sum(p.numel() for p in vision_parameters(model))
    assert not vision.is_trained(model)
    groups = tiny_groups(processor, (2, 2), seed=10)
    batch = batch_of(groups)
    features = vision.encode(model, batch)
    assert not any(encoded.tokens.requires_grad for _, encoded in features.items())
    calls: list[int] = []
    name = "visual" if hasattr(inner_model(model), "visual") else "vision_tower"
    getattr(inner_model(model), name).register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = shared_prefix.response_hidden(model, batch, vision=features)
        second = shared_prefix.response_hidden(model, batch, vision=features, share_prefix=False)
        assert not calls
        third = shared_prefix.response_hidden(model, batch)
        assert len(calls) == 1
        want = ordinary_hidden(other, groups)
    for hidden in (first, second, third):
        assert relative(hidden, want) <= 1e-5


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "gemma3", "idefics3", "mistral3", "glm4v"])
def test_batches_of_the_data_room(family, tmp_path):
    """What `data.collate` makes, token types included, with a group of text alone in the middle."""
    from mmrlhf.data.collate import Encoder, collate
    from mmrlhf.data.schema import ImageRef, Message, Part, PreferenceGroup, Response

    model, processor = tiny_model(family)
    groups = []
    for index, size in enumerate(((28, 28), None, (56, 28))):
        parts: tuple[Part, ...] = (Part("text", "what is in the image ?"),)
        images: tuple[ImageRef, ...] = ()
        if size:
            tiny_image(*size, seed=index).save(tmp_path / f"{index}.png")
            parts, images = (Part("image"), *parts), (ImageRef(path=f"{index}.png"),)
        responses = (Response("a cat", rank=1), Response("a dog on the mat", rank=2))
        groups.append(PreferenceGroup(f"g{index}", (Message("user", parts),), responses, images=images))
    encoder = Encoder(processor, root=tmp_path)
    encoded = [encoder.encode(group) for group in groups]
    batch = collate(encoded)
    model.eval()
    with torch.no_grad():
        together = shared_prefix.response_hidden(model, batch)
        alone = torch.cat([shared_prefix.response_hidden(model, collate([each])) for each in encoded])
    assert shared_prefix.self_check(model, batch).max_error < 1e-5
    assert together.shape == (batch.num_scored, 32)
    assert relative(together, alone) <= 1e-5


def test_text_only_batch():
    model, other, processor = pair("qwen2_5_vl")
    groups = tiny_groups(processor, (2, 3), seed=11, images=(0, 0))
    hidden = shared_prefix.response_hidden(model, batch_of(groups))
    want = ordinary_hidden(other, groups)
    assert relative(hidden, want) <= 1e-5


def test_forward_without_a_layout_is_the_models_own():
    """After packing, the same model runs padded batches and generation through plain sdpa."""
    model, other, processor = pair("qwen2_5_vl")
    shared_prefix.response_hidden(model, batch_of(tiny_groups(processor, (2,))))
    assert text_config(model)._attn_implementation == attention.NAME
    assert model.config.vision_config._attn_implementation == "sdpa"
    ids = torch.tensor([[0, 0, 40, 41, 42], [43, 44, 45, 46, 47]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    got, want = (each(input_ids=ids, attention_mask=mask).logits for each in (model, other))
    assert torch.equal(got[mask.bool()], want[mask.bool()])


def test_attention_name_is_not_saved(tmp_path):
    model, processor = tiny_model("llava")
    shared_prefix.response_hidden(model, batch_of(tiny_groups(processor, (2,))))
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "gemma3"])
def test_self_check_passes_and_leaves_the_model_alone(family):
    model, processor = tiny_model(family)
    next(iter(model.modules())).train()
    model.get_output_embeddings().eval()
    modes = [module.training for module in model.modules()]
    check = shared_prefix.self_check(model, batch_of(tiny_groups(processor, (2, 3, 2), images=(0, 1, 1))))
    assert check.max_error < 1e-5
    assert check.head_error < 1e-6
    assert check.responses == 5
    assert check.shared
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_self_check_stops_on_a_mismatch_with_both_figures(monkeypatch):
    """A response that cannot see its prefix is the classical mistake; it must not pass."""
    model, processor = tiny_model("llava")
    batch = batch_of(tiny_groups(processor, (2, 3)))
    real = attention.Packing.__init__

    def blind(self, layout, **options):
        real(self, layout, **options)
        self.prefix_of = list(range(len(self.lengths)))

    monkeypatch.setattr(attention.Packing, "__init__", blind)
    with pytest.raises(RuntimeError, match=r"relative error \d.*allowed 0\.001 .*norm .* shared, .* separate"):
        shared_prefix.self_check(model, batch)


def test_self_check_stops_on_nan():
    """One response of NaN among good ones is an error, whatever comes after it, and the model's own."""
    model, processor = tiny_model("llava")
    groups = tiny_groups(processor, (2, 3))
    with torch.no_grad():
        model.get_input_embeddings().weight[groups[0].responses[1][0]] = torch.nan
    with pytest.raises(RuntimeError, match=r"^LlavaFor\w+ gives hidden states that are not finite on ordinary rows"):
        shared_prefix.self_check(model, batch_of(groups))


def test_self_check_stops_on_an_unknown_logit_scale():
    """K25: whatever scales the logits without being known to lm_head must not pass silently."""
    model, processor = tiny_model("llava")
    model.config.text_config.logit_scale = 0.5  # Llama's forward does not read it
    with pytest.raises(RuntimeError, match="does not give its logits"):
        shared_prefix.self_check(model, batch_of(tiny_groups(processor, (2,))))


def test_encode_names_what_does_not_fit():
    model, processor = tiny_model("llava")
    batch = batch_of(tiny_groups(processor, (2, 2)))
    with pytest.raises(ValueError, match=r"8 image tokens but 4 image features .* g0, g1"):
        vision.encode(model, batch.replace(vision={"pixel_values": batch.vision["pixel_values"][:1]}))
    with pytest.raises(ValueError, match="image_grid_thw_extra are not used by LlavaModel"):
        vision.encode(model, batch.replace(vision={**batch.vision, "image_grid_thw_extra": torch.ones(1)}))
    with pytest.raises(ValueError, match="pixel_values_videos, but LlavaModel has no get_video_features"):
        vision.encode(model, batch.replace(vision={"pixel_values_videos": torch.ones(1)}))
