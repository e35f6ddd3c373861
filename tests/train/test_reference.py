"""The reference cache: the same numbers as a live reference, kept bitwise, never stale, whole after a kill."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.batch import GroupBatch
from mmrlhf.data.collate import Encoder, PreferenceDataset, collate
from mmrlhf.data.schema import Response
from mmrlhf.models import load
from mmrlhf.ops.backend import choose
from mmrlhf.train import reference
from mmrlhf.train.distributed import World
from mmrlhf.train.loop import train
from mmrlhf.train.reference import ReferenceScores, cache_reference, reference_key
from mmrlhf.train.scoring import token_logp
from tiny import tiny_model
from tinyrun import facts_of, make_groups, metrics_of, settings_for


class Counting:
    """The real scoring of a tiny model, counting batches; dies at the `kill_at`-th."""

    def __init__(self, model, kill_at: int | None = None):
        self.model, self.calls, self.kill_at = model, 0, kill_at

    def __call__(self, batch: GroupBatch) -> torch.Tensor:
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return token_logp(self.model, batch, share_prefix=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    model, processor = tiny_model("llava_onevision")
    return model.eval(), processor, make_groups(root, 7), root


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(reference, "SHARD_GROUPS", 3)


def dataset_of(world, **options) -> PreferenceDataset:
    _, processor, groups, root = world
    return PreferenceDataset(options.pop("groups", groups), Encoder(processor, root=root, **options))


def cached(
    score: Counting, dataset: PreferenceDataset, folder: Path, key: str = "k" * 64, world: World | None = None
) -> ReferenceScores:
    def make_batch(indices):
        return collate([dataset[index] for index in indices])

    return cache_reference(
        score, make_batch, dataset, folder, key=key, lengths=dataset.lengths, tokens_per_batch=120, world=world
    )


def test_cached_is_live_and_read_back_bitwise(world, tmp_path):
    model, dataset = world[0], dataset_of(world)
    first = cached(Counting(model), dataset, tmp_path)
    assert (first.computed, first.reused) == (3, 0)
    for index in range(len(dataset)):
        live = token_logp(model, collate([dataset[index]]), share_prefix=True)
        torch.testing.assert_close(first[index], live, rtol=0, atol=2e-5)
    nobody = Counting(model)
    again = cached(nobody, dataset, tmp_path)
    assert (again.computed, again.reused, nobody.calls) == (0, 3, 0)
    assert all(torch.equal(a, b) for a, b in zip(first.tokens, again.tokens, strict=True))


def test_shards_of_processes_without_one_folder_are_counted_once(world, tmp_path):
    """The second of the three is another process's, which has it in a folder of its own: here it is computed again."""

    class Apart(World):
        def gather(self, value):
            return [value, {1}]

    score, dataset = Counting(world[0]), dataset_of(world)
    found = cached(score, dataset, tmp_path, world=Apart(0, 2))
    assert (found.computed, found.reused, len(found)) == (3, 0, 7)
    again = cached(score, dataset, tmp_path)
    assert (again.computed, again.reused) == (0, 3)


def test_attached_in_the_order_of_the_batch(world, tmp_path):
    dataset = dataset_of(world)
    scores = cached(Counting(world[0]), dataset, tmp_path)
    indices = [5, 0, 3]
    batch = scores.attach(collate([dataset[index] for index in indices]), indices)
    assert torch.equal(batch.reference_logp, torch.cat([scores[5], scores[0], scores[3]]))
    with pytest.raises(RuntimeError, match=r"the reference of groups g5, g0, g3 has \d+ tokens, the batch scores"):
        scores.attach(batch, [5, 0])


def test_a_kill_halfway_ends_in_the_same_bits(world, tmp_path):
    model, dataset = world[0], dataset_of(world)
    whole = cached(Counting(model), dataset, tmp_path / "whole")
    batches = Counting(model)
    cached(batches, dataset, tmp_path / "count")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        cached(Counting(model, kill_at=batches.calls - 1), dataset, tmp_path / "cut")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    rest = Counting(model)
    resumed = cached(rest, dataset, tmp_path / "cut")
    assert 0 < rest.calls < batches.calls
    assert resumed.reused == 2
    assert all(torch.equal(a, b) for a, b in zip(whole.tokens, resumed.tokens, strict=True))


