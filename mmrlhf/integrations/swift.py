"""ms-swift's DPO on mmrlhf: one pass over each prompt, every picture once, response rows only, beta(margin).

    # plugin.py, for `swift rlhf --rlhf_type dpo ... --external_plugins plugin.py`
    from mmrlhf.integrations.swift import register
    register(segments="paper", gamma=5.0)

ms-swift keeps its data sets, templates, loop, tuners and losses; the rows it tokenised are the ones that train, and a
row's `margin`, which ms-swift itself reads for reward models alone, gives its beta. Rows with `rejected_images` run as
two prompts. What cannot be honoured raises when the trainer is made. Not covered: packing, sequence parallelism.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, as_tensor, ones_like

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

METHOD = "dpo"
PER_TOKEN = (  # made again from the ids, or of no use without padding
    "attention_mask",
    "length",
    "loss_scale",
    "mm_token_type_ids",
    "position_ids",
    "token_type_ids",
)
_options = PairOptions()
_originals: dict[str, str] = {}


class Collator:
    """Encoded rows of ms-swift -> one flat batch; a picture that both sides have is kept once."""

    def __init__(self, options: PairOptions, media_ids: Sequence[int] = ()):
        self.options, self.media_ids = options, tuple(media_ids)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [(_side(row, "chosen_"), _side(row, "rejected_")) for row in rows]
        margins = [row.get("margin") for row in rows]
        return pack(pairs, self.options, margins=margins, media_ids=self.media_ids)


def _side(row: Mapping[str, Any], prefix: str) -> Row:
    own = {key[len(prefix) :]: value for key, value in row.items() if key.startswith(prefix) and value is not None}
    ids, labels = own.pop("input_ids"), own.pop("labels")
    media = {k: as_tensor(v) for k, v in own.items() if k not in PER_TOKEN and isinstance(v, (Tensor, list, tuple))}
    return Row(ids, labels, media, images=sum(len(value) for key, value in media.items() if key.endswith("grid_thw")))


class _Methods(PairMethods):
    """What replaces swift.rlhf_trainers.DPOTrainer's own methods."""

    args: Any
    template: Any

    def __init__(self, model: Any, ref_model: Any = None, *others: Any, **named: Any):
        check_arguments(named["args"], named["template"], self.pair_options)
        self._media_ids = media_ids_of(model)
        super().__init__(model, ref_model, *others, **named)  # type: ignore[call-arg]
        self.template.pre_forward_hook = _own_batches_pass(self.template.pre_forward_hook)
        self.prepare_pairs()

    def _get_data_collator(self, args: Any, template: Any) -> Collator:
        return Collator(self.pair_options, self._media_ids)

    def concatenated_forward(self, model: Any, batch: dict[str, Any], is_ref_model: bool = False) -> dict[str, Any]:
        options = self.pair_options
        found = self.score_pairs(model, batch[BATCH], reference=is_ref_model, reduction=options.reduction)
        out = {name: found[name] for name in ("chosen_logps", "rejected_logps")}
        for side in ("chosen", "rejected"):
            out[f"mean_{side}_logits"] = found[f"{side}_logits"]
            # ipo divides by these: a mean is divided already, a weighted sum has to be by its weights.
            weight = found[f"{side}_weight"]
            out[f"{side}_completion_token_counts"] = weight if options.reduction == "sum" else ones_like(weight)
        return {**out, "nll_loss": found["nll"]}

    def get_batch_loss_metrics(self, model: Any, batch: dict[str, Any], *others: Any, **named: Any) -> Any:
        with self.pair_betas(batch[BATCH]) as betas:
            loss, metrics = super().get_batch_loss_metrics(model, batch, *others, **named)  # type: ignore[misc]
        return loss, self.own_metrics(metrics, betas)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool = True, *others: Any, **named: Any
    ) -> Any:
        # The host's own looks logits up among the metrics, to hand them to a compute_metrics that nobody gave.
        return super().prediction_step(model, inputs, True, *others, **named)  # type: ignore[misc]


def _own_batches_pass(hook: Any) -> Any:
    """ms-swift's templates turn ids and pixels into embeddings before a forward: not those of a packed batch, which
    the forward encodes itself."""

    @functools.wraps(hook)
    def pre_forward_hook(model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return (args, kwargs) if BATCH in kwargs else hook(model, args, kwargs)

    return pre_forward_hook


def check_arguments(args: Any, template: Any, options: PairOptions) -> None:
    """What DPOConfig and the template may ask for and cannot have; ValueError with the option and what to do."""
    given = args.loss_type if isinstance(args.loss_type, (list, tuple)) else [args.loss_type]
    sorting = sorted(set(given) & {"aot", "aot_unpaired"})
    refused = {
        "packing": (
            getattr(template, "packing", False),
            "rows are packed by prompt already, without padding; set it to false",
        ),
        "padding_free": (template.padding_free, "batches have no padding already; set it to false"),
        "sequence_parallel_size": (
            template.sequence_parallel_size > 1,
            "a packed batch is not cut across ranks; set it to 1 and use data parallelism",
        ),
        "ld_alpha": (args.ld_alpha is not None, "LD-DPO is not built in; leave it out, or use segments and gamma"),
        "tuner_type": (
            getattr(args, "tuner_type", None) == "longlora",
            "LongLoRA changes the attention of padded rows; use lora",
        ),
        f"loss_type {', '.join(sorting)}": (
            bool(sorting) and options.beta_mode == "margin",
            "it sorts the scores of a batch, and beta_mode 'margin' gives each pair its own beta; use sigmoid, or "
            "beta_mode 'fixed'",
        ),
        "encoder-decoder models": (
            template.is_encoder_decoder,
            "a response follows its prompt in one row; use a decoder",
        ),
    }
    check_args(args, refused)


def trainer_class(base: type, options: PairOptions) -> type:
    """A subclass of swift.rlhf_trainers.DPOTrainer that trains on mmrlhf."""
    return type("PreferenceTrainer", (_Methods, base), {"pair_options": options, "__module__": __name__})


def register(**options: Any) -> None:
    """From here on, `swift rlhf --rlhf_type dpo` trains on mmrlhf; a second call replaces the options.

    `options` are those of `hosted.PairOptions`. Raises ImportError without ms-swift, TypeError or ValueError for an
    option it does not know.
    """
    global _options
    wanted = options_from(options)
    try:
        from swift.trainers.trainer_factory import TrainerFactory
    except ImportError as error:
        raise ImportError("mmrlhf.integrations.swift needs ms-swift: pip install ms-swift") from error
    own = f"{__name__}.PreferenceTrainer"
    if TrainerFactory.TRAINER_MAPPING[METHOD] != own:
        _originals[METHOD] = TrainerFactory.TRAINER_MAPPING[METHOD]
        TrainerFactory.TRAINER_MAPPING[METHOD] = own
    _options = wanted


def __getattr__(name: str) -> Any:
    """`PreferenceTrainer`, made when the factory asks for it: importing a plugin does not load the trainers yet."""
    if name != "PreferenceTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module, kind = _originals.get(METHOD, "swift.rlhf_trainers.DPOTrainer").rsplit(".", 1)
    return trainer_class(getattr(importlib.import_module(module), kind), _options)
