"""ms-swift's own `swift rlhf --rlhf_type dpo` with and without mmrlhf: the same run, with less work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("swift.rlhf_trainers", reason="ms-swift is not installed (make test-hosts)")

from hosts.hostrun import Record, check_against_float64, close, model_folder, pair_rows, same_run
from hosts.run_swift import THEIRS, TrainerFactory, encoded, run, use_ids_of, write_set
from mmrlhf import dynamic_beta

pytestmark = pytest.mark.hosts
PLUGIN = Path(__file__).resolve().parents[2] / "examples" / "swift_plugin.py"
# ms-swift's templates run the tower on a blank picture for rows of text: the self-check's, of the head, are such.
BLANK = 2


@pytest.fixture(autouse=True)
def clean():
    TrainerFactory.TRAINER_MAPPING["dpo"] = THEIRS
    yield
    TrainerFactory.TRAINER_MAPPING["dpo"] = THEIRS


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a tiny model and data sets: margins, other pictures for the rejected side, no pictures."""
    folder = tmp_path_factory.mktemp("swift")
    model_folder(folder / "model")
    pictures, texts = pair_rows(folder, 6), pair_rows(folder, 6, images=False)
    plain = [encoded(row) for row in pictures]
    sets = {
        "pairs": plain,
        "margins": [{**row, "margin": 0.5 * (1 + index)} for index, row in enumerate(plain)],
        "others": [{**row, "rejected_images": pictures[(i + 2) % 6]["images"]} for i, row in enumerate(plain)],
        "texts": [encoded(row) for row in texts],
    }
    for name, rows in sets.items():
        write_set(folder, name, rows)
    use_ids_of(folder / "model")
    return folder


def both(world: Path, tmp_path: Path, **more) -> tuple[Record, Record]:
    return run(world, tmp_path / "theirs", **dict(more)), run(world, tmp_path / "ours", {}, **dict(more))


def test_full_training_is_the_same_run(world, tmp_path):
    theirs, mine = both(world, tmp_path)
    same_run(theirs, mine)
    close(mine.logged("logits/chosen"), theirs.logged("logits/chosen"))
    # A picture: policy and reference, chosen and rejected; with mmrlhf once, the tower being frozen by default.
    assert (theirs.pictures, mine.pictures) == (24, 6 + BLANK)


def test_lora_is_the_same_run(world, tmp_path):
    theirs, mine = both(world, tmp_path, tuner_type="lora", lora_rank=4)
    same_run(theirs, mine)
    assert theirs.pictures == 24
    assert mine.pictures <= 6 + BLANK


def test_a_trained_tower_and_accumulation(world, tmp_path):
    options = {"freeze_vit": "false", "freeze_aligner": "false", "gradient_accumulation_steps": 2}
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)
    assert (theirs.pictures, mine.pictures) == (40, 20 + BLANK)  # a reference of its own needs a pass of its own


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.25]},
        {"loss_type": "ipo"},
        {"loss_type": "apo_zero"},
        {"rpo_alpha": 0.3, "label_smoothing": 0.1, "gradient_checkpointing": "true"},
        {"data": "texts"},
        {"data": "others"},
    ],
    ids=["mpo", "ipo", "apo_zero", "rpo-smoothing-checkpointing", "text", "rejected-images"],
)
def test_the_commands_options_keep_working(options, world, tmp_path):
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)


def test_evaluation_logs_the_same(world, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2, "split_dataset_ratio": 0.34}
    theirs, mine = both(world, tmp_path, **options)
    same_run(theirs, mine)
    for name in ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies", "eval_logps/rejected"):
        assert len(theirs.logged(name)) >= 2
        close(mine.logged(name), theirs.logged(name), rtol=2e-3, atol=1e-3)


def test_weights_and_betas_equal_the_float64_loop(world, tmp_path):
    """DDPO's weights and MM-DPO's beta(margin) at once, on one batch."""
    host = run(world, tmp_path / "theirs", data="margins", max_steps=1).trainer
    options = {"segments": "paper", "gamma": 5.0, "reduction": "mean", "beta_mode": "margin"}
    record = run(world, tmp_path / "ours", options, data="margins", beta=0.5)
    trainer = record.trainer
    rows = [trainer.train_dataset[index] for index in (0, 3, 5)]
    margins = torch.tensor([row["margin"] for row in rows])
    assert len(set(margins.tolist())) == 3
    check_against_float64(
        trainer,
        host.data_collator([dict(row) for row in rows]),
        trainer.data_collator(rows),
        world / "model",
        gamma=5.0,
        beta=dynamic_beta(margins, beta=0.5),
    )
    low, high = 0.5, 0.75
    assert all(low < value < high for value in record.logged("beta/mean"))


def test_a_missing_margin_is_named(world, tmp_path):
    with pytest.raises(ValueError, match="pair 1 of the batch: beta_mode is 'margin'"):
        run(world, tmp_path, {"beta_mode": "margin"})


@pytest.mark.parametrize(
    ("mine", "options", "message"),
    [
        ({}, {"ld_alpha": 0.5}, "ld_alpha is not supported by mmrlhf: .*segments"),
        (
            {"beta_mode": "margin"},
            {"loss_type": "aot"},
            "loss_type aot is not supported by mmrlhf: .*beta_mode 'fixed'",
        ),
        ({}, {"torch_compile": "true"}, "torch_compile is not supported by mmrlhf"),
    ],
)
def test_what_cannot_be_honoured_raises_before_training(mine, options, message, world, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(world, tmp_path, mine, **options)


def test_the_plugin_of_the_examples(world, tmp_path):
    record = run(world, tmp_path, external_plugins=PLUGIN, max_steps=1)
    assert type(record.trainer).__name__ == "PreferenceTrainer"
    assert record.trainer.pair_options.segments == "paper"
    assert len(record.losses) == 1
