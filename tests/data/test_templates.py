"""Chat templates, boundaries and markers: where an answer begins and ends (D12 to D16, K05, K06, K10)."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmrlhf.data.collate import Encoder, PreferenceDataset, TooLong, collate
from mmrlhf.data.readers import TooManyBadRows
from mmrlhf.data.schema import BadRow, ImageRef, Message, Part, Response
from records import (
    decode,
    preference,
)

LLAVA15 = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TRIMS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_template_without_end_of_turn_gets_the_eos_token(encoder, image):
    e = encoder("llava", LLAVA15)
    encoded = e.encode(preference("two cats", "three dogs", images=[image]))
    assert decode(e, encoded.response_ids[0]) == " two cats<|im_end|>"
    assert decode(e, encoded.prefix_ids).endswith("ASSISTANT:")


def test_template_that_trims_keeps_segments_in_place(encoder):
    e = encoder("llava", TRIMS, segments="paper", gamma=3.0)
    encoded = e.encode(preference(Response("  two red cats\n", rank=1, segments=((6, 9),)), Response("dogs", rank=2)))
    assert decode(e, encoded.response_ids[0]) == "two red cats<|im_end|>"
    assert decode(e, encoded.response_ids[0][encoded.weights[0] == 3.0]).strip() == "red"


def test_short_answers_that_occur_in_the_template(encoder):
    thinks = TRIMS.replace("{% for c in m", "{% if m['role'] == 'assistant' %}<hint>\n{% endif %}{% for c in m", 1)
    e = encoder("llava", thinks, segments="paper", gamma=2.0)
    encoded = e.encode(preference(Response("hi", rank=1, segments=((0, 2),)), Response("end", rank=2)))
    assert [decode(e, ids) for ids in encoded.response_ids] == ["<hint>\nhi<|im_end|>", "<hint>\nend<|im_end|>"]
    assert decode(e, encoded.response_ids[0][encoded.weights[0] == 2.0]).strip() == "hi"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TRIMS.replace("assistant\n{% endif", "assistant\n<think>{% endif"), "does not continue its generation prompt"),
        (TRIMS.replace("c['text'] | trim", "c['text'] if m['role'] == 'user' else 'x'"), "changes an answer's text"),
        ("\n{% for m in messages %}{{ m['role'] }}", r"the chat template is not valid: .*'endfor'.* \(line 2\)"),
    ],
)
def test_unusable_templates_are_named(encoder, template, message):
    with pytest.raises(ValueError, match=message) as caught:
        encoder("llava", template).encode(preference("two cats", "three dogs"))
    assert not isinstance(caught.value, BadRow)  # no row is at fault


REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def systematic(*responses, **more):
    """A preference with a system turn."""
    base = preference(*responses, **more)
    return dataclasses.replace(base, prompt=(Message("system", (Part("text", "be brief"),)), *base.prompt))


def rewrites(condition, change):
    """TRIMS with `change` made where `condition` holds of a text."""
    return TRIMS.replace("{{ c['text'] | trim }}", f"{{{{ (c['text'] | {change}) if {condition} else c['text'] }}}}")


@pytest.mark.parametrize(
    ("template", "bad", "message"),
    [
        (REFUSES + TRIMS, systematic("yes", "no", id="bad"), "refuses the conversation: System role not supported"),
        (
            rewrites("'</think>' in c['text']", "replace('</think>', '')"),
            preference("yes", "hm </think> no", id="bad"),
            "changes an answer's text: 'hm </think> no' became 'hm  no",
        ),
        (
            rewrites("'LOUD' in c['text']", "lower"),
            preference("yes", "no", text="LOUD", id="bad"),
            "leaves out or changes message text: 'LOUD'",
        ),
        (TRIMS + "{{ messages[1]['role'].x.y }}", preference("yes", "no", id="bad"), "refuses the conversation: .*no"),
    ],
    ids=["raise_exception", "answer", "prompt", "undefined"],
)
def test_what_a_template_refuses_is_a_bad_row(encoder, template, bad, message):
    with pytest.raises(BadRow, match=message) as caught:
        encoder("llava", template).encode(bad)
    assert caught.value.source == "bad"


def test_a_refused_row_is_skipped_and_the_cap_stops_a_template_that_refuses_all(encoder):
    good = [preference("yes", "no", id=f"g{i}") for i in range(3)]
    bad = systematic("yes", "no", id="bad")
    e = encoder("llava", REFUSES + TRIMS)
    data = PreferenceDataset([*good, bad], e, on_bad_row="skip", max_bad_rows=0.25)
    assert (len(data), [d.source for d in data.dropped]) == (3, ["bad"])
    always = encoder("llava", rewrites("true", "replace('yes', 'oui')"))
    with pytest.raises(TooManyBadRows, match=r"3 of 3 groups are bad .*\n.*3 x the chat template changes an answer's"):
        PreferenceDataset(good, always, on_bad_row="skip", max_bad_rows=0.25)


def test_no_template_and_no_end_of_sequence(processor, tmp_path, tokenizer_maker):
    tokenizer = tokenizer_maker()
    with pytest.raises(ValueError, match="has no chat template"):
        Encoder(tokenizer, root=tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    e = Encoder(tokenizer, root=tmp_path)  # a bare tokenizer does for text
    assert decode(e, e.encode(preference("a cat", "a dog")).response_ids[0]) == "a cat<|im_end|>"
    with pytest.raises(BadRow, match="is a tokenizer and takes no images"):
        e.encode(preference("a", "b", images=[ImageRef(path="x.png")]))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no special token, and the tokenizer has no eos_token"):
        e.encode(preference("a cat", "a dog"))


def test_bos_is_not_doubled(tokenizer_maker, tmp_path):
    from tokenizers import processors

    tokenizer = tokenizer_maker(bos="<s>")
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    for template in (plain, "{{ bos_token }}" + plain):  # written by the tokenizer, or by the template
        tokenizer.chat_template = template
        encoded = Encoder(tokenizer, root=tmp_path).encode(preference("yes", "no"))
        assert (encoded.prefix_ids == tokenizer.bos_token_id).sum() == 1
        assert encoded.prefix_ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in torch.cat(encoded.response_ids)


def test_d12_image_count_and_markers(encoder, image):
    e = encoder("qwen2_vl")
    broken = dataclasses.replace(preference("a", "b", images=[image]), images=(image, image))
    with pytest.raises(BadRow, match="1 image placeholders for 2 images"):
        e.encode(broken)
    for marker in ("<|im_end|>", "<|image_pad|>", "<|im_start|>", "<|pad|>", "<|vision_start|>"):
        with pytest.raises(BadRow, match=r"prompt holds .* a marker of the model"):
            e.encode(preference("a", "b", text=f"say {marker} now"))
        with pytest.raises(BadRow, match=r"response holds .* a marker of the model"):
            e.encode(preference("a", f"b {marker}"))
    fine = e.encode(preference("a < b", "b |im_end| <image>", text="<|im_"))
    assert fine.num_pairs == 1
    with pytest.raises(BadRow, match="holds '<image>'"):
        encoder("llava").encode(preference("a", "b <image>"))


def test_d12_markers_after_normalisation(encoder, tokenizer_maker, tmp_path):
    from tokenizers import AddedToken, normalizers

    tokenizer = tokenizer_maker()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<mark>", normalized=True, special=True)])
    tokenizer.chat_template = TRIMS.replace("{% for c in m['content'] %}", "").replace(
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] | trim }}{% endif %}{% endfor %}",
        "{{ m['content'] }}",
    )
    e = Encoder(tokenizer, root=tmp_path)
    with pytest.raises(BadRow, match="is tokenised to '<mark>', a special token"):
        e.encode(preference("a", "b ＜mark＞"))


def test_d12_an_answer_that_the_template_changes_is_still_searched_first(tokenizer_maker, tmp_path):
    """Both are wrong with it: the special token is what is told, as for any other answer."""
    from tokenizers import AddedToken, normalizers

    tokenizer = tokenizer_maker()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<mark>", normalized=True, special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | replace('LOUD', 'loud') }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    e = Encoder(tokenizer, root=tmp_path)
    with pytest.raises(BadRow, match="is tokenised to '<mark>', a special token"):
        e.encode(preference("a", "LOUD ＜mark＞"))
    with pytest.raises(BadRow, match="changes an answer's text: 'LOUD b'"):
        e.encode(preference("a", "LOUD b"))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3"])
def test_every_answer_is_tokenised_once(encoder, image, monkeypatch, family):
    """Tokenising is most of what a row costs before the first step: one call an answer, where there were three."""
    e = encoder(family)
    e.encode(preference("red", "green", images=[image]))  # what the template writes is known from here on
    seen, real = [], type(e.chat.tokenizer).__call__

    def call(self, text, *args, **words):
        seen.append(text if isinstance(text, str) else text[0])
        return real(self, text, *args, **words)

    monkeypatch.setattr(type(e.chat.tokenizer), "__call__", call)
    e.encode(preference("two cats", "three dogs", "a mat", text="how many are there ?", images=[image]))
    for text in ("two cats", "three dogs", "a mat"):
        assert sum(text in each for each in seen) == 1
    assert sum("how many" in each for each in seen) == 2  # by itself, and as the prompt
    assert len(seen) == 5


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision", "llava"])
def test_d13_too_long_drops_the_whole_group(encoder, image, family):
    long = preference("yes " * 30, "no", id="long", images=[image])
    short = [preference("yes", "no", id=f"s{i}", images=[image]) for i in range(4)]
    size = encoder(family).encode(short[0]).num_tokens
    whole = encoder(family).encode(long)
    # limits that end inside the image, at the prefix's end, inside an answer, and one token short
    prefix = whole.prefix_ids.numel()
    for limit in (prefix // 2, prefix, prefix + 3, whole.num_tokens - 1):
        with pytest.raises(TooLong, match=f"too long: {whole.num_tokens} tokens .* max_group_tokens is {limit}"):
            encoder(family, max_group_tokens=limit).encode(long)
    assert encoder(family, max_group_tokens=whole.num_tokens).encode(long).num_tokens == whole.num_tokens
    data = PreferenceDataset([long, *short], encoder(family, max_group_tokens=size), max_bad_rows=0.2)
    assert [g.id for g in data.groups] == ["s0", "s1", "s2", "s3"]
    assert [d.source for d in data.dropped] == ["long"]
    assert "too long" in data.dropped[0].reason
    with pytest.raises(TooManyBadRows, match=r"1 of 5 groups are bad \(20.0%"):
        PreferenceDataset([long, *short], encoder(family, max_group_tokens=size), max_bad_rows=0.1)


def test_d14_no_answer_is_ever_cut(encoder):
    for limit in range(20, 60):
        e = encoder(max_group_tokens=limit)
        try:
            encoded = e.encode(preference("there are two cats", "there are three dogs"))
        except TooLong:
            continue
        assert [decode(e, ids) for ids in encoded.response_ids] == [
            "there are two cats<|im_end|>",
            "there are three dogs<|im_end|>",
        ]
    with pytest.raises(BadRow, match="response 1 is empty"):
        encoder().encode(preference("fine", "  "))


def merging_tokenizer(maker):
    """A tokenizer that merges ":" with a following "y" and "n": the boundary of prompt and answer is not a token's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*letters, ":y", ":n", "<eos>"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", "y"), (":", "n")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if m['role'] == 'assistant' %}"
    )
    tokenizer.chat_template += "<eos>{% endif %} {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    return tokenizer


