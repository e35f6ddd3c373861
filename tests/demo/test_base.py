"""The shipped model opens as any other folder, and errs as it was taught to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrlhf.demo import BASE
from mmrlhf.demo.base import (
    SPECIAL,
    build_tokenizer,
    caption_batch,
    careless_caption,
    image_inputs,
    main,
    prompt_ids,
    save,
    special_ids,
    teach,
)
from mmrlhf.demo.language import QUESTION, Caption, parse
from mmrlhf.demo.measure import measure
from mmrlhf.demo.sample import captions
from mmrlhf.demo.world import HABITS, draw, make_scenes, pixels
from mmrlhf.models.load import load_model, load_processor


@pytest.fixture(scope="module")
def shipped():
    return load_model(str(BASE), dtype="auto"), load_processor(str(BASE))


def test_every_sentence_is_in_the_vocabulary_and_comes_back_as_it_was():
    tokenizer = build_tokenizer()
    texts = [QUESTION]
    for scene in make_scenes(60, seed=5):
        texts += [str(Caption(scene.place, scene.kinds, template)) for template in (0, 1)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_careless_captions_name_the_habit_about_as_often_as_stated():
    rng = np.random.default_rng(0)
    tempting = [scene for scene in make_scenes(1500, seed=6) if scene.temptation is not None]
    said = [parse(careless_caption(scene, rng)) for scene in tempting]
    assert None not in said
    for places in (set(HABITS), {"bedroom", "field"}):
        named = [s.temptation in c.kinds for s, c in zip(tempting, said, strict=True) if s.place in places]
        assert 0.72 < np.mean(named) < 0.92


def test_the_folder_is_small_and_ordinary():
    files = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert sum(files.values()) < 1.7e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py"))]
    assert json.loads((BASE / "config.json").read_text())["model_type"] == "llava_onevision"


def test_it_opens_in_single_precision(shipped):
    model, _ = shipped
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 800_000


def test_the_processor_makes_what_the_model_was_taught_on(shipped):
    _, processor = shipped
    scenes = make_scenes(3, seed=7)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    made = processor(text=[text] * 3, images=[draw(scene) for scene in scenes], return_tensors="pt")
    assert made["input_ids"].tolist() == [prompt_ids(processor.tokenizer)] * 3
    ours = image_inputs(pixels(scenes))
    torch.testing.assert_close(made["pixel_values"], ours["pixel_values"], rtol=0, atol=1e-6)
    assert torch.as_tensor(made["image_sizes"]).tolist() == ours["image_sizes"].tolist()


def test_the_shipped_model_hallucinates_by_habit_and_sees_well(shipped):
    """64 pictures: the standard error of the response level is .06, so the band is two and a half of them wide."""
    model, processor = shipped
    scenes = make_scenes(64, seed=4242)
    texts = [answers[0] for answers in captions(model, processor.tokenizer, pixels(scenes))]
    figures = measure(texts, scenes)
    assert 0.30 < figures.response_hallucination < 0.60
    assert figures.habit_hallucination > 0.65
    assert figures.recall > 0.90
    assert figures.valid > 0.98
    assert figures.place > 0.95


def test_our_greedy_captions_are_what_transformers_generates(shipped):
    model, processor = shipped
    tokenizer = processor.tokenizer
    images = pixels(make_scenes(6, seed=8))
    prompt = torch.tensor(prompt_ids(tokenizer)).expand(6, -1)
    with torch.inference_mode():
        ids = model.generate(input_ids=prompt, **image_inputs(images), do_sample=False, max_new_tokens=40)
    theirs = tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    assert [answers[0] for answers in captions(model, tokenizer, images)] == theirs


def test_samples_follow_from_their_seed_and_leave_the_global_one_alone(shipped):
    model, processor = shipped
    images = pixels(make_scenes(4, seed=8))
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    draws = [captions(model, processor.tokenizer, images, samples=5, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert [len(answers) for answers in draws[0]] == [5] * 4
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(mark in text for answers in draws[0] for text in answers for mark in SPECIAL)


def test_special_tokens_are_never_drawn_even_if_the_model_likes_them(shipped):
    model, processor = shipped
    tokenizer = processor.tokenizer
    banned = special_ids(tokenizer)

    class Eager:
        """The model, with logits that prefer the banned tokens."""

        def eval(self):
            return self

        def __call__(self, **inputs):
            output = model(**inputs)
            output.logits[..., banned] += 1e4
            return output

    images = pixels(make_scenes(2, seed=8))
    assert captions(Eager(), tokenizer, images) == captions(model, tokenizer, images)


@pytest.mark.parametrize(("samples", "temperature"), [(2, 0.0), (1, -1.0), (0, 1.0)])
def test_impossible_samples_are_refused(shipped, samples, temperature):
    with pytest.raises(ValueError, match=f"{samples} samples at temperature {temperature}"):
        captions(shipped[0], shipped[1].tokenizer, pixels([]), samples=samples, temperature=temperature)


def test_the_loss_is_on_the_answers_alone():
    batch = caption_batch([5, 6], [[7, 8, 9], [7]], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, -100, 7, -100, -100]]


def test_teaching_follows_from_its_seed_and_what_is_saved_comes_back(tmp_path: Path):
    made = [teach(seed=2, scenes=40, tower_steps=3, caption_steps=3, progress=lambda line: None) for _ in range(2)]
    first, second = (dict(model.named_parameters()) for model, _ in made)
    assert all(torch.equal(first[name], second[name]) for name in first)
    save(*made[0], tmp_path)
    again = dict(load_model(str(tmp_path), dtype="auto").named_parameters())
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-3, atol=1e-6)  # half precision keeps 11 bits
    assert load_processor(str(tmp_path)).tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_script_says_how_it_is_used(capsys):
    assert main([]) == 2
    assert "python -m mmrlhf.demo.base OUT" in capsys.readouterr().err
