"""PreferenceTrainer against TRL's own DPOTrainer: same data, seed and model must give the same run."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

from trl import DPOConfig, DPOTrainer  # noqa: E402

from dporows import logged, lora, model_and_processor, record, run, trl_rows  # noqa: E402
from mmrlhf.integrations.objective import LOSS_TYPES  # noqa: E402
from mmrlhf.integrations.trl import PreferenceConfig, PreferenceTrainer, patch_dpo_trainer  # noqa: E402
from mmrlhf.integrations.trl_support import check_settings, check_trainer  # noqa: E402

pytestmark = pytest.mark.hosts
SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1}
# Float noise: both sides are float32, and an update of AdamW turns a last digit of a gradient near 0 into a step of
# the learning rate, so differences grow with the steps. A wrong mask, position or divisor is off by 1e-2 and more.
NOISE = {"rtol": 2e-4, "atol": 2e-4}


def table(rows):
    return datasets.Dataset.from_list(rows)


def both(family, tmp_path, rows, **options):
    """(losses, trainer) of TRL and of ours, on equal models."""
    model, processor = model_and_processor(family)
    other = copy.deepcopy(model)
    theirs = run(DPOTrainer, DPOConfig, model, processor, rows, tmp_path / "trl", **options)
    ours = run(PreferenceTrainer, PreferenceConfig, other, processor, rows, tmp_path / "ours", **options)
    return theirs, ours


def same(a, b, **tolerance):
    torch.testing.assert_close(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), **(tolerance or NOISE)
    )


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_fifty_steps_give_trls_trajectories(family, peft, tmp_path):
    (want, trl), (got, ours) = both(family, tmp_path, table(trl_rows(12)), steps=50, peft=peft)
    assert len(got) == len(want) == 50
    assert want[-1] < 0.99 * want[0]  # it trains
    same(got, want)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        same(logged(ours, name), logged(trl, name), rtol=2e-3, atol=1e-3)


def test_metrics_have_trls_names_and_values(tmp_path):
    (_, trl), (_, ours) = both("qwen2_5_vl", tmp_path, table(trl_rows(6)), steps=3)
    want, got = trl.state.log_history[1], ours.state.log_history[1]
    assert set(got) == set(want)
    for name in set(want) - {"num_tokens"}:
        assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-5), name
    assert got["num_tokens"] < want["num_tokens"]  # each prompt counts once


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_every_loss_type_equals_trls(kind, tmp_path):
    options = {"loss_type": [kind], "label_smoothing": SMOOTHING.get(kind, 0.0), "steps": 2}
    (want, _), (got, _) = both("qwen2_5_vl", tmp_path, table(trl_rows(4)), **options)
    same(got, want, rtol=1e-4, atol=1e-5)


def test_weighted_mixtures_equal_trls(tmp_path):
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.25], "steps": 3}
    (want, _), (got, _) = both("llava_onevision", tmp_path, table(trl_rows(4)), **options)
    same(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "peft": True},
        {"sync_ref_model": True, "ref_model_sync_steps": 2},
        {"max_length": 34},
    ],
    ids=["accumulation", "checkpointing", "checkpointing-lora", "synced-reference", "cut-responses"],
)
def test_trls_options_keep_working(options, tmp_path):
    (want, _), (got, _) = both("qwen2_5_vl", tmp_path, table(trl_rows(8)), steps=4, **options)
    same(got, want)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl", "smolvlm", "gemma3"])
def test_other_families_equal_trls(family, tmp_path):
    """Tiles, deepstack, and one (gemma3) whose pictures attend both ways, so that its rows run apart."""
    (want, _), (got, _) = both(family, tmp_path, table(trl_rows(4)), steps=3)
    same(got, want)


def test_pictures_and_text_in_one_batch(tmp_path):
    rows = [*trl_rows(3), *({**row, "images": []} for row in trl_rows(3, seed=2, images=False))]
    (want, _), (got, _) = both("qwen2_5_vl", tmp_path, table(rows), steps=3)
    same(got, want)


@pytest.fixture
def clean_accelerate(monkeypatch):
    """Accelerate keeps the precision of the first trainer of a process; what a test sets must not stay."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_bf16_autocast(clean_accelerate, tmp_path):
    """Both sides round to bfloat16, in different places: agreement to its precision over log-ratios of 100 tokens."""
    (want, _), (got, _) = both("qwen2_5_vl", tmp_path, table(trl_rows(4)), steps=3, bf16=True, beta=0.01)
    same(got, want, rtol=1e-2, atol=1e-3)
    assert not torch.is_autocast_enabled("cpu")  # Accelerate's context, entered twice, would stay on for good


def test_workers_collate_in_other_processes(tmp_path):
    rows = table(trl_rows(4))
    runs = []
    for workers in (0, 1):
        model, processor = model_and_processor("qwen2_5_vl")
        options = {"steps": 2, "dataloader_num_workers": workers}
        runs.append(run(PreferenceTrainer, PreferenceConfig, model, processor, rows, tmp_path, **options)[0])
    assert runs[0] == runs[1]