def test_d15_prefix_is_shared_even_where_the_tokenizer_merges(tmp_path, tokenizer_maker):
    tokenizer = merging_tokenizer(tokenizer_maker)
    joined = tokenizer("assistant:yes")["input_ids"]
    assert tokenizer.convert_tokens_to_ids(":y") in joined  # it does merge across the boundary
    e = Encoder(tokenizer, root=tmp_path)
    encoded = e.encode(preference("yes", "no", "a cat"))
    assert decode(e, encoded.prefix_ids).endswith("assistant:")
    assert [decode(e, ids) for ids in encoded.response_ids] == ["yes<eos>", "no<eos>", "a cat<eos>"]
    merged = {tokenizer.convert_tokens_to_ids(t) for t in (":y", ":n")}
    assert not merged & set(torch.cat(encoded.response_ids).tolist())


def test_d16_no_pad_token_is_needed(encoder, tokenizer_maker, tmp_path):
    tokenizer = merging_tokenizer(tokenizer_maker)
    assert tokenizer.pad_token is None
    e = Encoder(tokenizer, root=tmp_path)
    batch = collate([e.encode(preference("yes", "no", id="a")), e.encode(preference("a longer answer", "no", id="b"))])
    assert batch.num_groups == 2


def test_k05_label_out_of_range(encoder, monkeypatch):
    e = encoder()
    e.chat.__dict__["vocabulary"] = 10
    with pytest.raises(BadRow, match=r"token ids outside 0\.\.9"):
        e.encode(preference("two cats", "dogs"))


def test_k06_no_response_is_without_tokens(encoder):
    batch = collate([encoder().encode(preference("a", "b"))])
    assert (batch.response_len >= 2).all()  # the answer and its end of turn


def test_k10_equal_texts_encode_alike(encoder):
    encoded = encoder(segments="paper", gamma=5.0).encode(preference("same", "same"))
    assert torch.equal(*encoded.response_ids)
    assert all((w == 1).all() for w in encoded.weights)
