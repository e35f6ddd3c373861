"""The loop against a plain loop in float64, and the ways to cut the same training that must not matter."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.config import TrainConfig
from mmrlhf.data.collate import Encoder, PreferenceDataset, collate
from mmrlhf.data.packing import plan_epoch
from mmrlhf.data.readers import read_groups
from mmrlhf.models import shared_prefix
from mmrlhf.ops import reference as exact
from mmrlhf.train.loop import train
from tiny import tiny_model
from tinyrun import facts_of, metrics_of, settings_for

EPS = "optim.eps=1e-3"  # with 1e-8, AdamW's first step is the sign of a gradient, noise included


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return load_file(newest / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """|one - other| / |other - start|: the difference as a share of what training changed."""
    apart = sum(float((one[n].double() - other[n].double()).pow(2).sum()) for n in other)
    moved = sum(float((other[n].double() - start[n].double()).pow(2).sum()) for n in other)
    return math.sqrt(apart / moved)


class PlainLoop:
    """Separate rows, whole logits, float64, all pairs of a step at once: nothing shared, nothing fused."""

    def __init__(self, settings: TrainConfig):
        self.settings = settings
        self.model, processor = tiny_model("llava_onevision")
        self.model = self.model.double().eval()
        found = read_groups(settings.data.path)
        encoder = Encoder(
            processor, root=found.root, segments=settings.data.segments, gamma=settings.data.gamma, pairs="all"
        )
        self.dataset = PreferenceDataset(found.groups, encoder)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for parameter in self.model.model.vision_tower.parameters():
            parameter.requires_grad_(False)
        self.reference = [self.logp(index).detach() for index in range(len(self.dataset))]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optim = settings.optim
        decayed = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": optim.weight_decay}]
        plain = [{"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
        self.trained = trained
        self.adamw = torch.optim.AdamW(decayed + plain, lr=optim.lr, betas=optim.betas, eps=optim.eps)

    def logp(self, index: int) -> torch.Tensor:
        """[n] of one group, a row of its own for every response."""
        group = self.dataset[index]
        vision = {k: v.double() if v.is_floating_point() else v for k, v in group.vision.items()}
        pieces = []
        for response in group.response_ids:
            row = torch.cat((group.prefix_ids, response))[None]
            logits = self.model(input_ids=row, attention_mask=torch.ones_like(row), **vision).logits[0]
            predicted = logits[len(group.prefix_ids) - 1 : -1].log_softmax(-1)
            pieces.append(predicted.gather(1, response[:, None])[:, 0])
        return torch.cat(pieces)

    def run(self) -> list[dict[str, float]]:
        settings, loss_settings, lines = self.settings, self.settings.loss, []
        plan = [
            [index for part in step for index in part]
            for epoch in range(math.ceil(settings.epochs))
            for step in plan_epoch(
                self.dataset.lengths,
                groups_per_step=settings.groups_per_step,
                tokens_per_batch=10**6,
                seed=settings.seed,
                epoch=epoch,
            )
        ]
        for number, groups in enumerate(plan):
            batch = collate([self.dataset[index] for index in groups])
            beta = loss_settings.beta
            if loss_settings.beta_mode == "margin":
                beta = exact.dynamic_beta(batch.margin.double(), beta=beta, w=loss_settings.w, k=loss_settings.k)
            weight = {"token_weight": batch.token_weight.double(), "reduction": loss_settings.reduction}
            out = exact.Objective(
                batch.cu_seqlens,
                batch.pairs,
                **weight,
                reference_scores=exact.sequence_score(
                    torch.cat([self.reference[index] for index in groups]), batch.cu_seqlens, **weight
                ),
                beta=beta,
                sft_weight=loss_settings.sft_weight,
            )(torch.cat([self.logp(index) for index in groups]))
            self.adamw.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, settings.optim.clip)
            warm = math.ceil(settings.optim.warmup * len(plan))
            rate = settings.optim.lr * (
                (number + 1) / warm
                if number < warm
                else 0.5 * (1 + math.cos(math.pi * (number - warm) / (len(plan) - warm)))
            )
            for each in self.adamw.param_groups:
                each["lr"] = rate
            self.adamw.step()
            lines.append(
                {
                    "loss": float(out.loss.detach()),
                    "grad_norm": float(norm),
                    "learning_rate": rate,
                    "rewards/chosen": float(out.rewards[batch.pairs[:, 0]].mean()),
                    "rewards/rejected": float(out.rewards[batch.pairs[:, 1]].mean()),
                    "rewards/margins": float(out.margins.mean()),
                    "rewards/accuracies": float((out.margins > 0).double().mean()),
                    "beta/mean": float(out.beta.mean()),
                    "beta/max": float(out.beta.max()),
                }
            )
        return lines


@pytest.mark.parametrize(
    "recipe",
    [
        ["recipe=rlhf_v"],
        ["recipe=rlhf_v_released"],
        ["recipe=mm_dpo", "loss.w=2", "optim.weight_decay=0.1"],
    ],
    ids=lambda words: words[0].removeprefix("recipe="),
)
def test_trajectory_is_that_of_a_plain_float64_loop(recipe, tmp_path, model_folder, data_file):
    words = [*recipe, EPS, "optim.lr=3e-3", "optim.warmup=0.3", "epochs=2", "tokens_per_batch=64", "groups_per_step=4"]
    settings = settings_for(tmp_path / "run", data_file, *words, model=model_folder)
    plain = PlainLoop(settings)
    expected = plain.run()
    got = metrics_of(train(settings))
    assert len(got) == len(expected) == 4
    for mine, theirs in zip(got, expected, strict=True):
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (mine["step"], name)
    assert got[-1]["loss"] != pytest.approx(got[0]["loss"], abs=1e-4)
    trained = {name: p.detach() for name, p in plain.model.named_parameters()}
    assert distance(weights_of(tmp_path / "run"), trained, plain.start) < 2e-4


def test_first_step_has_loss_log_2_and_no_reward(tmp_path, model_folder, data_file):
    first = metrics_of(train(settings_for(tmp_path / "run", data_file, "max_steps=1", model=model_folder)))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3"])
def test_families_with_other_positions_and_masks_start_and_move(family, tmp_path, data_file):
    """Three-axis positions; many tiles a picture; pictures that attend both ways, where no prefix can be shared."""
    model, processor = tiny_model(family)
    words = ["max_steps=2", "groups_per_step=3", "tokens_per_batch=2000", "samples=1"]
    run = train(settings_for(tmp_path / "run", data_file, *words), model=model, processor=processor)
    first, second = metrics_of(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["grad_norm"] > 0
    assert second["rewards/margins"] != 0
    assert facts_of(run)["self_check"]["max_error"] < 1e-4


def test_cutting_a_step_into_micro_batches_changes_nothing(tmp_path, model_folder, data_file):
    """1 x 6, 6 x 1 and 2 or 3 micro-batches: the same trajectory, sft term included."""
    runs = {}
    for name, tokens in (("whole", 10_000), ("two", 150), ("each", 1)):
        words = ["recipe=mm_dpo", EPS, f"tokens_per_batch={tokens}", "groups_per_step=6", "epochs=3", "optim.lr=1e-3"]
        runs[name] = train(settings_for(tmp_path / name, data_file, *words, model=model_folder))
    start = {name: p.detach() for name, p in tiny_model("llava_onevision")[0].named_parameters()}
    whole = metrics_of(runs["whole"])
    for name in ("two", "each"):
        for mine, theirs in zip(metrics_of(runs[name]), whole, strict=True):
            for key in ("loss", "sft_loss", "grad_norm", "rewards/margins", "logps/chosen", "beta/mean", "beta/min"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), (name, mine["step"], key)
        assert distance(weights_of(runs[name]), weights_of(runs["whole"]), start) < 1e-4
    assert whole[0]["utilization"] < 0.1
    assert metrics_of(runs["two"])[0]["utilization"] > 0.4


def test_separate_rows_train_the_same(tmp_path, model_folder, data_file):
    shared, apart = (
        metrics_of(
            train(settings_for(tmp_path / name, data_file, EPS, f"model.share_prefix={name}", model=model_folder))
        )
        for name in ("true", "false")
    )
    for mine, theirs in zip(shared, apart, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert facts_of(tmp_path / "false")["share_prefix"] == {"used": False, "reason": "model.share_prefix is false"}


def test_separate_rows_are_cut_by_the_tokens_they_have(tmp_path, model_folder, data_file, monkeypatch):
    """A prefix for each of three responses: tokens_per_batch bounds what goes through the decoder, the reference's too,
    and that is what the metrics count."""
    seen, packed = [], shared_prefix._packed

    def watched(model, input_ids, *rest):
        seen.append(input_ids.numel())
        return packed(model, input_ids, *rest)

    monkeypatch.setattr(shared_prefix, "_packed", watched)
    words = [
        *("model.share_prefix=false", "model.self_check=false"),
        *("tokens_per_batch=200", "groups_per_step=6", "max_steps=1"),
    ]
    run = train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
    (line,) = metrics_of(run)
    assert max(seen) <= 200
    assert 2 * line["tokens"] == sum(seen)
    assert line["utilization"] <= 1


def test_gradient_checkpointing_and_workers_change_nothing(tmp_path, model_folder, data_file):
    plain = metrics_of(train(settings_for(tmp_path / "plain", data_file, model=model_folder)))
    for name, words in (("checkpointed", ["model.gradient_checkpointing=true"]), ("workers", ["data.workers=2"])):
        lines = metrics_of(train(settings_for(tmp_path / name, data_file, *words, model=model_folder)))
        assert [line["loss"] for line in lines] == [line["loss"] for line in plain], name


@pytest.mark.parametrize(
    ("words", "frozen", "trained"),
    [
        ([], "vision_tower", "multi_modal_projector"),
        (["model.freeze_projector=true"], "multi_modal_projector", "language_model"),
        (["model.freeze_lm_head=true"], "lm_head", "language_model"),
        (["model.freeze_vision=false"], "no such part", "vision_tower"),
    ],
    ids=["vision", "projector", "lm_head", "nothing"],
)
def test_what_is_frozen_stays_and_the_rest_moves(words, frozen, trained, tmp_path, model_folder, data_file):
    train(settings_for(tmp_path / "run", data_file, "max_steps=2", *words, model=model_folder))
    start = {name: p.detach() for name, p in tiny_model("llava_onevision")[0].named_parameters()}
    after = weights_of(tmp_path / "run")
    for name in after:
        if frozen in name:
            assert torch.equal(after[name], start[name]), name
    assert any(not torch.equal(after[name], start[name]) for name in after if trained in name)


def test_lora_trains_its_adapters_alone(tmp_path, model_folder, data_file):
    words = ["lora.enabled=true", "lora.r=2", "optim.lr=1e-2", "max_steps=3", "samples=1"]
    run = train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
    lines = metrics_of(run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["rewards/margins"] != 0
    saved = weights_of(run)
    assert saved
    assert all("lora_" in name and "vision_tower" not in name and "projector" not in name for name in saved)
    assert (run / "model" / "adapter_model.safetensors").is_file()
    facts = facts_of(run)["model"]
    assert facts["lora"] is True
    assert facts["trained"] == sum(tensor.numel() for tensor in saved.values())


@pytest.mark.parametrize("kind", ["simpo", "orpo"])
def test_losses_without_reference_skip_it(kind, tmp_path, model_folder, data_file):
    words = [f"loss.kind={kind}", "loss.reduction=mean", "max_steps=1"]
    run = train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
    assert not (run / "reference").exists()
    assert math.isfinite(metrics_of(run)[0]["loss"])


def test_bfloat16_weights_move_through_their_masters(tmp_path, model_folder, data_file):
    """At lr 1e-6 a bfloat16 weight alone would not move in a single step; its float32 master does."""
    words = ["model.dtype=bfloat16", "optim.lr=1e-6", "max_steps=3"]
    run = train(settings_for(tmp_path / "run", data_file, *words, model=model_folder))
    newest = sorted((run / "checkpoints").iterdir())[-1]
    saved = load_file(newest / "optimizer.safetensors")
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    master, weight = saved[f"{name}/master"], weights_of(run)[name]
    assert master.dtype == torch.float32
    assert weight.dtype == torch.bfloat16
    assert torch.equal(master.bfloat16(), weight)
    start = tiny_model("llava_onevision")[0].get_parameter(name).detach().bfloat16().float()
    moved = (master - start).abs()
    assert 0.5e-6 < moved.max() < 3e-6
    assert (moved > 0).float().mean() > 0.9


def test_pair_modes(tmp_path, model_folder, data_file):
    for mode, pairs in (("all", 18), ("adjacent", 12), ("best_vs_rest", 12)):
        run = train(settings_for(tmp_path / mode, data_file, f"data.pairs={mode}", "max_steps=0", model=model_folder))
        assert facts_of(run)["data"]["pairs"] == pairs


def test_no_step_one_step_and_a_remainder(tmp_path, model_folder, data_file):
    none = train(settings_for(tmp_path / "none", data_file, "max_steps=0", "samples=2", model=model_folder))
    assert metrics_of(none) == []
    assert facts_of(none)["status"] == "finished"
    assert (none / "model" / "config.json").is_file()
    assert (none / "checkpoints" / "step-00000000" / "MANIFEST.json").is_file()
    # 6 groups by 4: two steps of three, not one of four and one of two; 1.5 epochs are three steps
    rest = train(settings_for(tmp_path / "rest", data_file, "groups_per_step=4", "epochs=1.5", model=model_folder))
    lines = metrics_of(rest)
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    scored = [line["scored_tokens"] for line in lines[:2]]
    assert max(scored) < 1.5 * min(scored)  # four and two groups would have twice as many


def test_run_folder_has_all_its_files(tmp_path, model_folder, data_file):
    from mmrlhf import config
    from mmrlhf.models.load import load_model, load_processor

    settings = settings_for(tmp_path / "run", data_file, "samples=3", "max_steps=2", "log_every=2", model=model_folder)
    run = train(settings)
    assert config.load(run / "config.yaml") == settings
    assert [line["step"] for line in metrics_of(run)] == [2]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples] == ["g0", "g2", "g4"]
    for sample in samples:
        assert isinstance(sample["before"], str)
        assert isinstance(sample["after"], str)
        assert (sample["image"] is None) == (sample["id"] == "g4")
        assert sample["image"] is None or (run / sample["image"]).is_file()
        assert sample["prompt"].startswith("what is in the image ?")
        assert [response["rank"] for response in sample["responses"]] == [1, 2, 3]
    facts = facts_of(run)
    assert (facts["status"], facts["steps"], facts["data"]["groups"], facts["data"]["rows"]) == ("finished", 2, 6, 6)
    assert facts["self_check"]["max_error"] < 1e-4
    assert facts["wall_seconds"] > 0
    model, trained = load_model(run / "model"), weights_of(run)
    load_processor(run / "model")
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


def test_bad_and_long_rows_are_counted_and_named(tmp_path, model_folder, data_file):
    data = tmp_path / "ranked.jsonl"
    data.write_text(data_file.read_text() + "{broken\n")
    words = [f"data.root={data_file.parent}", "data.on_bad_row=skip", "data.max_bad_rows=0.5", "max_steps=1"]
    run = train(settings_for(tmp_path / "run", data, *words, model=model_folder))
    skipped = facts_of(run)["data"]["skipped_rows"]
    assert [row["source"] for row in skipped] == [f"{data}:7"]
    with pytest.raises(ValueError, match=r"ranked\.jsonl:7"):
        train(settings_for(tmp_path / "strict", data, f"data.root={data_file.parent}", model=model_folder))
    assert facts_of(tmp_path / "strict")["status"] == "failed"


def test_model_in_memory_is_trained_in_place(tmp_path, data_file):
    model, processor = tiny_model("llava_onevision")
    before = model.lm_head.weight.detach().clone()
    train(settings_for(tmp_path / "run", data_file, "max_steps=1"), model=model, processor=processor)
    assert not torch.equal(model.lm_head.weight, before)
    assert all(p.grad is None for p in model.parameters())