def test_rows_without_pictures(tmp_path):
    (want, _), (got, _) = both("qwen2_5_vl", tmp_path, table(trl_rows(6, images=False)), steps=3)
    same(got, want)


def test_an_adapter_that_is_trained_on_is_its_own_reference(tmp_path):
    from peft import get_peft_model

    losses = []
    for kind, config in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig)):
        model, processor = model_and_processor("qwen2_5_vl")
        torch.manual_seed(5)
        adapted = get_peft_model(model, lora())
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        found, _ = run(kind, config, adapted, processor, table(trl_rows(4)), tmp_path, steps=3, reference=None)
        losses.append(found)
    assert losses[0][0] == pytest.approx(0.6931472, abs=1e-6)
    same(losses[1], losses[0])


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_cached_reference_changes_nothing(peft, tmp_path):
    """TRL raises for pictures. The two runs see the same numbers, so they agree to rounding."""
    rows = table(trl_rows(5))
    runs = []
    for cached in (False, True):
        model, processor = model_and_processor("llava_onevision")
        runs.append(
            run(
                PreferenceTrainer,
                PreferenceConfig,
                model,
                processor,
                rows,
                tmp_path,
                steps=5,
                peft=peft,
                precompute_ref_log_probs=cached,
            )
        )
    (want, _), (got, trainer) = runs
    assert trainer.ref_model is None
    same(got, want)
    assert len(list((tmp_path / "reference").rglob("*.safetensors"))) == 1
    if peft:
        measured = trainer.evaluate(table(trl_rows(2, seed=9)))
        assert measured["eval_loss"] == pytest.approx(0.69, abs=0.1)


def test_evaluation_equals_trls(tmp_path):
    rows, held_out = table(trl_rows(4)), table(trl_rows(5, seed=7))
    found = []
    for kind, config in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig)):
        model, processor = model_and_processor("llava_onevision")
        _, trainer = run(
            kind, config, model, processor, rows, tmp_path, steps=2, eval_dataset=held_out, eval_strategy="steps"
        )
        found.append(trainer.evaluate())
    want, got = found
    timing = {name for name in want if "runtime" in name or "per_second" in name}
    assert set(got) == set(want)
    for name in set(want) - timing - {"eval_num_tokens"}:
        assert got[name] == pytest.approx(want[name], rel=1e-3, abs=1e-4), name


def test_a_resumed_run_goes_on_exactly(tmp_path):
    rows, options = table(trl_rows(8)), {"save_strategy": "steps", "save_steps": 2, "peft": True, "data_seed": 1}
    model, processor = model_and_processor("llava_onevision")
    whole, _ = run(PreferenceTrainer, PreferenceConfig, model, processor, rows, tmp_path / "a", steps=4, **options)
    model, processor = model_and_processor("llava_onevision")
    rest, _ = run(
        PreferenceTrainer,
        PreferenceConfig,
        model,
        processor,
        rows,
        tmp_path / "b",
        steps=4,
        resume=str(tmp_path / "a" / "checkpoint-2"),
        **options,
    )
    assert rest == whole[2:]


@pytest.mark.parametrize("images", [True, False], ids=["pictures", "text"])
def test_a_patched_trainer_runs_as_ours_does(images, tmp_path):
    rows = table(trl_rows(6, images=images))
    model, processor = model_and_processor("qwen2_5_vl")
    other = copy.deepcopy(model)
    options = {"segments": "paper", "gamma": 3.0, "reduction": "mean"}
    want, _ = run(PreferenceTrainer, PreferenceConfig, model, processor, rows, tmp_path, steps=3, **options)
    _, trainer = run(DPOTrainer, DPOConfig, other, processor, rows, tmp_path, steps=0)
    trainer.args.max_steps = 3
    assert patch_dpo_trainer(trainer, **options) is trainer
    assert isinstance(trainer, DPOTrainer)
    got = record(trainer)
    trainer.train()
    same(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("peft", [True, False], ids=["adapter switched off", "a model of its own"])
def test_a_frozen_tower_runs_once_for_policy_and_reference(tmp_path, peft):
    model, processor = model_and_processor("llava_onevision")
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.model.image_newline.requires_grad_(False)
    calls = []
    tower = model.model.vision_tower.forward
    model.model.vision_tower.forward = lambda pixels, **kw: (calls.append(pixels.shape[0]), tower(pixels, **kw))[1]
    rows = trl_rows(4)
    run(PreferenceTrainer, PreferenceConfig, model, processor, table(rows), tmp_path, steps=2, peft=peft)
    assert len(calls) == 2  # TRL's own runs each picture four times a step


def test_the_model_still_generates_and_saves(tmp_path):
    from mmrlhf.models.load import load_model

    model, processor = model_and_processor("qwen2_5_vl")
    _, trainer = run(PreferenceTrainer, PreferenceConfig, model, processor, table(trl_rows(4)), tmp_path, steps=1)
    ids = torch.tensor([[5, 6, 7]])
    made = trainer.model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    trainer.save_model(str(tmp_path / "model"))
    again = load_model(str(tmp_path / "model"))
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=3, do_sample=False), made)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 64, "truncation_mode": "keep_end"}, "truncation_mode"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of"),
        ({"torch_compile": True}, "torch_compile"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ({"loss_type": ["exo_pair"]}, "needs label_smoothing"),
        ({"segments": "words"}, "segments must be"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"beta_mode": "implicit"}, "beta_mode must be one of"),
        ({"pairs": "some"}, "pairs must be one of"),
        ({"gamma": 0.0}, "gamma must be"),
        ({"max_length": 0}, "max_length must be"),
    ],
)
def test_what_cannot_be_honoured_raises_at_construction(options, message, tmp_path):
    model, processor = model_and_processor("llava_onevision")
    with pytest.raises(ValueError, match=message):
        run(PreferenceTrainer, PreferenceConfig, model, processor, table(trl_rows(2)), tmp_path, steps=1, **options)


