"""Features of a frozen tower from the disk: bitwise the same training, the tower run once a prompt, and safe files."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import signal
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.models import vision
from mmrlhf.models.parts import inner_model
from mmrlhf.train import vision_cache
from mmrlhf.train.loop import train
from mmrlhf.train.preempt import Preempted
from mmrlhf.train.vision_cache import Batches, VisionCache, features_frozen, open_cache, tower_key
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model
from tinyrun import facts_of, make_data, metrics_of, settings_for

FROZEN = ("model.freeze_projector=true",)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Six groups, of which one has no picture."""
    return make_data(tmp_path_factory.mktemp("data"), 6)


def run(family: str, out: Path, data: Path, *words: str):
    """(losses, trained weights, prompts through the tower) of three steps."""
    model, processor = tiny_model(family)
    calls: list[int] = []
    real = inner_model(model).get_image_features

    @functools.wraps(real)  # its signature says which inputs it takes
    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    inner_model(model).get_image_features = counted
    train(settings_for(out, data, "max_steps=3", "model.self_check=false", *words), model=model, processor=processor)
    losses = [(line["loss"], line["grad_norm"]) for line in metrics_of(out)]
    return losses, load_file(next((out / "model").glob("*.safetensors"))), len(calls)


def same(got, want) -> bool:
    return (
        got[0] == want[0]
        and got[1].keys() == want[1].keys()
        and all(torch.equal(got[1][k], want[1][k]) for k in got[1])
    )


