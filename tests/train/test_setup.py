"""Before the first step: what cannot work is refused, early and by name, and what may not be meant is noted."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
import torch

from mmrlhf.data.writers import write_ranked
from mmrlhf.train import setup
from mmrlhf.train.loop import train
from mmrlhf.train.prepare import cache_only
from tiny import tiny_model
from tinyrun import facts_of, make_data, make_groups, settings_for


def test_margin_beta_needs_margins_and_names_the_group(tmp_path, model_folder):
    data = make_data(tmp_path / "data", 3, scores=False)
    settings = settings_for(tmp_path / "run", data, "recipe=mm_dpo", model=model_folder)
    with pytest.raises(ValueError, match=r"group g0 .*loss\.beta_mode is margin, but its responses 0 and 1"):
        train(settings)


def test_lora_target_that_is_not_there_is_named(tmp_path, model_folder, data_file):
    settings = settings_for(
        tmp_path / "run", data_file, "lora.enabled=true", "lora.targets=[q_proj,qq_proj]", model=model_folder
    )
    with pytest.raises(ValueError, match=r"lora\.targets: no linear layer is called qq_proj; allowed: .*q_proj"):
        train(settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"model\.path must name"),
        (["device=cuda:77"], r"device"),
        (["device=tpu9x"], r"device must be auto, cpu, cuda or cuda:N, got 'tpu9x'"),
        (["trackers=[wandb]"], r"trackers asks for wandb, which is not installed"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message, tmp_path, model_folder, data_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=message):
        train(settings_for(tmp_path / "run", data_file, *words, model=model_folder if words else None))


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["model.path=/no/where"], FileNotFoundError, "/no/where is neither a folder nor a hub id"),
        (["data.path=/nope"], ValueError, "data.path: /nope does not exist"),
        (["data.path=''"], ValueError, "data.path must name a file or a folder"),
        (["model.revision=abc"], ValueError, "revision names a commit of a hub id, got 'abc'"),
    ],
)
def test_what_is_not_there_is_refused_before_a_folder_is_made(words, error, message, tmp_path, model_folder, data_file):
    settings = settings_for(tmp_path / "run", data_file, f"model.path={model_folder}", *words)
    with pytest.raises(error, match=message):
        train(settings)
    with pytest.raises(error, match=message):
        cache_only(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["data.format=nothing"], []], ids=["format", "first row"])
def test_bad_data_is_refused_before_the_weights_are_loaded(words, tmp_path, model_folder, data_file, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    data = tmp_path / "ranked.jsonl"
    data.write_text(data_file.read_text() if words else "{broken\n")
    settings = settings_for(tmp_path / "run", data, *words, model=model_folder)
    for function in (train, cache_only):
        with pytest.raises(ValueError, match="nothing" if words else r"ranked\.jsonl:1"):
            function(settings)


def test_float16_weights_are_refused_before_the_reference(tmp_path, data_file):
    model, processor = tiny_model("llava_onevision")
    settings = settings_for(tmp_path / "run", data_file)
    with pytest.raises(ValueError, match=r"the model is float16, .* or lora\.enabled=true"):
        train(settings, model=model.half(), processor=processor)
    assert not (tmp_path / "run" / "reference").exists()


def test_odd_but_usable_data_is_noted(tmp_path, model_folder):
    """Groups over the budget, margins against the order, segments nobody asked for; and nothing of plain data."""
    groups = make_groups(tmp_path, 3)
    first, second, third = groups[0].responses
    odd = [
        dataclasses.replace(
            groups[0],
            responses=(dataclasses.replace(first, score=-1.0, segments=((0, 1),)), second, third),
        ),
        *groups[1:],
    ]
    for name, listed in (("odd", odd), ("plain", groups)):
        write_ranked(listed, tmp_path / f"{name}.jsonl")
    words = ["max_steps=0", "recipe=mm_dpo"]
    run = train(
        settings_for(tmp_path / "run", tmp_path / "odd.jsonl", *words, "tokens_per_batch=5", model=model_folder)
    )
    told = "\n".join(facts_of(run)["notes"])
    assert re.search(r"3 groups are longer than tokens_per_batch=5 \(longest \d+\); each runs alone", told)
    assert "1 groups mark corrected segments, which weigh nothing: data.segments is null" in told
    assert "2 of 9 pairs have a negative margin: their scores contradict their order" in told
    plain = train(settings_for(tmp_path / "other", tmp_path / "plain.jsonl", *words, model=model_folder))
    assert facts_of(plain)["notes"] == []


def test_dropout_of_the_model_is_turned_off_and_that_of_its_adapters_is_not():
    peft = pytest.importorskip("peft")
    model, _ = tiny_model("llava_onevision")
    dropped = torch.nn.Sequential(torch.nn.Dropout(0.5))
    model.model.extra = dropped
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.25, target_modules=["q_proj"]))
    setup.turn_dropout_off(model)
    rates = {m.p for name, m in model.named_modules() if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)}
    assert rates == {0.25}
    assert dropped[0].p == 0.0


def test_several_processes_that_cannot_meet_are_refused_before_anything_is_written(
    tmp_path, model_folder, data_file, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK, .* is not set: start .* processes with torchrun"):
        train(settings_for(tmp_path / "run", data_file, model=model_folder))
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, and mmrlhf reference runs in one process"):
        cache_only(settings_for(tmp_path / "run", data_file, model=model_folder))
    assert not (tmp_path / "run").exists()
