"""Encoder and collate on tiny processors of eight families: layout, pairs, segment weights."""

from __future__ import annotations

import math

import pytest
import torch

from mmrlhf.batch import layout_of, score_rows
from mmrlhf.data.collate import collate
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, Response
from records import (
    FAMILIES,
    decode,
    preference,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_collate_layout_on_every_family(encoder, picture, family):
    small, wide = ImageRef(data=picture()), ImageRef(data=picture((100, 20)))
    groups = [
        preference("there are two cats", "there are three dogs", "a red square", id="a", images=[small]),
        preference("yes .", "no , there are two", id="b", images=[wide, small]),
        preference("only text", "words", id="c"),
    ]
    e = encoder(family)
    encoded = [e.encode(g) for g in groups]
    batch = collate(encoded)
    layout = layout_of(batch)
    assert batch.num_groups == 3
    assert batch.response_group.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert batch.num_tokens == sum(g.num_tokens for g in encoded) == sum(layout.group_len)
    assert torch.equal(batch.rows, score_rows(layout))
    assert batch.pairs.tolist() == [[0, 1], [0, 2], [1, 2], [3, 4], [5, 6]]
    assert batch.images_per_group == (1, 2, 0)
    assert batch.ids == ("a", "b", "c")
    assert batch.response_keys == ("a#0", "a#1", "a#2", "b#0", "b#1", "c#0", "c#1")
    assert batch.token_weight.unique().tolist() == [1.0]
    assert batch.margin.isnan().all()
    wanted = [r.text + e.chat.tokenizer.eos_token for g in groups for r in g.responses]
    got = [decode(e, t) for t in batch.targets.split(batch.response_len.tolist())]
    assert got == wanted  # through the end of turn; the newline that the template writes after it is not scored
    # a response's tokens lie where its rows say: the row before each target holds the token before it
    for index, start in enumerate(batch.cu_seqlens[:-1].tolist()):
        first_row = batch.rows[start].item()
        g = batch.response_group[index].item()
        assert first_row == layout.group_start[g] + layout.prefix_len[g] - 1
        length = batch.response_len[index].item()
        inner = batch.rows[start + 1 : start + length]
        assert torch.equal(batch.input_ids[inner], batch.targets[start : start + length - 1])
    for value in batch.vision.values():
        assert isinstance(value, torch.Tensor)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_is_what_the_processor_makes_of_the_prompt(encoder, picture, family):
    """The prefix, image tokens included, and the pixels equal the processor's own output for the same conversation."""
    from PIL import Image

    pixels = Image.new("RGB", (40, 30), (200, 30, 30))
    e = encoder(family)
    g = preference("yes", "no", images=[ImageRef(data=picture())] * 2)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is in the image ?"}]
    text = e.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    direct = e.processor(text=[text], images=[[pixels, pixels]], return_tensors="pt")
    encoded = e.encode(g)
    assert torch.equal(encoded.prefix_ids, direct["input_ids"][0])
    for key, value in encoded.vision.items():
        assert torch.equal(value, direct[key]), key


def test_qwen_merge_and_token_types(encoder, picture):
    e = encoder("qwen2_vl")
    a = e.encode(preference("yes", "no", id="a", images=[ImageRef(data=picture((60, 30)))]))
    b = e.encode(preference("yes", "no", id="b"))
    c = e.encode(preference("yes", "no", id="c", images=[ImageRef(data=picture((30, 90)))]))
    batch = collate([a, b, c])
    assert (
        batch.vision["pixel_values"].shape[0] == a.vision["pixel_values"].shape[0] + c.vision["pixel_values"].shape[0]
    )
    assert batch.vision["image_grid_thw"].shape == (2, 3)
    types = batch.vision["mm_token_type_ids"]
    assert types.shape == batch.input_ids.shape
    pad = e.chat.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(types == 1, batch.input_ids == pad)


def test_tiles_are_padded_to_the_largest_group(encoder, picture):
    e = encoder("llava_onevision")
    few = e.encode(preference("yes", "no", id="a", images=[ImageRef(data=picture((28, 28)))]))
    many = e.encode(preference("yes", "no", id="b", images=[ImageRef(data=picture((60, 60)))]))
    tiles = [few.vision["pixel_values"].shape[1], many.vision["pixel_values"].shape[1]]
    assert tiles[0] < tiles[1]
    merged = collate([few, many]).vision
    assert merged["pixel_values"].shape[:2] == (2, tiles[1])
    assert torch.equal(merged["pixel_values"][0, : tiles[0]], few.vision["pixel_values"][0])
    assert merged["pixel_values"][0, tiles[0] :].eq(0).all()
    assert merged["image_sizes"].tolist() == [[28, 28], [60, 60]]
    assert merged["batch_num_images"].tolist() == [1, 1]


def test_pairs_modes_and_margins(encoder):
    scored = [
        Response("a cat", score=3.0),
        Response("a dog", score=1.5),
        Response("red", score=1.5),
        Response("blue", score=0.0),
    ]
    g = preference(*scored)
    assert encoder(pairs="all").encode(g).pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]
    adjacent = encoder(pairs="adjacent").encode(g)
    assert adjacent.pairs.tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert adjacent.margin.tolist() == [1.5, 1.5, 1.5, 1.5]
    assert encoder(pairs="best_vs_rest").encode(g).pairs.tolist() == [[0, 1], [0, 2], [0, 3]]
    listed = preference("a", "b", "c", pairs=(ListedPair(2, 0, 0.5), ListedPair(2, 1)))
    encoded = encoder().encode(listed)
    assert encoded.pairs.tolist() == [[2, 0], [2, 1]]
    assert encoded.margin[0] == 0.5
    assert math.isnan(encoded.margin[1])
    assert encoded.num_sft_tokens == 2 * encoded.response_ids[2].numel()