def test_arguments_that_cannot_be_honoured(tmp_path):
    model, processor = model_and_processor("llava_onevision")
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    common = {"model": model, "args": args, "train_dataset": table(trl_rows(2)), "processing_class": processor}
    with pytest.raises(ValueError, match="data_collator"):
        PreferenceTrainer(**common, data_collator=list)
    with pytest.raises(ValueError, match="compute_metrics"):
        PreferenceTrainer(**common, compute_metrics=dict)
    with pytest.raises(ValueError, match="train_dataset` is required"):
        PreferenceTrainer(**common | {"train_dataset": None})
    from peft import LoraConfig

    with pytest.raises(ValueError, match="lm_head"):
        PreferenceTrainer(**common, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))


def fake_trainer(**changes):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=2))
    accelerator = SimpleNamespace(state=state, parallelism_config=None)
    plain = {"model": None, "aux_loss_enabled": False, "is_fsdp_enabled": False, "accelerator": accelerator}
    return SimpleNamespace(**plain | changes)


def test_hosts_that_cannot_be_honoured():
    """What needs a mixture of experts, several devices or DeepSpeed to be built for real."""
    check_trainer(fake_trainer(is_fsdp_enabled=True))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        check_trainer(fake_trainer(aux_loss_enabled=True))
    with pytest.raises(ValueError, match="device_map splits the model over 0, 1"):
        check_trainer(fake_trainer(model=SimpleNamespace(hf_device_map={"model": 0, "lm_head": 1})))
    old = fake_trainer(is_fsdp_enabled=True)
    old.accelerator.state.fsdp_plugin.fsdp_version = 1
    with pytest.raises(ValueError, match="fsdp_version 2"):
        check_trainer(old)
    cut = fake_trainer()
    cut.accelerator.parallelism_config = SimpleNamespace(tp_size=2, cp_size=1, sp_size=1)
    with pytest.raises(ValueError, match="data parallelism"):
        check_trainer(cut)
    args = PreferenceConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    check_settings(args, None, None)
    args.deepspeed_plugin.zero_stage = 3
    with pytest.raises(ValueError, match="ZeRO-1 or 2, or FSDP2"):
        check_settings(args, None, None)
    args.deepspeed_plugin = None
    args.train_sampling_strategy = "group_by_length"
    with pytest.raises(ValueError, match="group_by_length"):
        check_settings(args, None, None)


def test_patching_refuses_what_it_cannot_do(tmp_path):
    model, processor = model_and_processor("llava_onevision")
    with pytest.raises(TypeError, match=r"must be a trl.DPOTrainer, got str"):
        patch_dpo_trainer("trainer")
    _, trainer = run(DPOTrainer, DPOConfig, model, processor, table(trl_rows(2)), tmp_path, steps=0)
    with pytest.raises(TypeError, match="unknown options gama"):
        patch_dpo_trainer(trainer, gama=2.0)
    before = (type(trainer), trainer.data_collator)
    trainer.aux_loss_enabled = True
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        patch_dpo_trainer(trainer)
    assert (type(trainer), trainer.data_collator) == before, "what is refused trains on as it was"
    trainer.aux_loss_enabled = False
    patch_dpo_trainer(trainer)
    with pytest.raises(ValueError, match="patched already"):
        patch_dpo_trainer(trainer)


def test_a_prompt_that_fills_max_length_is_named(tmp_path):
    model, processor = model_and_processor("llava_onevision")
    with pytest.raises(ValueError, match=r"the prompt alone has \d+ tokens, max_length is 20"):
        run(PreferenceTrainer, PreferenceConfig, model, processor, table(trl_rows(2)), tmp_path, steps=1, max_length=20)


def test_margin_mode_names_the_row_without_margin(tmp_path):
    model, processor = model_and_processor("llava_onevision")
    with pytest.raises(ValueError, match="beta_mode is 'margin', but its pair has no margin"):
        run(
            PreferenceTrainer,
            PreferenceConfig,
            model,
            processor,
            table(trl_rows(2)),
            tmp_path,
            steps=1,
            beta_mode="margin",
        )
