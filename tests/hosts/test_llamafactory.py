"""LLaMA-Factory's own DPO stage with and without mmrlhf: the same run, with less work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed (make test-hosts)")

from omegaconf import OmegaConf

from hosts.hostrun import Record, check_against_float64, close, model_folder, pair_rows, recording, same_run
from hosts.run_llamafactory import ORIGINAL, TOWER, arguments, home, ours, run, write_set

pytestmark = pytest.mark.hosts


@pytest.fixture(autouse=True)
def clean():
    home.CustomDPOTrainer = ORIGINAL
    yield
    home.CustomDPOTrainer = ORIGINAL


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model and two data sets, one of them without pictures."""
    folder = tmp_path_factory.mktemp("llamafactory")
    write_set(folder, "pairs", pair_rows(folder, 6))
    write_set(folder, "texts", pair_rows(folder, 6, images=False))
    model_folder(folder / "model")
    return folder


def both(world: Path, tmp_path: Path, **more) -> tuple[Record, Record]:
    return run(world, tmp_path / "theirs", **more), run(world, tmp_path / "ours", {}, **more)


def test_full_training_is_the_same_run(world, tmp_path):
    theirs, mine = both(world, tmp_path)
    same_run(theirs, mine)
    # A picture: policy and reference, chosen and rejected; with mmrlhf once, the tower being frozen by default.
    assert (theirs.pictures, mine.pictures) == (24, 6)


def test_lora_is_the_same_run(world, tmp_path):
    theirs, mine = both(world, tmp_path, finetuning_type="lora", lora_rank=4, lora_target="all")
    same_run(theirs, mine)
    assert (theirs.pictures, mine.pictures) == (24, 6)


def test_a_trained_tower_and_accumulation(world, tmp_path):
    options = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False, "gradient_accumulation_steps": 2}
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)
    assert (theirs.pictures, mine.pictures) == (40, 20)  # a reference of its own needs a pass of its own


@pytest.mark.parametrize(
    "options",
    [
        {"pref_loss": "simpo"},
        {"pref_loss": "orpo"},
        {"pref_ftx": 0.5, "pref_bco_weight": 0.3, "dpo_label_smoothing": 0.1, "disable_gradient_checkpointing": False},
        {"dataset": "texts"},
    ],
    ids=["simpo", "orpo", "ftx-bco-smoothing-checkpointing", "text"],
)
def test_the_stages_options_keep_working(options, world, tmp_path):
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)


@pytest.mark.parametrize(("loss", "start"), [("hinge", 1.0), ("ipo", 25.0)])
def test_the_loss_that_was_asked_for(loss, start, world, tmp_path):
    """At log-ratios of 0, hinge is 1 and ipo (1 / (2 beta))^2; LLaMA-Factory 0.9.5 with TRL 0.24 gives log 2."""
    theirs, mine = both(world, tmp_path, pref_loss=loss, pref_beta=0.1, max_steps=1)
    close(theirs.losses, [0.693147])
    close(mine.losses, [start])


def test_evaluation_logs_the_same(world, tmp_path):
    options = {"val_size": 0.34, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/rejected"):
        assert len(theirs.logged(name)) >= 2
        close(mine.logged(name), theirs.logged(name), rtol=2e-3, atol=1e-3)


def test_segment_weights_equal_the_float64_loop(world, tmp_path):
    host = run(world, tmp_path / "theirs", max_steps=1).trainer
    record = run(world, tmp_path / "ours", {"segments": "paper", "gamma": 5.0, "reduction": "mean"}, pref_beta=0.5)
    trainer = record.trainer
    rows = [trainer.train_dataset[index] for index in (0, 3, 5)]
    batch = trainer.data_collator([dict(row) for row in rows])
    check_against_float64(
        trainer, host.data_collator([dict(row) for row in rows]), batch, world / "model", gamma=5.0, beta=0.5
    )


def test_a_cut_prompt_is_told_apart(world, tmp_path):
    """cutoff_len 28 leaves part of a prompt's image tokens; LLaMA-Factory's own message is the model's."""
    with pytest.raises(ValueError, match=r"image tokens but \d+ image features"):
        run(world, tmp_path, {}, cutoff_len=28)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ld_alpha": 0.5}, "ld_alpha is not supported by mmrlhf: .*segments"),
        ({"pref_loss": "kto_pair"}, "kto_pair is not supported by mmrlhf: .*stage kto"),
        ({"torch_compile": True}, "torch_compile is not supported by mmrlhf"),
    ],
)
def test_what_cannot_be_honoured_raises_before_training(options, message, world, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path, {}, **options)


def test_the_command_reads_its_section(world, tmp_path):
    path = tmp_path / "config.yaml"
    section = {"segments": "paper", "gamma": 3.0, "token_metrics": False}
    OmegaConf.save(OmegaConf.create({**arguments(world, tmp_path / "out"), "mmrlhf": section}), path)
    with recording(ORIGINAL, TOWER) as record:
        assert ours.main(["train", str(path), "max_steps=1", "mmrlhf.gamma=4"]) == 0
    assert len(record.losses) == 1
    assert record.trainer.pair_options.gamma == 4
    assert record.logged("rewards/margins")
    assert not record.logged("logits/chosen")
    weights = record.trainer.data_collator([record.trainer.train_dataset[0]])["mmrlhf_batch"].batch.token_weight
    assert sorted(set(weights.tolist())) == [1.0, 4.0]
    assert torch.isfinite(torch.tensor(record.losses)).all()


def test_the_hosts_parser_takes_the_example(repository, tmp_path):
    from llamafactory.hparams.parser import _TRAIN_ARGS
    from transformers import HfArgumentParser

    host, _ = ours.read_config(repository / "examples" / "llamafactory.yaml", ["bf16=false", f"output_dir={tmp_path}"])
    HfArgumentParser(_TRAIN_ARGS).parse_dict(host)