def test_a_response_in_no_pair_is_not_run(encoder):
    encoded = encoder().encode(preference("a", "b", "c", pairs=(ListedPair(0, 2),)))
    assert encoded.responses == (0, 2)
    assert encoded.pairs.tolist() == [[0, 1]]
    assert collate([encoded]).response_keys == ("g#0", "g#2")


def test_all_tied_is_a_bad_row(encoder):
    with pytest.raises(BadRow, match="no preference pair"):
        encoder().encode(preference(Response("a", rank=1), Response("b", rank=1)))


def test_weights_of_a_pair_sit_on_the_changed_tokens(encoder):
    e = encoder(segments="paper", gamma=5.0)
    encoded = e.encode(preference("there are two cats", "there are three dogs"))
    for ids, weights in zip(encoded.response_ids, encoded.weights, strict=True):
        assert 0 < (weights == 5.0).sum() < len(ids)
        assert weights[-1] == 1.0  # the end of turn is common to both
    kept = [ids[w == 1.0].tolist() for ids, w in zip(encoded.response_ids, encoded.weights, strict=True)]
    assert kept[0] == kept[1]
    assert decode(e, kept[0]).startswith("there are")


def test_each_pair_keeps_its_own_weights(encoder):
    e = encoder(segments="paper", gamma=2.0)
    texts = ("a red cat and a dog", "a blue cat and a dog", "a red cat and a fish")
    encoded = e.encode(preference(*texts, pairs=(ListedPair(0, 1), ListedPair(0, 2))))
    assert encoded.responses == (0, 0, 1, 2)  # the best is run twice, once for each rival
    assert encoded.pairs.tolist() == [[0, 2], [1, 3]]
    marks = [decode(e, ids[w == 2.0]).strip() for ids, w in zip(encoded.response_ids, encoded.weights, strict=True)]
    assert marks == ["red", "dog", "blue", "fish"]
    batch = collate([encoded])
    assert batch.response_keys == ("g#0", "g#0", "g#1", "g#2")
    same = e.encode(preference("a red cat", "a blue cat", "a green cat", pairs=(ListedPair(0, 1), ListedPair(0, 2))))
    assert same.responses == (0, 1, 2)  # equal weights are shared


def test_explicit_segments_go_before_the_diff(encoder):
    text = "there are two red cats"
    e = encoder(segments="paper", gamma=3.0)
    best = Response(text, rank=1, segments=((text.index("red"), text.index("red") + 3),))
    encoded = e.encode(preference(best, Response("there are no dogs", rank=2)))
    marked = encoded.response_ids[0][encoded.weights[0] == 3.0]
    assert decode(e, marked).strip() == "red"
    assert encoded.weights[1].max() == 3.0  # the other side has none: the diff decides
    none = encoder().encode(preference(best, Response("there are no dogs", rank=2)))
    assert all((w == 1).all() for w in none.weights)


def test_explicit_segments_need_offsets(encoder, processor, monkeypatch):
    e = encoder(segments="paper", gamma=3.0)
    monkeypatch.setattr(type(e.chat.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        e.encode(preference(Response("a b", rank=1, segments=((0, 1),)), Response("c", rank=2)))
