"""The scoring head on disk: an ordinary model folder, and two files that are checked before they are used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmrlhf.models import load
from mmrlhf.reward import head as heads
from mmrlhf.reward.critique import load_reward_model
from rewarddata import reward_folder
from tiny import tiny_model


@pytest.mark.parametrize("kind", ["tanh", "silu"])
def test_saved_and_loaded_scores_are_the_same(kind, tmp_path):
    folder = reward_folder(tmp_path / "m", kind=kind)
    found = load_reward_model(folder, device="cpu")
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    activation = torch.tanh if kind == "tanh" else torch.nn.functional.silu
    tensors = load_file(folder / "reward_head.safetensors")
    rows = activation(hidden @ tensors["dense.weight"].T + tensors["dense.bias"])
    want = (rows @ tensors["out_proj.weight"].T + tensors["out_proj.bias"])[:, 0]
    torch.testing.assert_close(found.head(hidden), want)
    assert found.head.described.head == kind
    assert not found.model.training
    assert not found.head.training


def test_the_folder_is_an_ordinary_one(tmp_path):
    """No weight of the head in the model's files, nothing pickled, and the model in memory keeps its head."""
    model, processor = tiny_model("llava_onevision")
    heads.attach(model, heads.new_head(model))
    names = [name for name, _ in model.named_parameters()]
    heads.save(model, processor, tmp_path / "m")
    assert [name for name, _ in model.named_parameters()] == names
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "reward_head" in name]  # noqa: SIM118 - not a dict
    load.load_model(tmp_path / "m")
    assert {path.suffix for path in (tmp_path / "m").iterdir()} <= {".json", ".safetensors", ".jinja", ".txt"}
    assert json.loads((tmp_path / "m" / "reward_head.json").read_text()) == {
        "head": "tanh",
        "hidden_size": 32,
        "dropout": 0.0,
        "schema": 1,
    }


def test_weights_given_by_name_are_saved(tmp_path):
    """A model cut over processes is saved from whole weights, the head's among them."""
    model, processor = tiny_model("llava_onevision")
    heads.attach(model, heads.new_head(model))
    state = {name: tensor.detach() + 1 for name, tensor in model.state_dict().items()}
    heads.save(model, processor, tmp_path / "m", state=state)
    saved = load_file(tmp_path / "m" / "reward_head.safetensors")
    torch.testing.assert_close(saved["dense.weight"], state["reward_head.dense.weight"])
    assert set(saved) == {"dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias"}
    load.load_model(tmp_path / "m")


def change_description(folder, **values):
    path = folder / "reward_head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_a_tensor(folder):
    path = folder / "reward_head.safetensors"
    tensors = load_file(path)
    del tensors["out_proj.bias"]
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "reward_head.json").unlink(), "has reward_head.safetensors but no reward_head.json"),
        (lambda f: (f / "reward_head.safetensors").unlink(), "is not a whole safetensors file"),
        (lambda f: (f / "reward_head.safetensors").write_bytes(b"x" * 40), "is not a whole safetensors file"),
        (drop_a_tensor, "does not fit reward_head.json"),
        (lambda f: change_description(f, head="relu"), "head must be one of tanh, silu, got 'relu'"),
        (lambda f: change_description(f, schema=2), "schema must be 1, got 2"),
        (lambda f: change_description(f, dropout=True), r"dropout must be in \[0, 1\), got True"),
        (lambda f: change_description(f, hidden_size=16), "does not fit reward_head.json"),
        (lambda f: change_description(f, more=1), "does not describe a reward head"),
        (lambda f: [p.unlink() for p in f.glob("reward_head*")], "has no reward_head.json: it is no reward model"),
    ],
    ids=["no json", "no weights", "cut", "a tensor less", "kind", "schema", "dropout", "size", "field", "no head"],
)
def test_a_head_that_cannot_be_used_is_named(reward_model, tmp_path, damage, message):
    folder = shutil.copytree(reward_model, tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_reward_model(folder, device="cpu")


def test_a_head_of_another_model_is_refused(reward_model, tmp_path):
    folder = shutil.copytree(reward_model, tmp_path / "m")
    head = heads.RewardHead(heads.HeadDescription("tanh", 8, 0.0))
    save_file(head.state_dict(), folder / "reward_head.safetensors")
    change_description(folder, hidden_size=8)
    with pytest.raises(ValueError, match="hidden_size 8, the model has 32"):
        load_reward_model(folder, device="cpu")


def test_dropout_acts_in_training_only():
    head = heads.RewardHead(heads.HeadDescription("tanh", 8, 0.5))
    rows = torch.ones(64, 8)
    assert head.train()(rows).unique().numel() > 1
    assert head.eval()(rows).unique().numel() == 1


def test_a_head_in_bfloat16_computes_in_float32():
    head = heads.RewardHead(heads.HeadDescription("tanh", 8, 0.0)).to(torch.bfloat16)
    assert head(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
