"""LLaMA-Factory's DPO stage on mmrlhf: one pass over each prompt, every picture once, response rows only.

    python -m mmrlhf.integrations.llamafactory train config.yaml     `llamafactory-cli train`, with an `mmrlhf:` section
    install(segments="paper", gamma=5.0)                             the same for a script that calls run_exp()

LLaMA-Factory keeps its data sets, templates, loop, PEFT and losses; the rows it tokenised are the ones that train.
`pref_loss` is honoured: LLaMA-Factory 0.9.5 computes sigmoid for hinge and ipo, because TRL 0.24 wants the loss named
in each call. What cannot be honoured raises when the trainer is made. Not covered: audio, margins (its data has none).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmrlhf.data.schema import BadRow
from mmrlhf.integrations.hosted import (
    PairMethods,
    PairOptions,
    Row,
    check_args,
    media_ids_of,
    options_from,
    pack,
)
from mmrlhf.integrations.rows import BATCH

SECTION = "mmrlhf"
PER_TOKEN = ("token_type_ids", "mm_token_type_ids", "attention_mask")  # made again from the ids
_MEAN_LOSSES = ("ipo", "orpo", "simpo")


class Collator:
    """LLaMA-Factory's pairwise features -> one flat batch; each pair's pictures are processed once."""

    def __init__(self, host: Any, options: PairOptions, media_ids: Sequence[int] = ()):
        self.template, self.processor = host.template, host.processor
        self.options, self.media_ids = options, tuple(media_ids)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return pack([self._pair(feature) for feature in features], self.options, media_ids=self.media_ids)

    def _pair(self, feature: Mapping[str, Any]) -> tuple[Row, Row]:
        images, videos, audios = (feature.get(name) or [] for name in ("images", "videos", "audios"))
        if audios:
            raise BadRow("a row", "audio is not supported by mmrlhf; leave the row out, or train without it")
        found: dict[str, Any] = {}
        if images or videos:
            ids = [feature["chosen_input_ids"]]
            counts = [len(images)], [len(videos)], [0]
            found = self.template.mm_plugin.get_mm_inputs(images, videos, audios, *counts, ids, self.processor)
        made = {k: torch.as_tensor(v) for k, v in found.items() if k not in PER_TOKEN and v is not None}
        chosen, rejected = (
            Row(feature[f"{side}_input_ids"], feature[f"{side}_labels"], made, len(images) + len(videos))
            for side in ("chosen", "rejected")
        )
        return chosen, rejected


class _Methods(PairMethods):
    """What replaces CustomDPOTrainer's own methods."""

    finetuning_args: Any
    loss_type: str

    def __init__(self, model: Any, ref_model: Any, finetuning_args: Any, *others: Any, **named: Any):
        check_finetuning(finetuning_args)
        check_args(named["args"], {})
        named["data_collator"] = Collator(named["data_collator"], self.pair_options, media_ids_of(model))
        super().__init__(model, ref_model, finetuning_args, *others, **named)  # type: ignore[call-arg]
        self.prepare_pairs()

    def concatenated_forward(self, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> dict[str, Any]:
        reduction = "mean" if self.loss_type in _MEAN_LOSSES else self.pair_options.reduction
        found = self.score_pairs(model, batch[BATCH], reference=is_ref_model, reduction=reduction)
        names = ("chosen_logps", "rejected_logps", "chosen_logits", "rejected_logits")
        return {**{name: found[name] for name in names}, "chosen_logps_avg": found["chosen_mean"]}

    def dpo_loss(self, *logps: Any, **named: Any) -> Any:
        inherited = super().dpo_loss  # type: ignore[misc]
        if "loss_type" in inspect.signature(inherited).parameters:
            named.setdefault("loss_type", self.loss_type)
        return inherited(*logps, **named)

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], train_eval: str = "train") -> Any:
        loss, metrics = super().get_batch_loss_metrics(model, batch, train_eval)  # type: ignore[misc]
        return loss, self.own_metrics(metrics, self.beta)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        # TRL's own looks logits up among the metrics, to hand them to a compute_metrics that nobody gave.
        return super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[misc]