@pytest.mark.parametrize(
    ("family", "words"),
    [("qwen3_vl", FROZEN), ("llava_onevision", ("lora.enabled=true", "lora.r=2"))],
    ids=["deepstack", "tiles and LoRA"],
)
def test_training_is_bitwise_the_same_with_and_without(family, words, tmp_path, data):
    """Without a cache, with an empty one, with a full one, and read by workers: the losses and weights do not differ.

    Once it is full, five prompts with pictures cost no call of the tower at all.
    """
    words = (*words, "tokens_per_batch=128")
    cache = f"data.vision_cache={tmp_path / 'cache'}"
    without = run(family, tmp_path / "without", data, *words)
    empty = run(family, tmp_path / "empty", data, *words, cache)
    assert same(empty, without)
    assert without[2] == 5 + 5  # the reference, and one epoch of three steps
    assert empty[2] == 5  # the reference has filled it
    files = sorted((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 5
    full = run(family, tmp_path / "full", data, *words, cache)
    assert same(full, without)
    assert full[2] == 0
    assert facts_of(tmp_path / "full")["vision_cache"]["folder"] == str(files[0].parent)
    workers = run(family, tmp_path / "workers", data, *words, cache, "data.workers=2")
    assert same(workers, without)
    assert workers[2] == 0


def test_workers_fill_and_a_killed_run_resumes(tmp_path, data):
    """A run that stops after one step and goes on ends as one that was never stopped, cache or not."""
    cache = f"data.vision_cache={tmp_path / 'cache'}"
    want = run("llava", tmp_path / "want", data, *FROZEN)
    first = settings_for(
        tmp_path / "run", data, "max_steps=3", "save_every=1", "model.self_check=false", *FROZEN, cache
    )
    model, processor = tiny_model("llava")
    real = vision.encode
    seen: list[int] = []

    def interrupting(*args, **kwargs):
        seen.append(1)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    vision.encode = interrupting
    try:
        with pytest.raises(Preempted):
            train(first, model=model, processor=processor)
    finally:
        vision.encode = real
    got = run("llava", tmp_path / "run", data, "save_every=1", *FROZEN, cache, "data.workers=1")
    assert same(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_of_every_family_come_back_as_they_were(family, tmp_path):
    """Packed, written, read and joined: the same bits as the prompts by themselves, and as one batch up to rounding."""
    model, processor = tiny_model(family)
    vision.freeze(model)
    groups = tiny_groups(processor, (2, 5, 1, 2), seed=1, images=(1, 2, 1, 0))
    batch = batch_of(groups)
    together = vision.encode(model, batch)
    positions = {key: value for key, value in batch.vision.items() if key in vision.POSITION_INPUTS}
    found: dict[int, vision.VisionFeatures] = {}
    alone = batch.replace(vision={**positions, **vision.apart([group.vision for group in groups])})
    separate = vision.encode(model, alone, computed=found.__setitem__)
    assert sorted(found) == [0, 1, 2]
    cache = VisionCache(tmp_path, "k" * 64, limit=1 << 30, tokens=vision.image_token_ids(inner_model(model).config))
    stored: list[dict[str, torch.Tensor]] = []
    for number, group in enumerate(groups):
        if number in found:
            cache.write(f"g{number}", vision.pack(found[number]))
        stored.append(cache.read(f"g{number}", torch.tensor(group.prefix)) or {})
    read = vision.encode(model, batch.replace(vision={**positions, **vision.apart(stored)}))
    assert read.image is not None
    assert together.image is not None
    assert separate.image is not None
    assert read.image.as_list == together.image.as_list
    assert len(read.image.deepstack) == len(together.image.deepstack) == (2 if family == "qwen3_vl" else 0)
    layers = ((each.tokens, *each.deepstack) for each in (read.image, separate.image, together.image))
    for a, b, c in zip(*layers, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() <= 1e-6 * c.norm()


def test_the_bound_is_kept_and_said_once(tmp_path, data, caplog):
    """Two of five prompts fit; the others are encoded every time, and the numbers stay the same."""
    one = 4 * 32 * 4 + 1000
    words = (*FROZEN, f"data.vision_cache={tmp_path / 'cache'}", f"data.vision_cache_bytes={int(2.5 * one)}")
    with caplog.at_level(logging.WARNING, logger="mmrlhf"):
        bounded = run("llava", tmp_path / "bounded", data, *words)
    said = [r.getMessage() for r in caplog.records if "data.vision_cache is full" in r.getMessage()]
    assert len(said) == 1
    assert f"data.vision_cache_bytes={int(2.5 * one)}" in said[0]
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert 0 < len(files) < 5
    assert sum(file.stat().st_size for file in files) <= 2.5 * one
    assert same(bounded, run("llava", tmp_path / "without", data, *FROZEN))


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped", "empty"])
def test_a_damaged_file_is_computed_again_with_a_warning(damage, tmp_path, data):
    words = (*FROZEN, f"data.vision_cache={tmp_path / 'cache'}", "max_steps=1")
    settings = settings_for(tmp_path / "run", data, *words)
    model, processor = tiny_model("llava")
    batches = batches_of(settings, model, processor)
    pictured = [index for index, group in enumerate(batches.dataset.groups) if group.images][:2]
    batch = batches(pictured)
    features = vision.encode(model, batch, computed=lambda n, found: batches.keep(batch, n, found))
    first, second = sorted((tmp_path / "cache").rglob("*.safetensors"))
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    broken = {"cut": raw[: len(raw) // 2], "flipped": raw, "swapped": second.read_bytes(), "empty": b""}[damage]
    first.write_bytes(broken)
    with pytest.warns(UserWarning, match="is damaged .* computed again"):
        again = batches(pictured)
    assert not first.exists()
    counted: list[int] = []

    def keep(number, found):
        counted.append(number)
        batches.keep(again, number, found)

    got = vision.encode(model, again, computed=keep)
    assert len(counted) == 1
    assert torch.equal(got.image.tokens, features.image.tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("pixel_values" in key for key in batches(pictured).vision)


def batches_of(settings, model, processor) -> Batches:
    from mmrlhf.train import setup

    dataset = setup.read_data(settings, processor)
    return Batches(dataset, apart=features_frozen(model, settings), cache=open_cache(model, settings))


def test_a_trained_tower_is_refused_with_the_options_to_set(tmp_path, data):
    model, processor = tiny_model("llava")
    for words in (("model.freeze_vision=false",), ()):  # by default LLaVA's projector is trained
        settings = settings_for(tmp_path / "run", data, *words, f"data.vision_cache={tmp_path / 'cache'}")
        with pytest.raises(ValueError, match=r"model\.freeze_vision=true and model\.freeze_projector=true, or lora"):
            train(settings, model=model, processor=processor)
    assert not (tmp_path / "cache").exists()
    assert features_frozen(
        tiny_model("qwen2_vl")[0], settings_for(tmp_path / "run", data)
    )  # its merger is in the tower


def test_the_key_knows_the_tower_and_nothing_else():
    model, _ = tiny_model("qwen3_vl")
    key = tower_key(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    assert tower_key(model) == key
    other, _ = tiny_model("qwen3_vl", seed=1)
    assert tower_key(other) != key
    assert tower_key(model.to(torch.bfloat16)) != key
    model, _ = tiny_model("qwen3_vl")
    model.config.vision_config.deepstack_visual_indexes = [0]
    assert tower_key(model) != key


def test_prompts_about_the_same_picture_share_a_file(tmp_path, data):
    settings = settings_for(tmp_path / "run", data, *FROZEN, f"data.vision_cache={tmp_path / 'cache'}")
    model, processor = tiny_model("llava")
    batches = batches_of(settings, model, processor)
    dataset = batches.dataset
    names = [dataset.vision_hash(index) for index in range(len(dataset))]
    assert len(set(names)) == len(names)
    dataset.groups[1] = dataclasses.replace(dataset.groups[1], images=dataset.groups[0].images)
    dataset._vision_hashes.clear()
    assert dataset.vision_hash(1) == dataset.vision_hash(0) == names[0]
    assert dataset.vision_hash(2) == names[2]
    dataset.encoder.video_frames = 3
    dataset._vision_hashes.clear()
    assert dataset.vision_hash(0) != names[0]


def test_a_disk_that_refuses_is_said_and_survived(tmp_path, data, caplog, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vision_cache, "write_atomic", full)
    with caplog.at_level(logging.WARNING, logger="mmrlhf"):
        got = run("llava", tmp_path / "run", data, *FROZEN, f"data.vision_cache={tmp_path / 'cache'}")
    said = [r.getMessage() for r in caplog.records if "cannot be written" in r.getMessage()]
    assert len(said) == 1
    assert len(got[0]) == 3
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    blocked = tmp_path / "file"
    blocked.write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"data\.vision_cache: .*file is not a folder"):
        run("llava", tmp_path / "other", data, *FROZEN, f"data.vision_cache={blocked}")
