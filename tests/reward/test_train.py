"""A reward model through the training loop: it learns, resumes, and refuses what it cannot be trained on."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf import config
from mmrlhf.cli import main
from mmrlhf.data.writers import write_ranked
from mmrlhf.models import load
from mmrlhf.reward.score import score_file
from mmrlhf.reward.train import train
from mmrlhf.train import loop
from rewarddata import with_critiques
from tinyrun import facts_of, make_groups, metrics_of, settings_for

REWARD = "recipe=mm_rlhf_reward"
CHEAP = (REWARD, "groups_per_step=3", "tokens_per_batch=4096", "model.self_check=false")


def weights_of(run) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "model.safetensors")


def test_it_learns_to_criticise_and_to_order(model_folder, critiqued, tmp_path):
    """Fifteen steps on six groups: both parts of the loss fall, and the data's own critiques order nearly all pairs."""
    words = (*CHEAP, "groups_per_step=6", "optim.lr=2e-2", "epochs=15")
    run = train(settings_for(tmp_path / "run", critiqued, *words, model=model_folder))
    lines = metrics_of(run)
    for name in ("loss", "loss/critic", "loss/score"):
        assert lines[-1][name] < 0.5 * lines[0][name], name
    assert lines[-1]["rewards/accuracies"] >= 0.9
    assert lines[-1]["rewards/min"] < lines[-1]["rewards/max"]
    assert facts_of(run)["status"] == "finished"
    done = score_file(run / "model", critiqued, tmp_path / "out.jsonl", critic="given", device="cpu")
    assert done.pairs == 18
    assert done.agreeing >= 16


def test_stopped_and_resumed_is_the_same_run(model_folder, critiqued, tmp_path):
    """Weights of model and scoring head to the last bit, dropout of the head's own included."""
    words = (*CHEAP, "reward.dropout=0.2", "epochs=2", "save_every=2")
    whole = train(settings_for(tmp_path / "whole", critiqued, *words, model=model_folder))
    train(settings_for(tmp_path / "parts", critiqued, *words, model=model_folder))
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    assert len(list((tmp_path / "parts" / "checkpoints").iterdir())) == 1, "the checkpoint of step 2 is left"
    parts = train(settings_for(tmp_path / "parts", critiqued, *words, model=model_folder))
    assert facts_of(parts)["resumed_from"] == "step-00000002"
    one, other = weights_of(whole), weights_of(parts)
    assert "reward_head.dense.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_with_the_head_it_finds(reward_model, critiqued, tmp_path):
    words = (*CHEAP, "max_steps=1", "optim.lr=1e-8")
    run = train(settings_for(tmp_path / "run", critiqued, *words, model=reward_model))
    before, after = (load_file(f / "reward_head.safetensors") for f in (reward_model, run / "model"))
    torch.testing.assert_close(after["dense.weight"], before["dense.weight"], rtol=0, atol=1e-6)
    assert not torch.equal(after["dense.weight"], before["dense.weight"])


def test_adapters_and_head_are_trained_together(model_folder, critiqued, tmp_path):
    """LoRA: the checkpoint has the adapters and the head, `model/` loads as a reward model on its base."""
    words = (*CHEAP, "max_steps=1", "lora.enabled=true", "lora.targets=[q_proj]")
    run = train(settings_for(tmp_path / "run", critiqued, *words, model=model_folder))
    saved = weights_of(run)
    assert {name.rsplit(".", 2)[1] for name in saved} == {"default", "dense", "out_proj"}
    done = score_file(run / "model", critiqued, tmp_path / "out.jsonl", critic="none", device="cpu")
    assert done.groups == 6


def test_data_without_critiques_trains_the_scores_alone(model_folder, tmp_path):
    """Half the groups without, one with a critique missing: all are trained on, each pair in the form it allows."""
    groups = make_groups(tmp_path, 2) + with_critiques(make_groups(tmp_path, 3))[2:]
    groups[2:] = with_critiques(groups[2:], without=(2,))
    write_ranked(groups, tmp_path / "d.jsonl")
    run = train(settings_for(tmp_path / "run", tmp_path / "d.jsonl", *CHEAP, "max_steps=1", model=model_folder))
    assert facts_of(run)["data"]["groups"] == 4, "the last one is two"
    assert facts_of(run)["data"]["pairs"] == 9
    assert metrics_of(run)[0]["loss/score"] > 0


