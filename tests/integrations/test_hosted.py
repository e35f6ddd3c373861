"""What LLaMA-Factory's and ms-swift's adapters do before either host comes in: rows to a batch, options, refusals."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from dporows import model_and_processor
from mmrlhf.batch import layout_of
from mmrlhf.data.schema import BadRow
from mmrlhf.data.segments import segment_weights
from mmrlhf.integrations import forward, llamafactory, swift
from mmrlhf.integrations.hosted import IGNORED, PairMethods, PairOptions, Row, options_from, pack
from mmrlhf.integrations.rows import BATCH


def row(prompt, answer, *, masked=(), tail=(), picture=None):
    labels = [IGNORED] * len(prompt) + [IGNORED if i in masked else t for i, t in enumerate(answer)]
    vision = {} if picture is None else {"pixel_values": torch.full((4, 3), float(picture))}
    return Row([*prompt, *answer, *tail], [*labels, *[IGNORED] * len(tail)], vision, images=len(vision))


def packed(pairs, options=None, **others):
    return pack(pairs, options or PairOptions(), **others)[BATCH]


def test_a_prompt_both_sides_begin_with_is_there_once():
    pairs = [(row([1, 2, 3], [4, 5], picture=7), row([1, 2, 3], [6], picture=7)), (row([8], [9]), row([8], [3, 4]))]
    batch = packed(pairs).batch
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 3, 4]
    assert batch.prefix_len.tolist() == [3, 1]
    assert batch.pairs.tolist() == [[0, 1], [2, 3]]
    assert batch.targets.tolist() == [4, 5, 6, 9, 3, 4]
    assert batch.vision["pixel_values"].shape == (4, 3)
    assert layout_of(batch).response_len == ((2, 1), (1, 2))


@pytest.mark.parametrize(
    "rejected",
    [row([1, 2, 9], [6], picture=7), row([1, 2, 3], [6], picture=8), row([1, 2, 3], [6])],
    ids=["another prompt", "another picture", "no picture"],
)
def test_sides_that_begin_apart_are_two_prompts(rejected):
    batch = packed([(row([1, 2, 3], [4, 5], picture=7), rejected)]).batch
    assert batch.num_groups == 2
    assert batch.pairs.tolist() == [[0, 1]]
    assert batch.images_per_group == (1, rejected.images)


def test_unscored_tokens():
    """Behind the last scored token they go; between two they stay, weighing 0, for later tokens see them."""
    chosen = row([1, 2], [4, 5, 6], masked=(1,), tail=(0, 0))
    batch = packed([(chosen, row([1, 2], [7]))]).batch
    assert batch.targets.tolist() == [4, 5, 6, 7]
    assert batch.token_weight.tolist() == [1, 0, 1, 1]


def test_the_first_token_is_never_scored():
    batch = packed([(Row([1, 2, 3], [1, 2, 3]), Row([1, 4], [1, 4]))]).batch
    assert batch.prefix_len.tolist() == [1]
    assert batch.targets.tolist() == [2, 3, 4]


@pytest.mark.parametrize("style", ["paper", "muffin"])
def test_segment_weights_are_those_of_the_answers(style):
    chosen, rejected = [11, 12, 13, 14, 20, 21], [11, 12, 13, 14, 30, 21]
    options = PairOptions(segments=style, gamma=3.0)
    batch = packed([(row([1], chosen), row([1], rejected))], options).batch
    w_rejected, w_chosen = segment_weights(rejected, chosen, gamma=3.0, style=style)
    assert batch.token_weight.tolist() == [*w_chosen, *w_rejected]
    assert 3.0 in w_chosen


def test_bad_rows_are_named():
    fine = row([1], [2])
    with pytest.raises(BadRow, match="pair 2 of the batch, rejected: no token is scored"):
        packed([(fine, fine), (fine, row([1, 2], []))])
    with pytest.raises(BadRow, match="pair 1 of the batch, chosen: a picture or video stands in"):
        packed([(row([1], [2, 99, 3]), fine)], media_ids=[99])


def test_margins():
    pair = (row([1], [2]), row([1], [3]))
    assert packed([pair, pair], margins=[0.5, 2.0]).without_margin is None
    one = packed([pair, pair], margins=[0.5, None])
    assert one.without_margin == "pair 2 of the batch"
    assert math.isnan(one.batch.margin[1])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"gama": 5}, TypeError, "unknown mmrlhf options gama; known: segments, gamma"),
        ({"segments": "all"}, ValueError, "segments"),
        ({"gamma": 0.0}, ValueError, "gamma"),
        ({"reduction": "max"}, ValueError, "reduction"),
        ({"beta_mode": "implicit"}, ValueError, "beta_mode"),
        ({"share_prefix": "no"}, ValueError, "share_prefix must be true or false"),
    ],
)
def test_options_are_checked_by_name(given, error, message):
    with pytest.raises(error, match=message):
        options_from(given)


def dpo_config(**given):
    values = {"loss_type": ["sigmoid"], "ld_alpha": None, "torch_compile": False, "tuner_type": "lora"}
    return SimpleNamespace(**{**values, **given})


def swift_template(**given):
    values = {"packing": False, "padding_free": False, "sequence_parallel_size": 1, "is_encoder_decoder": False}
    return SimpleNamespace(**{**values, **given})


ZERO3 = SimpleNamespace(zero_stage=3)


@pytest.mark.parametrize(
    ("config", "template", "options", "message"),
    [
        ({}, {"packing": True}, {}, "^packing is not supported by mmrlhf: .*set it to false"),
        ({}, {"padding_free": True}, {}, "^padding_free is not supported by mmrlhf: .*set it to false"),
        ({}, {"sequence_parallel_size": 2}, {}, "^sequence_parallel_size .* data parallelism"),
        ({}, {"is_encoder_decoder": True}, {}, "^encoder-decoder models"),
        ({"ld_alpha": 0.5}, {}, {}, "^ld_alpha .* segments"),
        ({"tuner_type": "longlora"}, {}, {}, "^tuner_type .* use lora"),
        ({"torch_compile": True}, {}, {}, "^torch_compile .* set it to false"),
        ({"deepspeed_plugin": ZERO3}, {}, {}, "^deepspeed .* ZeRO-1 or 2"),
        ({"loss_type": "aot"}, {}, {"beta_mode": "margin"}, "^loss_type aot .* beta_mode 'fixed'"),
    ],
)
def test_what_swift_may_ask_for_and_cannot_have(config, template, options, message):
    with pytest.raises(ValueError, match=message):
        swift.check_arguments(dpo_config(**config), swift_template(**template), PairOptions(**options))


def test_what_swift_may_ask_for_and_have():
    swift.check_arguments(dpo_config(loss_type="aot"), swift_template(), PairOptions())


@pytest.mark.parametrize(
    ("given", "message"), [({"ld_alpha": 0.5}, "^ld_alpha .* segments"), ({"pref_loss": "kto_pair"}, "stage kto")]
)
def test_what_llamafactory_may_ask_for_and_cannot_have(given, message):
    arguments = SimpleNamespace(**{"ld_alpha": None, "pref_loss": "sigmoid", **given})
    with pytest.raises(ValueError, match=message):
        llamafactory.check_finetuning(arguments)


def test_llamafactory_has_no_margins():
    with pytest.raises(ValueError, match="beta_mode 'margin' is not supported by mmrlhf in LLaMA-Factory"):
        llamafactory.install(beta_mode="margin")


def test_without_the_hosts_one_is_told_what_to_install():
    for name, function in (("llamafactory", llamafactory.install), ("ms-swift", swift.register)):
        try:
            __import__({"ms-swift": "swift"}.get(name, name))
        except ImportError:
            with pytest.raises(ImportError, match=f"pip install {name}"):
                function()


def test_the_configuration_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("stage: dpo\npref_beta: 0.5\nmmrlhf:\n  segments: paper\n  gamma: 5\n")
    host, ours = llamafactory.read_config(path, ["pref_beta=0.1", "mmrlhf.gamma=2"])
    assert (host, ours) == ({"stage": "dpo", "pref_beta": 0.1}, {"segments": "paper", "gamma": 2})
    with pytest.raises(ValueError, match="arguments after the file are key=value"):
        llamafactory.read_config(path, ["--pref_beta", "0.1"])
    with pytest.raises(FileNotFoundError):
        llamafactory.read_config(tmp_path / "none.yaml")
    path.write_text("stage: sft\n")
    with pytest.raises(ValueError, match="stage must be dpo here, got 'sft'"):
        llamafactory.run(path)
    path.write_text("stage: dpo\nmmrlhf: paper\n")
    with pytest.raises(ValueError, match="mmrlhf must be a section"):
        llamafactory.read_config(path)
    assert llamafactory.main(["export", str(path)]) == 2


def test_swift_rows_keep_what_the_tower_takes():
    made = {
        "chosen_input_ids": [1, 2, 3],
        "chosen_labels": [IGNORED, IGNORED, 3],
        "chosen_pixel_values": torch.ones(4, 3),
        "chosen_image_grid_thw": torch.tensor([[1, 2, 2]]),
        "chosen_mm_token_type_ids": torch.tensor([0, 1, 0]),
        "chosen_loss_scale": None,
        "rejected_input_ids": [1, 2, 4],
        "rejected_labels": [IGNORED, IGNORED, 4],
        "rejected_pixel_values": torch.ones(4, 3),
        "rejected_image_grid_thw": torch.tensor([[1, 2, 2]]),
        "margin": 0.5,
        "lengths": [3, 3],
    }
    batch = swift.Collator(PairOptions())([made])[BATCH].batch
    assert sorted(batch.vision) == ["image_grid_thw", "pixel_values"]
    assert batch.vision["pixel_values"].shape == (4, 3)
    assert (batch.images_per_group, batch.margin.tolist()) == ((1,), [0.5])


@pytest.mark.parametrize("change", ["none", "trained", "other"])
def test_one_tower_for_policy_and_reference(change):
    """Only a frozen tower whose weights are the reference's may lend it its features."""
    model, _ = model_and_processor("qwen2_5_vl")
    reference = copy.deepcopy(model).requires_grad_(False)
    tower = model.model.visual
    tower.requires_grad_(change == "trained")
    if change == "other":
        next(tower.parameters()).data.add_(1e-3)
    assert forward.tower_is_shared(model, reference) is (change == "none")


