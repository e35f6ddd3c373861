"""Settings: their names are frozen, every bad value is refused by name, and the recipes are the papers'."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mmrlhf import config
from mmrlhf.config import TrainConfig, dump, load
from mmrlhf.ops import LOSS_KINDS, backend
from mmrlhf.ops.loss_kinds import LOSSES
from mmrlhf.ops.preference import check_kind

REPOSITORY = Path(__file__).resolve().parents[1]

# Adding, renaming or removing a setting is a decision: change it here too, and tell the users.
FIELDS = {
    "": "recipe output seed epochs max_steps groups_per_step tokens_per_batch device backend shard "
    "sync_each_batch save_every keep_last "
    "resume resume_changed log_every samples sample_tokens reference_cache trackers report max_bad_steps model lora "
    "data loss reward optim",
    "model": "path revision trust_remote_code dtype freeze_vision freeze_projector freeze_lm_head "
    "gradient_checkpointing share_prefix self_check liger",
    "lora": "enabled r alpha dropout targets",
    "data": "path format root pairs on_bad_row max_bad_rows max_group_tokens max_image_pixels segments gamma "
    "video_frames workers vision_cache vision_cache_bytes",
    "loss": "kind beta beta_mode w k reduction label_smoothing sft_weight",
    "reward": "head dropout critic_weight score_weight tie_weight center_weight margin",
    "optim": "lr betas eps weight_decay warmup final_lr clip",
}


@pytest.mark.parametrize("part", FIELDS)
def test_names_are_frozen(part):
    owner = getattr(TrainConfig(), part) if part else TrainConfig()
    assert [field.name for field in dataclasses.fields(owner)] == FIELDS[part].split()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3  # type: ignore[misc]


def test_loss_kinds_are_those_of_the_ops():
    assert set(config.LOSS_KINDS) == set(LOSS_KINDS)
    assert {name for name, kind in LOSSES.items() if kind.smoothing} == set(config.SMOOTHED_KINDS)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("recipe=dpoo", "recipe must be one of dpo, rlhf_v, rlhf_v_released, mm_dpo, mm_rlhf_reward, got 'dpoo'"),
        ("model.dtype=float8", "model.dtype must be one of auto, float32, bfloat16, float16, got 'float8'"),
        ("lora.r=0", "lora.r must be a positive integer, got 0"),
        ("lora.alpha=0", "lora.alpha must be finite and positive, got 0.0"),
        ("lora.alpha=inf", "lora.alpha must be finite and positive, got inf"),
        ("lora.dropout=1", "lora.dropout must be in [0, 1), got 1.0"),
        ("data.pairs=best", "data.pairs must be one of all, adjacent, best_vs_rest, got 'best'"),
        ("data.on_bad_row=ignore", "data.on_bad_row must be one of raise, skip, got 'ignore'"),
        ("data.max_bad_rows=1.5", "data.max_bad_rows must be in [0, 1], got 1.5"),
        ("data.segments=both", "data.segments must be one of paper, muffin, got 'both'"),
        ("data.gamma=nan", "data.gamma must be finite and positive, got nan"),
        ("data.workers=-1", "data.workers must be 0 or more, got -1"),
        ("data.vision_cache_bytes=0", "data.vision_cache_bytes must be positive, got 0"),
        ("loss.kind=dpo", "loss.kind must be one of sigmoid, "),
        ("loss.beta=0", "loss.beta must be finite and positive, got 0.0"),
        ("loss.beta_mode=auto", "loss.beta_mode must be one of fixed, margin, implicit, got 'auto'"),
        ("loss.label_smoothing=0.5", "loss.label_smoothing must be in [0, 0.5), got 0.5"),
        ("loss.sft_weight=-1", "loss.sft_weight must be 0 or more, got -1.0"),
        ("optim.lr=inf", "optim.lr must be finite and positive, got inf"),
        ("optim.warmup=10", "optim.warmup must be in [0, 1], got 10.0"),
        ("optim.clip=-1", "optim.clip must be 0 or more, got -1.0"),
        ("optim.betas=[1,2]", "optim.betas must be two numbers in [0, 1), got (1.0, 2.0)"),
        ("optim.betas=[0.9,nan]", "optim.betas must be two numbers in [0, 1), got (0.9, nan)"),
        ("optim.betas=[0.9]", "optim.betas must be two numbers in [0, 1), got (0.9,)"),
        ("output=''", "output must be a folder, got ''"),
        ("reference_cache=''", "reference_cache must be a folder or null, got ''"),
        ("optim.eps=-1", "optim.eps must be finite and positive, got -1.0"),
        ("optim.weight_decay=inf", "optim.weight_decay must be finite and 0 or more, got inf"),
        ("epochs=0", "epochs must be finite and positive, got 0.0"),
        ("epochs=inf", "epochs must be finite and positive, got inf"),
        ("backend=foo", "backend must be one of cuda, triton, cpu, torch, reference, got 'foo'"),
        ("device=xpu", "device must be auto, cpu, cuda or cuda:N, got 'xpu'"),
        ("device=meta", "device must be auto, cpu, cuda or cuda:N, got 'meta'"),
        ("model.dtype=float16", "model.dtype must be auto, float32 or bfloat16 where lora.enabled is false"),
        ("data.gamma=2", "data.gamma must be 1 where data.segments is not set, got 2.0"),
        ("max_steps=-1", "max_steps must be 0 or more, got -1"),
        ("keep_last=0", "keep_last must be positive, got 0"),
        ("samples=-1", "samples must be 0 or more, got -1"),
        ("trackers=[mlflow]", "trackers must be one of tensorboard, wandb, got 'mlflow'"),
        ("optim.lrr=1", "command line: optim.lrr: Key 'lrr' not in 'OptimConfig'. Did you mean: 'lr'?"),
        ("optim.lr=fast", "command line: optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("loss.kind=[1", "command line is not valid YAML: while parsing a flow sequence"),
    ],
)
def test_bad_values_are_named(word, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        load(None, [word])
    assert str(caught.value).startswith(message)


def test_lora_needs_targets_and_takes_float16():
    with pytest.raises(ValueError, match=r"lora\.targets must be at least one name where lora\.enabled is true"):
        load(None, ["lora.enabled=true", "lora.targets=[]"])
    assert load(None, ["lora.targets=[]"]).lora.targets == ()
    assert load(None, ["lora.enabled=true", "model.dtype=float16", "device=cuda:1"]).model.dtype == "float16"


def test_backends_are_those_of_the_ops():
    assert config.BACKENDS == backend.KNOWN
    for name in config.BACKENDS:
        assert TrainConfig(backend=name).backend == name


def test_projector_is_frozen_only_with_the_tower():
    with pytest.raises(ValueError, match=r"model\.freeze_projector must be false where model\.freeze_vision is false"):
        load(None, ["model.freeze_vision=false", "model.freeze_projector=true"])


def test_file_then_words_on_top_of_the_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: rlhf_v\nloss:\n  beta: 0.3\noptim:\n  lr: 1.0e-6\n")
    settings = load(path, ["optim.lr=2e-6", "trackers=[wandb]"])
    assert (settings.data.gamma, settings.loss.beta, settings.optim.lr) == (5.0, 0.3, 2e-6)
    assert settings.trackers == ("wandb",)
    assert load(path, ["recipe=dpo"]).data.gamma == 1.0
    path.write_text(dump(settings))
    assert load(path) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold a mapping of settings, it holds a list"),
        ("model: {path: ??", "is not valid YAML"),
        ("modle: {}\n", "Key 'modle' not in 'TrainConfig'. Did you mean: 'model'?"),
    ],
)
def test_broken_files_are_named(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared below
        load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.yaml")


def test_an_error_names_the_key_and_where_it_was_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {lr: fast}\n")
    for words, origin in (([], str(path)), (["optim.lr=slow"], "command line")):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the start of the message is compared below
            load(path, words)
        assert str(caught.value).startswith(f"{origin}: optim.lr: Value ")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", LOSS_KINDS)
def test_label_smoothing_is_refused_when_the_settings_are_made(kind, smoothing):
    """As the ops refuse it at the first step, hours later: exo_pair without, and most kinds with it."""
    try:
        check_kind(kind, smoothing, 0.5, 0.05)
    except ValueError:
        with pytest.raises(
            ValueError, match=rf"loss\.label_smoothing must be .* for loss\.kind {kind}.*got {smoothing}"
        ):
            config.LossConfig(kind=kind, label_smoothing=smoothing)
    else:
        assert config.LossConfig(kind=kind, label_smoothing=smoothing).label_smoothing == smoothing


def test_values_of_the_papers():
    """RLHF-V section 4.1 and appendix C; its script of 2024-02-05; MM-RLHF section 4 and appendix F.2."""
    paper, released, mm = (load(None, [f"recipe={name}"]) for name in ("rlhf_v", "rlhf_v_released", "mm_dpo"))
    assert (paper.loss.beta, paper.data.gamma, paper.loss.reduction, paper.data.segments) == (0.5, 5.0, "mean", "paper")
    assert (paper.optim.lr, paper.optim.warmup) == (5e-7, 0.1)
    assert (released.loss.beta, released.data.gamma, released.loss.reduction) == (0.1, 1.1, "sum")
    assert (released.data.segments, released.optim.warmup) == ("muffin", 0.03)
    assert (mm.loss.beta, mm.loss.w, mm.loss.k, mm.loss.beta_mode) == (0.1, 0.5, 0.5, "margin")
    assert (mm.loss.sft_weight, mm.loss.reduction, mm.data.pairs) == (0.25, "sum", "all")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_recipes_load_and_say_what_their_recipe_says(path):
    """The files repeat the named values with their sources: they must not say something else."""
    settings = load(path, ["model.path=m", "data.path=d"])
    assert settings.recipe == path.stem
    named = load(None, [f"recipe={path.stem}"])
    for part, values in config.RECIPES[path.stem].items():
        if not isinstance(values, dict):
            assert getattr(settings, part) == values, part
            continue
        for name in values:
            assert getattr(getattr(settings, part), name) == getattr(getattr(named, part), name), f"{part}.{name}"
    assert (load(path).model.path, load(path).data.path) == ("", ""), "what only the user knows is left open"