def test_ties_have_their_own_term(model_folder, tmp_path):
    groups = with_critiques(make_groups(tmp_path, 2))
    write_ranked(groups, tmp_path / "d.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines()]
    for row in rows:
        row["ranks"] = [1, 2, 2]
        for response in row["responses"]:
            del response["rank"]
            del response["score"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train(settings_for(tmp_path / "run", tmp_path / "d.jsonl", *CHEAP, "max_steps=1", model=model_folder))
    line = metrics_of(run)[0]
    assert line["loss/tie"] > 0
    assert line["rewards/tie_margins"] > 0
    assert line["rewards/accuracies"] in (0.0, 0.25, 0.5, 0.75, 1.0), "of the four pairs that are ordered"


def test_a_tie_without_critiques_beside_a_pair_with_them_is_trained_on(model_folder, tmp_path):
    """MM-RLHF's rows of one prompt, the tie without reasons: a half of the group that has no ordered pair."""
    row = {"id": "x", "prompt": "what is it ?"}
    reasons = {"chosen_reason": "the dog is red", "rejected_reason": "the square is green"}
    rows = [row | reasons | {"chosen": "a cat", "rejected": "a dog"}]
    rows += [row | {"chosen": "a mat", "rejected": "a dog", "is_tie": True}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    run = train(settings_for(tmp_path / "run", tmp_path / "d.jsonl", *CHEAP, "max_steps=1", model=model_folder))
    line = metrics_of(run)[0]
    assert facts_of(run)["data"]["groups"] == 2
    assert (line["loss/score"] > 0, line["loss/tie"] > 0, line["loss/critic"] > 0) == (True, True, True)


def test_margins_are_asked_for_before_the_first_step(model_folder, tmp_path):
    write_ranked(make_groups(tmp_path, 1, scores=False), tmp_path / "d.jsonl")
    settings = settings_for(tmp_path / "run", tmp_path / "d.jsonl", *CHEAP, "reward.margin=true", model=model_folder)
    with pytest.raises(
        ValueError, match=r"group g0 .*reward\.margin is true, but its responses 0 and 1 have no reward"
    ):
        train(settings)


def test_the_margin_makes_the_score_harder_to_please(model_folder, critiqued, tmp_path):
    """The first step's score loss is log 2 without margins; they are 1.5 and 3 in this data."""
    lines = []
    for margin in ("false", "true"):
        words = (*CHEAP, "max_steps=1", f"reward.margin={margin}", "groups_per_step=6")
        lines += metrics_of(train(settings_for(tmp_path / margin, critiqued, *words, model=model_folder)))
    assert lines[0]["loss/score"] == pytest.approx(0.693, abs=0.02)
    assert lines[1]["loss/score"] > 1.5


@pytest.mark.parametrize("command", ["train", "reward train", "reference", "train --plan"])
def test_each_command_refuses_the_others_recipe(command, model_folder, critiqued, tmp_path, capsys):
    recipe = "dpo" if command == "reward train" else "mm_rlhf_reward"
    words = [recipe, f"model.path={model_folder}", f"data.path={critiqued}", f"output={tmp_path / 'run'}"]
    assert main([*command.split(), *words]) == 2
    right, wrong = ("train", "reward train") if recipe == "dpo" else ("reward train", command.split()[0])
    assert f"recipe {recipe} is trained by `mmrlhf {right}`, not by `mmrlhf {wrong}`" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_loop_itself_refuses_a_recipe_without_its_objective(model_folder, critiqued, tmp_path):
    with pytest.raises(ValueError, match="recipe mm_rlhf_reward is trained by `mmrlhf reward train`"):
        loop.train(settings_for(tmp_path / "run", critiqued, REWARD, model=model_folder))


def test_the_command_trains_and_says_where(model_folder, critiqued, tmp_path, capsys):
    words = [f"model.path={model_folder}", f"data.path={critiqued}", f"output={tmp_path / 'run'}", "device=cpu"]
    assert main(["reward", "train", *words, "max_steps=1", "model.self_check=false"]) == 0
    assert f"the reward model lies in {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert facts_of(tmp_path / "run")["recipe"] == "mm_rlhf_reward"
    load.load_model(tmp_path / "run" / "model")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("reward.head=relu", "reward.head must be one of tanh, silu, got 'relu'"),
        ("reward.dropout=1", r"reward\.dropout must be in \[0, 1\), or null, got 1\.0"),
        ("reward.center_weight=-1", r"reward\.center_weight must be finite and 0 or more, got -1\.0"),
        ("reward.critic_weight=nan", r"reward\.critic_weight must be finite and 0 or more, got nan"),
        ("reward.score_weight=0", r"reward\.score_weight must be above 0, got 0\.0"),
    ],
)
def test_settings_are_checked_by_name(word, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, [REWARD, word])


def test_the_recipe_is_the_published_script():
    """critic_reward_7b.sh: lr 1e-6, warm-up .1, weights 1, 1 and .01."""
    found = config.load(None, [REWARD])
    assert (found.optim.lr, found.optim.warmup, found.data.pairs, found.samples) == (1e-6, 0.1, "all", 0)
    weights = found.reward
    assert (weights.critic_weight, weights.score_weight, weights.center_weight) == (1.0, 1.0, 0.01)