def test_another_key_text_or_setting_is_computed_again(world, tmp_path):
    model, groups = world[0], world[2]
    cached(Counting(model), dataset_of(world), tmp_path)
    assert cached(Counting(model), dataset_of(world), tmp_path, key="j" * 64).computed == 3
    edited = [
        *groups[:4],
        dataclasses.replace(groups[4], responses=(Response("a cat", rank=1), Response("dog", rank=2))),
    ]
    changed = cached(Counting(model), dataset_of(world, groups=[*edited, *groups[5:]]), tmp_path)
    assert (changed.computed, changed.reused) == (1, 2)
    assert cached(Counting(model), dataset_of(world, pairs="adjacent"), tmp_path).reused == 0
    processor = world[1]
    processor.image_processor.image_mean, before = [0.1, 0.2, 0.3], processor.image_processor.image_mean
    try:
        assert cached(Counting(model), dataset_of(world), tmp_path).reused == 0
    finally:
        processor.image_processor.image_mean = before
    assert cached(Counting(model), dataset_of(world), tmp_path).reused == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_damaged_shards_are_computed_again_and_said(damage, world, tmp_path):
    model, dataset = world[0], dataset_of(world)
    good = cached(Counting(model), dataset, tmp_path)
    victim, other = sorted(good.folder.glob("*.safetensors"))[:2]
    raw = bytearray(victim.read_bytes())
    raw[-3] ^= 1
    victim.write_bytes({"flip": raw, "cut": raw[:-5], "empty": b"", "other": other.read_bytes()}[damage])
    with pytest.warns(UserWarning, match="it is computed again"):
        again = cached(Counting(model), dataset, tmp_path)
    assert again.computed == 1
    assert all(torch.equal(a, b) for a, b in zip(good.tokens, again.tokens, strict=True))


def test_key_follows_the_weights_and_nothing_else(world):
    model = world[0]
    key = reference_key(model, share_prefix=True)
    assert reference_key(tiny_model("llava_onevision")[0].eval(), share_prefix=True) == key
    assert reference_key(model, share_prefix=False) != key
    other = tiny_model("llava_onevision")[0]
    with torch.no_grad():
        other.lm_head.weight[3, 3] += 1e-6
    assert reference_key(other, share_prefix=True) != key


def test_key_is_the_same_for_a_model_in_memory_and_reloaded(tmp_path):
    for family in ("llava_onevision", "gemma3", "qwen2_5_vl"):
        model, processor = tiny_model(family)
        key = reference_key(model, share_prefix=True)
        load.save_pretrained(model, processor, tmp_path / family)
        again = load.load_model(tmp_path / family, dtype="float32")
        assert again.config._name_or_path != model.config._name_or_path
        assert reference_key(again, share_prefix=True) == key, family


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "rms_norm_eps", 0.1),
        ("vision_config", "layer_norm_eps", 0.1),
        (None, "vision_feature_layer", -2),
        ("text_config", "rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
    ],
)
def test_key_follows_the_config_too(part, name, value, world):
    """Equal weights that compute something else: the cache of one is not that of the other."""
    model = world[0]
    key = reference_key(model, share_prefix=True)
    config = getattr(model.config, part) if part else model.config
    before = getattr(config, name)
    assert before != value
    setattr(config, name, value)
    try:
        assert reference_key(model, share_prefix=True) != key
    finally:
        setattr(config, name, before)
    assert reference_key(model, share_prefix=True) == key


def test_key_follows_backend_device_and_the_scaling_of_adapters(world):
    model = world[0]
    key = reference_key(model, share_prefix=True)
    chosen = choose("linear_logp", model.lm_head.weight).name
    assert reference_key(model, share_prefix=True, backend=chosen) == key
    assert reference_key(model, share_prefix=True, backend="reference") != key
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    keys = set()
    for alpha in (4, 8):
        torch.manual_seed(0)
        adapted = get_peft_model(
            tiny_model("llava_onevision")[0], LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"])
        )
        keys.add(reference_key(adapted, share_prefix=True))
        with adapted.disable_adapter():
            keys.add(reference_key(adapted, share_prefix=True))
    assert len(keys) == 4


def test_model_that_is_not_finite_is_named_with_its_group(world, tmp_path):
    model, _ = tiny_model("llava_onevision")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="group g0: the starting model gives log-probabilities that are not finite"):
        cached(Counting(model.eval()), dataset_of(world), tmp_path)


def test_reference_stays_bitwise_the_same_through_training(tmp_path, model_folder, data_file):
    """A second run over the same cache reads it (and trains the same), and no step changes a byte of it."""
    words = [f"reference_cache={tmp_path / 'cache'}", "max_steps=2"]
    first = train(settings_for(tmp_path / "first", data_file, *words, model=model_folder))
    files = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")}
    second = train(settings_for(tmp_path / "second", data_file, *words, model=model_folder))
    assert facts_of(second)["reference"]["shards_computed"] == 0
    assert facts_of(second)["reference"]["shards_read"] == len(files) > 0
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.safetensors")} == files
    assert [line["loss"] for line in metrics_of(first)] == [line["loss"] for line in metrics_of(second)]
    assert not (second / "reference").exists()
    shard = load_file(next(iter(files)))
    assert all(tensor.dtype == torch.float32 for tensor in shard.values())
