"""Answers: batched equals one by one, deterministic, no marker tokens, the model left as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from mmrlhf.data.schema import Message, Part
from mmrlhf.models import generate, shared_prefix
from tiny import batch_of, tiny_groups, tiny_image, tiny_messages, tiny_model

PROMPTS = [
    (tiny_messages(1), [tiny_image(28, 28)]),
    (tiny_messages(0, "a cat on the mat"), []),
    (tiny_messages(2, "dog ?"), [tiny_image(56, 28, seed=1), tiny_image(28, 28, seed=2)]),
]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "gemma3", "idefics3", "internvl"])
def test_batched_answers_equal_single_ones(family):
    """Left padding, prompts with one, two and no images, before and after the packed attention is set."""
    model, processor = tiny_model(family)
    together = generate.answer(model, processor, PROMPTS, max_new_tokens=6)
    alone = [generate.answer(model, processor, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert together == alone
    shared_prefix.response_hidden(model, batch_of(tiny_groups(processor, (2,))))
    assert generate.answer(model, processor, PROMPTS, max_new_tokens=6, batch_size=1) == together
    assert len(set(together)) > 1


def test_greedy_answer_is_the_argmax_of_ordinary_forwards():
    model, processor = tiny_model("llava")
    text = generate.answer(model, processor, [PROMPTS[0]], max_new_tokens=5)[0]
    template = processor.apply_chat_template(PROMPTS[0][0], add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[template], images=[PROMPTS[0][1]], return_tensors="pt")
    ids, banned = inputs["input_ids"], generate.suppressed_tokens(model, processor)
    new: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[banned] = -torch.inf
        new.append(int(logits.argmax()))
        if new[-1] == processor.tokenizer.eos_token_id:
            break
        ids = torch.cat((ids, torch.tensor([new[-1:]])), dim=1)
    assert text == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_model_is_left_as_it_was():
    model, processor = tiny_model("qwen2_5_vl")
    model.train()
    model.model.visual.eval()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    modes = [module.training for module in model.modules()]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    side = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "right"
    generate.answer(model, processor, PROMPTS, max_new_tokens=2)
    generate.sample(model, processor, PROMPTS[:1], max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is False
    assert model.model.rope_deltas is None
    assert processor.tokenizer.padding_side == "right"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    processor.tokenizer.padding_side = side


def test_training_still_works_after_an_answer():
    """A cache or an inference-mode tensor left behind would break the next backward."""
    model, processor = tiny_model("qwen2_5_vl")
    batch = batch_of(tiny_groups(processor, (2, 2)))
    want = shared_prefix.response_hidden(model, batch)
    generate.answer(model, processor, PROMPTS, max_new_tokens=3)
    hidden = shared_prefix.response_hidden(model, batch)
    assert torch.equal(hidden, want)
    hidden.sum().backward()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl", "smolvlm", "internvl"])
def test_markers_are_never_emitted(family):
    """Even a head that wants nothing but markers gives none."""
    model, processor = tiny_model(family)
    banned = generate.suppressed_tokens(model, processor)
    tokenizer = processor.tokenizer
    assert tokenizer.pad_token_id in banned
    assert tokenizer.eos_token_id not in banned
    assert model.config.image_token_id in banned
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    with torch.no_grad():
        head.bias[banned] = 1e4
    for texts in generate.sample(model, processor, PROMPTS[:2], n=2, max_new_tokens=8):
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert not set(banned) & {token for row in ids for token in row}


def test_pad_that_is_the_end_token_may_end_an_answer():
    """Many tokenizers pad with their end token: suppressing it would make every answer run to the limit."""
    model, processor = tiny_model("llava")
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    assert processor.tokenizer.eos_token_id not in generate.suppressed_tokens(model, processor)


def test_sampling_is_seeded_and_scaled():
    model, processor = tiny_model("llava")
    first = generate.sample(model, processor, PROMPTS, n=4, seed=3, max_new_tokens=5)
    assert first == generate.sample(model, processor, PROMPTS, n=4, seed=3, max_new_tokens=5)
    assert first != generate.sample(model, processor, PROMPTS, n=4, seed=4, max_new_tokens=5)
    assert [len(texts) for texts in first] == [4, 4, 4]
    cold = generate.sample(model, processor, PROMPTS, n=2, temperature=1e-4, max_new_tokens=5)
    greedy = generate.answer(model, processor, PROMPTS, max_new_tokens=5)
    assert cold == [[text, text] for text in greedy]


def test_a_bare_tokenizer_gives_inputs_too():
    """Its BatchEncoding takes no dtype, where a processor's BatchFeature does."""
    _, processor = tiny_model("llava")
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    inputs = generate._inputs(tokenizer, [PROMPTS[1], PROMPTS[1]], torch.device("cpu"), torch.bfloat16)
    assert inputs["input_ids"].shape[0] == 2
    assert inputs["input_ids"].dtype == torch.int64


def test_schema_messages_are_taken():
    model, processor = tiny_model("llava")
    message = Message("user", (Part("image"), Part("text", "what is in the image ?")))
    assert generate.answer(model, processor, [([message], PROMPTS[0][1])], max_new_tokens=4) == generate.answer(
        model, processor, [PROMPTS[0]], max_new_tokens=4
    )


def test_bad_arguments():
    model, processor = tiny_model("llava")
    with pytest.raises(ValueError, match="prompt 0 has 1 image parts but 0 images"):
        generate.answer(model, processor, [(tiny_messages(1), [])])
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        generate.sample(model, processor, PROMPTS, temperature=0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        generate.sample(model, processor, PROMPTS, n=0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate.answer(model, processor, PROMPTS, max_new_tokens=0)
