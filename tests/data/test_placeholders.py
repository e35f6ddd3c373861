"""`<image>` and `<video>` in a prompt that is a string stand for the row's media, in every format (D12)."""

from __future__ import annotations

import json

import pytest

from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow, Message, Part, PreferenceGroup, Response
from mmrlhf.data.writers import write_dpo_pairs, write_ranked
from records import CONVERSATIONAL, PAIR, SHAREGPT, SWIFT, decode, kinds, write


def _media(row, images):
    return {k: v for k, v in row.items() if k not in ("image", "images")} | ({"images": images} if images else {})


def _mm_rlhf(text, images):
    return _media({**PAIR, "prompt": text}, images)


def _mmrlhf(text, images):
    return _media({"prompt": text, "responses": ["A cat.", "A dog."], "ranking": "1>2"}, images)


def _mmrlhf_turns(text, images):
    return {**_mmrlhf(text, images), "prompt": [{"role": "user", "content": text}]}


def _trl(text, images):
    return _media({"prompt": text, "chosen": "A cat.", "rejected": "A dog."}, images)


def _trl_turns(text, images):
    return _media({**CONVERSATIONAL, "prompt": [{"role": "user", "content": text}]}, images)


def _trl_mixed(text, images):
    return _media({**CONVERSATIONAL, "prompt": text}, images)


def _trl_implicit(text, images):
    sides = {k: [{"role": "user", "content": text}, *CONVERSATIONAL[k]] for k in ("chosen", "rejected")}
    return _media(sides, images)


def _rlhf_v(text, images):
    inside = json.dumps({"question": text, "chosen": "A cat.", "rejected": "A dog."})
    return _media({"idx": 0, "text": inside}, images)


def _rlaif_v(text, images):
    return _media({"question": text, "chosen": "A cat.", "rejected": "A dog."}, images)


def _llama_factory(text, images):
    return _media({**SHAREGPT, "conversations": [{"from": "human", "value": text}]}, images)


def _swift(text, images):
    return _media({**SWIFT, "messages": [{"role": "user", "content": text}, SWIFT["messages"][1]]}, images)


MAKERS = {
    "mm_rlhf": _mm_rlhf,
    "mmrlhf": _mmrlhf,
    "mmrlhf turns": _mmrlhf_turns,
    "trl": _trl,
    "trl turns": _trl_turns,
    "trl mixed": _trl_mixed,
    "trl implicit": _trl_implicit,
    "rlhf_v": _rlhf_v,
    "rlaif_v": _rlaif_v,
    "llama_factory": _llama_factory,
    "swift": _swift,
}


@pytest.fixture(params=MAKERS, ids=lambda name: name.replace(" ", "-"))
def read(request, tmp_path):
    """read(text, images) -> the group of one such row, in each format and spelling."""

    def make(text, images=()):
        row = MAKERS[request.param](text, list(images))
        return read_groups(write(tmp_path / "x.jsonl", row), format=request.param.split()[0]).groups[0]

    return make


def test_a_placeholder_becomes_the_image(read):
    group = read("Look: <image>\nWhat?", ["a.png"])
    assert group.prompt[-1].content == (Part("text", "Look: "), Part("image"), Part("text", "\nWhat?"))
    group = read("<image>and<image>", ["a.png", "b.png"])
    assert group.prompt[-1].content == (Part("image"), Part("text", "and"), Part("image"))
    assert read("What?", ["a.png", "b.png"]).prompt[-1].content == (Part("image"), Part("image"), Part("text", "What?"))


def test_placeholders_must_be_as_many_as_the_media(read):
    with pytest.raises(BadRow, match="2 image placeholders for 1 images"):
        read("<image> or <image>?", ["a.png"])
    with pytest.raises(BadRow, match="1 video placeholders for 0 videos"):
        read("<video> What?", ["a.png"])
    with pytest.raises(BadRow, match=r"1 image placeholders for 0 images \(<image> in a prompt stands for one\)"):
        read("What is <image>?")  # a row without media: refused alike in all formats


def test_no_model_reads_the_word_as_text(tmp_path, encoder, picture):
    (tmp_path / "a.png").write_bytes(picture())
    e = encoder("qwen2_vl")  # its own marker is <|image_pad|>
    (given,) = read_groups(write(tmp_path / "x.jsonl", _mm_rlhf("<image>\nWhat?", ["a.png"]))).groups
    prompt = decode(e, e.encode(given).prefix_ids)
    assert "<image>" not in prompt
    assert "<|vision_end|>\nWhat?" in prompt


def test_text_in_parts_stays_text(tmp_path):
    parts = [{"type": "image"}, {"type": "text", "text": "what does <image> mean ?"}]
    row = {**CONVERSATIONAL, "prompt": [{"role": "user", "content": parts}]}
    (group,) = read_groups(write(tmp_path / "x.jsonl", row)).groups
    assert kinds(group) == ["image", "text"]


def test_answers_are_not_split(tmp_path):
    row = {**_trl_turns("What?", []), "chosen": [{"role": "assistant", "content": "The <video> tag."}]}
    (group,) = read_groups(write(tmp_path / "x.jsonl", row)).groups
    assert group.responses[0].text == "The <video> tag."


def test_literal_placeholders_survive_writing(tmp_path):
    prompt = (Message("user", (Part("text", "what does <image> mean ?"),)),)
    group = PreferenceGroup("g", prompt, (Response("a", rank=1), Response("b", rank=2)))
    write_ranked([group], tmp_path / "x.jsonl")
    assert read_groups(tmp_path / "x.jsonl").groups[0].prompt == prompt
    with pytest.raises(ValueError, match="then one text without <image> or <video>; use write_ranked"):
        write_dpo_pairs([group], tmp_path / "y.jsonl")