def test_beta_is_the_pairs_only_inside():
    class Trainer(PairMethods):
        pair_options = PairOptions(beta_mode="margin")
        accelerator = SimpleNamespace(device=torch.device("cpu"))
        beta = 0.1

    trainer = Trainer()
    pair = (row([1], [2]), row([1], [3]))
    with trainer.pair_betas(packed([pair, pair], margins=[0.0, 100.0])) as betas:
        assert trainer.beta is betas
        torch.testing.assert_close(betas, torch.tensor([0.1, 0.15]))
    assert trainer.beta == 0.1
    with (
        pytest.raises(ValueError, match="pair 1 of the batch: beta_mode is 'margin'"),
        trainer.pair_betas(packed([pair])),
    ):
        pass
    assert trainer.beta == 0.1


def test_the_example_file_is_one(repository):
    host, ours = llamafactory.read_config(repository / "examples" / "llamafactory.yaml")
    assert options_from(ours) == PairOptions(segments="paper", gamma=5.0, reduction="mean")
    assert (host["stage"], host["pref_beta"]) == ("dpo", 0.5)


def test_the_documentation_names_every_option(repository):
    text = (repository / "docs" / "drop-in.md").read_text()
    part = text[text.index("## LLaMA-Factory") : text.index("## Liger-Kernel")]
    assert [field.name for field in dataclasses.fields(PairOptions) if f"`{field.name}" not in part] == []