def check_finetuning(args: Any) -> None:
    """What FinetuningArguments may ask for and cannot have; ValueError with the option and what to do instead."""
    refused = {
        "ld_alpha": (args.ld_alpha is not None, "LD-DPO is not built in; leave it out, or use segments and gamma"),
        "pref_loss: kto_pair": (
            args.pref_loss == "kto_pair",
            "TRL has dropped it; use stage kto, or pref_loss sigmoid, hinge, ipo, orpo or simpo",
        ),
    }
    for name, (asked, why) in refused.items():
        if asked:
            raise ValueError(f"{name} is not supported by mmrlhf: {why}")


def trainer_class(base: type, options: PairOptions) -> type:
    """A subclass of CustomDPOTrainer that trains on mmrlhf."""
    return type("PreferenceTrainer", (_Methods, base), {"pair_options": options, "__module__": __name__})


def install(**options: Any) -> type:
    """From here on, LLaMA-Factory's stage dpo trains on mmrlhf; returns the trainer class it will make.

    `options` are those of `hosted.PairOptions`; a second call replaces them. Raises ImportError without
    LLaMA-Factory, TypeError or ValueError for an option it cannot honour.
    """
    wanted = options_from(options)
    if wanted.beta_mode == "margin":
        raise ValueError(
            "beta_mode 'margin' is not supported by mmrlhf in LLaMA-Factory, whose data sets have no column for "
            "margins; use ms-swift, TRL or `mmrlhf train`, or beta_mode 'fixed'"
        )
    try:
        from llamafactory.train.dpo import trainer, workflow
    except ImportError as error:
        raise ImportError("mmrlhf.integrations.llamafactory needs LLaMA-Factory: pip install llamafactory") from error
    home: Any = trainer
    original = getattr(home.CustomDPOTrainer, "_mmrlhf_original", home.CustomDPOTrainer)
    made: Any = trainer_class(original, wanted)
    made._mmrlhf_original = original
    for module in (home, workflow):  # 0.9.5 imports the class when the stage starts, earlier versions with the module
        if hasattr(module, "CustomDPOTrainer"):
            module.CustomDPOTrainer = made
    return made


def read_config(path: str | Path, words: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """(LLaMA-Factory's arguments, ours) of a YAML or JSON file; `words` are `key=value`, ours as `mmrlhf.key=value`.

    Raises FileNotFoundError, and ValueError for a file or a word that is no such thing.
    """
    from omegaconf import OmegaConf

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    odd = [word for word in words if "=" not in word or word.startswith("-")]
    if odd:
        raise ValueError(f"{odd[0]!r}: arguments after the file are key=value")
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(Path(path)), OmegaConf.from_cli(list(words))))
    if not isinstance(merged, dict):
        raise ValueError(f"{path}: the file must hold keys and values")
    given: dict[str, Any] = {str(key): value for key, value in merged.items()}
    ours = given.pop(SECTION, None) or {}
    if not isinstance(ours, dict):
        raise ValueError(f"{path}: {SECTION} must be a section of options, got {ours!r}")
    return given, {str(key): value for key, value in ours.items()}


def run(path: str | Path, words: Sequence[str] = ()) -> None:
    """Train as the file says. Raises what `read_config` and `install` raise, and ValueError for another stage."""
    given, ours = read_config(path, words)
    if given.get("stage") != "dpo":
        raise ValueError(f"stage must be dpo here, got {given.get('stage')!r}; use llamafactory-cli for other stages")
    if given.get("use_mca"):
        raise ValueError("use_mca is not supported by mmrlhf: Megatron has a trainer of its own; set it to false")
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "several GPUs need a process each: torchrun --nproc_per_node N -m mmrlhf.integrations.llamafactory train …"
        )
    install(**ours)
    from llamafactory.train.tuner import run_exp

    run_exp(given)


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if len(words) < 2 or words[0] != "train":
        print("usage: python -m mmrlhf.integrations.llamafactory train config.yaml [key=value ...]", file=sys.stderr)
        return 2
    run(words[1], words[2:])
    return 0


if __name__ == "__main__":
    from mmrlhf.integrations import llamafactory  # the module by its own name: classes are pickled by it

    sys.exit(llamafactory.main())
