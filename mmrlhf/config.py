"""The settings of a training run: frozen dataclasses, checked when they are made, and the named recipes.

`load(path, overrides)` merges, in this order: the defaults here, the recipe named by `recipe:`, the YAML file, and
`key=value` words from the command line (OmegaConf does the parsing and the merging; unknown keys are errors).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOSS_KINDS = (
    "sigmoid",
    "hinge",
    "ipo",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "simpo",
    "orpo",
)

REWARD_HEADS = ("tanh", "silu")
REWARD_RECIPE = "mm_rlhf_reward"  # trained by `mmrlhf reward train`

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")

# Kinds for which label_smoothing means something; for exo_pair it has to be above 0.
SMOOTHED_KINDS = ("sigmoid", "robust", "exo_pair", "simpo")


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    _require(value in allowed, name, value, "one of " + ", ".join(allowed))


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # local folder, or hub id
    revision: str | None = None  # required with trust_remote_code on a hub id
    trust_remote_code: bool = False
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    freeze_vision: bool = True  # the vision tower
    freeze_projector: bool = False  # with it, all that lies between the tower and the decoder
    freeze_lm_head: bool = False
    gradient_checkpointing: bool = False
    share_prefix: bool = True  # one pass over a prompt for all its responses
    self_check: bool = True  # first batch against separate rows
    liger: bool = False  # Liger's kernels for norms, MLP and rotary embedding; CUDA only

    def __post_init__(self):
        _one_of("model.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _require(
            self.freeze_vision or not self.freeze_projector,
            "model.freeze_projector",
            self.freeze_projector,
            "false where model.freeze_vision is false",
        )


@dataclass(frozen=True)
class LoraConfig:
    enabled: bool = False
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def __post_init__(self):
        _require(self.r > 0, "lora.r", self.r, "a positive integer")
        _require(math.isfinite(self.alpha) and self.alpha > 0, "lora.alpha", self.alpha, "finite and positive")
        _require(0.0 <= self.dropout < 1.0, "lora.dropout", self.dropout, "in [0, 1)")
        given = bool(self.targets) or not self.enabled
        _require(given, "lora.targets", self.targets, "at least one name where lora.enabled is true")


@dataclass(frozen=True)
class DataConfig:
    path: str = ""  # file or folder
    format: str = "auto"  # see data.readers.FORMATS
    root: str | None = None  # images are looked up here and never outside it; default: the folder of `path`
    pairs: str = "all"  # all | adjacent | best_vs_rest
    on_bad_row: str = "raise"  # raise | skip
    max_bad_rows: float = 0.05  # share of rows that may be skipped before the run stops
    max_group_tokens: int = 8192  # a longer group is dropped whole, counted and named
    max_image_pixels: int = 89_478_485
    segments: str | None = None  # paper | muffin | None: every token weighs 1
    gamma: float = 1.0  # weight of a token in a corrected segment
    video_frames: int = 8
    workers: int = 0
    vision_cache: str | None = None  # folder: features of a frozen tower are kept there and computed once an image
    vision_cache_bytes: int = 64 * 2**30  # at most so much of it on the disk

    def __post_init__(self):
        _one_of("data.pairs", self.pairs, ("all", "adjacent", "best_vs_rest"))
        _one_of("data.on_bad_row", self.on_bad_row, ("raise", "skip"))
        _require(0.0 <= self.max_bad_rows <= 1.0, "data.max_bad_rows", self.max_bad_rows, "in [0, 1]")
        _require(self.max_group_tokens > 0, "data.max_group_tokens", self.max_group_tokens, "positive")
        _require(self.max_image_pixels > 0, "data.max_image_pixels", self.max_image_pixels, "positive")
        if self.segments is not None:
            _one_of("data.segments", self.segments, ("paper", "muffin"))
        _require(math.isfinite(self.gamma) and self.gamma > 0, "data.gamma", self.gamma, "finite and positive")
        _require(
            self.gamma == 1.0 or self.segments is not None, "data.gamma", self.gamma, "1 where data.segments is not set"
        )
        _require(self.video_frames > 0, "data.video_frames", self.video_frames, "positive")
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        _require(self.vision_cache != "", "data.vision_cache", self.vision_cache, "a folder or null")
        _require(self.vision_cache_bytes > 0, "data.vision_cache_bytes", self.vision_cache_bytes, "positive")


@dataclass(frozen=True)
class LossConfig:
    kind: str = "sigmoid"
    beta: float = 0.1
    beta_mode: str = "fixed"  # fixed | margin (Dynamic Reward Scaling) | implicit (batch level; did not help)
    w: float = 0.5  # Dynamic Reward Scaling: beta * (1 + w * (1 - exp(-k * margin)))
    k: float = 0.5
    reduction: str = "sum"  # sum | mean: how token log-probabilities become the score of a response
    label_smoothing: float = 0.0
    sft_weight: float = 0.0  # weight of the token-mean NLL of the better responses

    def __post_init__(self):
        _one_of("loss.kind", self.kind, LOSS_KINDS)
        _require(math.isfinite(self.beta) and self.beta > 0, "loss.beta", self.beta, "finite and positive")
        _one_of("loss.beta_mode", self.beta_mode, ("fixed", "margin", "implicit"))
        _require(math.isfinite(self.w) and self.w >= 0, "loss.w", self.w, "finite and not negative")
        _require(math.isfinite(self.k) and self.k > 0, "loss.k", self.k, "finite and positive")
        _one_of("loss.reduction", self.reduction, ("sum", "mean"))
        _require(0.0 <= self.label_smoothing < 0.5, "loss.label_smoothing", self.label_smoothing, "in [0, 0.5)")
        _require(
            self.label_smoothing == 0.0 or self.kind in SMOOTHED_KINDS,
            "loss.label_smoothing",
            self.label_smoothing,
            f"0 for loss.kind {self.kind}; it means something for {', '.join(SMOOTHED_KINDS)}",
        )
        _require(
            self.label_smoothing > 0.0 or self.kind != "exo_pair",
            "loss.label_smoothing",
            self.label_smoothing,
            "above 0 for loss.kind exo_pair (1e-3 is usual)",
        )
        _require(
            math.isfinite(self.sft_weight) and self.sft_weight >= 0, "loss.sft_weight", self.sft_weight, "0 or more"
        )


@dataclass(frozen=True)
class RewardConfig:
    """What recipe mm_rlhf_reward minimises; no other recipe reads it."""

    head: str = "tanh"  # tanh: linear, tanh, linear (MM-RLHF) | silu: linear, SiLU, linear (BaseReward)
    dropout: float | None = None  # before each linear layer of the head; None: the decoder's attention_dropout
    critic_weight: float = 1.0  # of the token-mean NLL of both critiques of a pair
    score_weight: float = 1.0  # of -log sigmoid(r_better - r_worse)
    tie_weight: float = 1.0  # of (r_a - r_b)^2 of tied responses, times score_weight
    center_weight: float = 0.01  # of (r_better + r_worse)^2
    margin: bool = False  # take the pair's margin off the difference of its scores

    def __post_init__(self):
        _one_of("reward.head", self.head, REWARD_HEADS)
        dropout = self.dropout
        _require(dropout is None or 0.0 <= dropout < 1.0, "reward.dropout", dropout, "in [0, 1), or null")
        for name in ("critic_weight", "score_weight", "tie_weight", "center_weight"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"reward.{name}", value, "finite and 0 or more")
        _require(self.score_weight > 0, "reward.score_weight", self.score_weight, "above 0")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 5e-7
    betas: tuple[float, ...] = (0.9, 0.999)  # two
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.1  # share of the steps
    final_lr: float = 0.0  # share of lr at the end of the cosine
    clip: float = 1.0  # gradient norm; 0 turns clipping off

    def __post_init__(self):
        _require(math.isfinite(self.lr) and self.lr > 0, "optim.lr", self.lr, "finite and positive")
        _require(0.0 <= self.warmup <= 1.0, "optim.warmup", self.warmup, "in [0, 1]")
        _require(0.0 <= self.final_lr <= 1.0, "optim.final_lr", self.final_lr, "in [0, 1]")
        _require(math.isfinite(self.clip) and self.clip >= 0, "optim.clip", self.clip, "0 or more")
        decay = self.weight_decay
        _require(math.isfinite(decay) and decay >= 0, "optim.weight_decay", decay, "finite and 0 or more")
        betas = len(self.betas) == 2 and all(0.0 <= beta < 1.0 for beta in self.betas)
        _require(betas, "optim.betas", self.betas, "two numbers in [0, 1)")
        _require(math.isfinite(self.eps) and self.eps > 0, "optim.eps", self.eps, "finite and positive")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `groups_per_step` groups make an optimiser step, packed into micro-batches of at most
    `tokens_per_batch` tokens through the decoder."""

    recipe: str = "dpo"
    output: str = "runs/run"
    seed: int = 0
    epochs: float = 1.0
    max_steps: int | None = None  # stops earlier than `epochs`, if given
    groups_per_step: int = 16
    tokens_per_batch: int = 8192
    device: str = "auto"
    backend: str | None = None  # ops backend; None chooses
    shard: str = "none"  # none | full: weights, gradients and AdamW's state cut over the processes (FSDP2)
    sync_each_batch: bool = False  # shard=full: reduce gradients after each micro-batch; less memory, more traffic
    save_every: int = 0  # steps; 0 saves at the end only
    keep_last: int = 2
    resume: bool = True  # from the newest whole checkpoint in `output`
    resume_changed: bool = False  # resume although settings or data differ from the checkpoint's
    log_every: int = 1
    samples: int = 8  # groups whose prompts are answered before and after, for the report
    sample_tokens: int = 128
    reference_cache: str | None = None  # default: OUTPUT/reference
    trackers: tuple[str, ...] = ()  # tensorboard, wandb
    report: bool = True
    max_bad_steps: int = 3  # non-finite steps in a row before the run stops
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        _one_of("recipe", self.recipe, tuple(RECIPES))
        _require(self.output != "", "output", self.output, "a folder")
        _require(self.reference_cache != "", "reference_cache", self.reference_cache, "a folder or null")
        _require(math.isfinite(self.epochs) and self.epochs > 0, "epochs", self.epochs, "finite and positive")
        usable = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None
        _require(usable, "device", self.device, "auto, cpu, cuda or cuda:N")
        if self.backend is not None:
            _one_of("backend", self.backend, BACKENDS)
        _one_of("shard", self.shard, ("none", "full"))
        _require(
            self.shard == "full" or not self.sync_each_batch,
            "sync_each_batch",
            self.sync_each_batch,
            "false where shard is none",
        )
        _require(
            self.lora.enabled or self.model.dtype != "float16",
            "model.dtype",
            self.model.dtype,
            "auto, float32 or bfloat16 where lora.enabled is false (float16 gradients underflow)",
        )
        _require(self.max_steps is None or self.max_steps >= 0, "max_steps", self.max_steps, "0 or more")
        for name in ("groups_per_step", "tokens_per_batch", "keep_last", "log_every", "sample_tokens", "max_bad_steps"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name in ("save_every", "samples"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for tracker in self.trackers:
            _one_of("trackers", tracker, ("tensorboard", "wandb"))


# Values and their sources: RLHF-V section 4.1 (beta .5, gamma 5, normalised by Eq. 5); its released script of
# 2024-02-05 (gamma 1.1, beta .1, plain sum, difflib segments); MM-RLHF section 4 and appendix F.2 (beta .1, w .5,
# k .5); its reward model's script critic_reward_7b.sh (lr 1e-6, warm-up .1, weights 1, 1 and .01).
RECIPES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rlhf_v": {
        "data": {"segments": "paper", "gamma": 5.0},
        "loss": {"beta": 0.5, "reduction": "mean"},
        "optim": {"lr": 5e-7, "warmup": 0.1},
    },
    "rlhf_v_released": {
        "data": {"segments": "muffin", "gamma": 1.1},
        "loss": {"beta": 0.1, "reduction": "sum"},
        "optim": {"lr": 5e-7, "warmup": 0.03},
    },
    "mm_dpo": {
        "data": {"pairs": "all"},
        "loss": {"beta": 0.1, "beta_mode": "margin", "w": 0.5, "k": 0.5, "reduction": "sum", "sft_weight": 0.25},
        "optim": {"lr": 1e-6, "warmup": 0.1},
    },
    REWARD_RECIPE: {
        "samples": 0,  # it answers no prompts
        "data": {"pairs": "all"},
        "reward": {"critic_weight": 1.0, "score_weight": 1.0, "center_weight": 0.01},
        "optim": {"lr": 1e-6, "warmup": 0.1},
    },
}


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Settings from a YAML file and `key=value` words (for example `optim.lr=1e-6`).

    Raises ValueError naming the key for an unknown key or a value out of range, FileNotFoundError for a missing file.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    where = str(path) if path is not None else "command line"
    try:
        written = OmegaConf.load(path) if path is not None else OmegaConf.create({})
        if not isinstance(written, DictConfig):
            raise ValueError(f"{where} must hold a mapping of settings, it holds a list")
        words = OmegaConf.from_dotlist(list(overrides))
        asked = OmegaConf.merge(written, words)
        assert isinstance(asked, DictConfig)
        recipe = asked.get("recipe", TrainConfig.recipe)
        _one_of("recipe", recipe, tuple(RECIPES))
        merged = OmegaConf.merge(OmegaConf.structured(TrainConfig), RECIPES[recipe], asked)
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = error.full_key  # None where a whole section was given something else
        origin = "command line" if any(word.split("=")[0] == key for word in overrides) else where
        raise ValueError(f"{origin}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    assert isinstance(settings, TrainConfig)
    return settings


def dump(settings: TrainConfig) -> str:
    """The settings as YAML, every value written out."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(settings))
