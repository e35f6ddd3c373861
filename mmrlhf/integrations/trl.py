"""TRL's DPOTrainer (1.15 or later) on mmrlhf: one pass over each prompt, every picture once, and the papers' losses.

    PreferenceTrainer    DPOTrainer with another collator, forward and loss; everything around them is TRL's
    PreferenceConfig     DPOConfig with the options below
    patch_dpo_trainer    the same for a trainer that exists already

TRL keeps the loop, the optimiser, PEFT, DDP, FSDP2, ZeRO-1 and 2, accumulation, evaluation, checkpoints and the names
of the metrics. Rows are those of `integrations.rows`. What cannot be honoured raises at construction, naming the option
and what to do instead. Not covered: streaming data sets, ZeRO-3, mixtures of experts' auxiliary loss (docs/drop-in.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl
from packaging.version import Version
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from mmrlhf.batch import GroupBatch
from mmrlhf.integrations import trl_support as support
from mmrlhf.integrations.cached import with_reference
from mmrlhf.integrations.forward import STATISTICS, add_forward, tower_is_shared
from mmrlhf.integrations.objective import LossSettings, Result, objective
from mmrlhf.integrations.rows import BATCH, COLUMNS_READ, PackedRows, PreferenceCollator, undecoded
from mmrlhf.models.parts import inner_model
from mmrlhf.ops import sequence_score
from mmrlhf.train.reference import reference_key
from mmrlhf.train.state import text_fingerprint

if Version(trl.__version__) < Version("1.15"):
    raise ImportError(f"mmrlhf.integrations.trl needs TRL 1.15 or later, found {trl.__version__}")


@dataclass
class PreferenceConfig(DPOConfig):
    """DPOConfig, and what mmrlhf adds. `max_length` is None here; where it is set, answers are cut, never pictures."""

    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and response; a longer response is cut, a prompt never is."}
    )
    segments: str | None = field(
        default=None, metadata={"help": "Weigh corrected tokens by gamma: 'paper', 'muffin', or None: all weigh 1."}
    )
    gamma: float = field(default=5.0, metadata={"help": "Weight of a corrected token, where segments is set."})
    reduction: str = field(
        default="sum", metadata={"help": "Score of a response: 'sum', or 'mean' over the weights (RLHF-V)."}
    )
    pairs: str = field(default="all", metadata={"help": "Pairs of ranked rows: all, adjacent or best_vs_rest."})
    beta_mode: str = field(default="fixed", metadata={"help": "'fixed', or 'margin': beta(margin) a pair (MM-DPO)."})
    beta_w: float = field(default=0.5, metadata={"help": "w of beta(margin) = beta (1 + w (1 - exp(-k margin)))."})
    beta_k: float = field(default=0.5, metadata={"help": "k of beta(margin)."})
    share_prefix: bool = field(default=True, metadata={"help": "One pass over a prompt for all its responses."})
    self_check: bool = field(default=True, metadata={"help": "Compare the first batch with separate rows."})
    token_metrics: bool = field(
        default=True,
        metadata={"help": "Log entropy, logits/* and mean_token_accuracy: one more pass over the vocabulary."},
    )
    reference_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder of precompute_ref_log_probs; None: reference/ in output_dir. Read again by later runs."
        },
    )
    image_root: str = field(default=".", metadata={"help": "Folder that pictures given as paths are relative to."})


# mmrlhf's own options with their defaults, which a plain DPOConfig gets.
OPTIONS = {n: PreferenceConfig.__dataclass_fields__[n].default for n in PreferenceConfig.__annotations__}
del OPTIONS["max_length"]


class _PreferenceMethods:
    """What replaces DPOTrainer's own methods, ahead of it among a class's bases."""

    # The host's, which this half of the class reads.
    model: Any
    ref_model: Any
    args: Any
    accelerator: Any
    data_collator: Any
    precompute_ref_logps: bool
    is_deepspeed_enabled: bool
    _precompute_model_hash: Any
    _metrics: Any
    _total_train_tokens: int
    _signature_columns: Any
    # Ours: options by name; those of a trainer whose constructor is still running.
    _mmrlhf: dict[str, Any]
    _one_tower: bool
    _pending: dict[str, Any]

    # TRL prepares text up front and refuses cached references for pictures. Here rows are prepared by the collator
    # and references cached by `_precompute_ref_logps` whatever they hold, so the question is always answered with no.
    _is_vision_dataset = property(lambda self: False, lambda self, value: None)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return undecoded(dataset)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = list(COLUMNS_READ)

    def _install(self, options: dict[str, Any]) -> None:
        """Everything that needs the finished trainer; raises for what its model cannot do."""
        support.check_trainer(self)
        self._mmrlhf = options
        self._loss_settings = _loss_settings(self.args, options)
        for model in (self.model, self.ref_model):
            if model is not None:
                inner = self.accelerator.unwrap_model(model)
                add_forward(inner, share_prefix=options["share_prefix"], self_check=options["self_check"])
        self._one_tower = self._towers_are_equal()

    def _towers_are_equal(self) -> bool:
        """Whether pictures that the policy has encoded need not meet the reference model's tower."""
        if self.ref_model is None or self.ref_model is self.model or not self.args.disable_dropout:
            return False
        return tower_is_shared(*(self.accelerator.unwrap_model(each) for each in (self.model, self.ref_model)))

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """The data set with a column of reference log-probabilities, a number a response token, kept on disk."""
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                "precompute_ref_log_probs needs a data set that is not streamed; load it, or set it to False"
            )
        if not hasattr(self, "_mmrlhf"):  # DPOTrainer's constructor calls this before it is done
            self._install(self._pending)
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            model.to(self.accelerator.device)  # ZeRO-1 and 2 move it there only when training starts
        return with_reference(
            dataset,
            self.data_collator,
            lambda packed: self._reference_logp(model, packed),
            self._mmrlhf["reference_cache"] or Path(self.args.output_dir) / "reference",
            key=self._reference_key(model),
            batch_size=batch_size,
            processes=support.Processes(self.accelerator),
        )

    def _reference_key(self, model) -> str:
        """The same in every process, so the first one's; weights that FSDP has sharded by TRL's hash of the whole."""
        unwrapped = self.accelerator.unwrap_model(model)
        if any(hasattr(parameter, "full_tensor") for parameter in unwrapped.parameters()):
            shared = f"share_prefix={self._mmrlhf['share_prefix']}"
            key = text_fingerprint("sharded", str(self._precompute_model_hash), shared)
        else:
            switched_off = self.ref_model is None and "ref" not in getattr(unwrapped, "peft_config", {})
            key = reference_key(unwrapped, share_prefix=self._mmrlhf["share_prefix"], adapter=not switched_off)
        precision = f"autocast={self.accelerator.mixed_precision}"
        return support.Processes(self.accelerator).gather([text_fingerprint(key, precision)])[0]

    def compute_ref_log_probs(self, model, inputs) -> tuple[Tensor, Tensor]:
        """(chosen [P], rejected [P]): summed reference log-probabilities of the pairs' responses."""
        packed = inputs[BATCH]
        scores = sequence_score(self._reference_logp(model, packed), packed.batch.cu_seqlens)
        return scores[packed.batch.pairs[:, 0]], scores[packed.batch.pairs[:, 1]]

    def _reference_logp(self, model, packed: PackedRows) -> Tensor:
        """[N], without a gradient, under the reference model, or the policy without its adapter (or with "ref")."""
        if model is self.ref_model and self._one_tower and packed.features is not None:
            packed.tower = id(inner_model(self.accelerator.unwrap_model(model)))
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
            self._reference_adapter(),
            self.accelerator.autocast(),
            _evaluating(model),
        ):
            return model(**{BATCH: packed, "mmrlhf_statistics": ()})["logp"]

    @contextlib.contextmanager
    def _reference_adapter(self) -> Iterator[None]:
        unwrapped = self.accelerator.unwrap_model(self.model)
        if self.ref_model is not None or not hasattr(unwrapped, "peft_config"):
            yield
            return
        with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
            yield

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        support.weigh_pairs([sample[BATCH] for sample in samples], self.accelerator)
        return samples, items

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs:
            raise ValueError("return_outputs needs logits, which are never built here; use prediction_loss_only=True")
        packed: PackedRows = inputs[BATCH]
        wanted = STATISTICS if self._mmrlhf["token_metrics"] else ()
        wanted += ("log_sum_sq",) if self._loss_settings.use_weighting else ()
        out = model(**{BATCH: packed, "mmrlhf_statistics": wanted})
        batch = packed.batch
        if self.precompute_ref_logps:
            if batch.reference_logp is None:
                raise ValueError(
                    "precompute_ref_log_probs is set, but these rows have no reference_logp: pass the data set to the "
                    "trainer, or to evaluate()"
                )
            kept = batch.reference_logp
        else:
            kept = self._reference_logp(self.ref_model if self.ref_model is not None else self.model, packed)
        result = objective(out["logp"], packed, kept, self._loss_settings, log_sum_sq=out.get("log_sum_sq"))
        self._log_metrics("train" if self.model.training else "eval", out, batch, result)
        return result.loss * packed.share

    def _log_metrics(self, mode: str, out: dict[str, Tensor], batch: GroupBatch, result: Result) -> None:
        """TRL's metrics over all processes: one gather and one wait for the device, not a dozen."""
        sums, names = support.metric_sums(out, batch, result)
        margin = self._loss_settings.beta_mode == "margin"
        extremes = torch.stack((result.beta.min(), result.beta.max())).double()
        rows = self.accelerator.gather(torch.cat((sums, extremes))[None]).tolist()  # [processes, n]
        *columns, lowest, highest = zip(*rows, strict=True)
        total = dict(zip(names, map(sum, columns), strict=True))
        metrics = self._metrics[mode]
        for name in names:
            weight = support.WEIGHT_OF.get(name)
            if weight is not None and (margin or name != "beta/mean"):
                metrics[name].append(total[name] / total[weight] if total[weight] else 0.0)
        if margin:
            metrics["beta/min"].append(min(lowest))
            metrics["beta/max"].append(max(highest))
        if mode == "train":
            self._total_train_tokens += int(total["tokens"])
        metrics["num_tokens"] = [self._total_train_tokens]


class PreferenceTrainer(_PreferenceMethods, DPOTrainer):
    """DPOTrainer, argument by argument; `args` may also be a plain DPOConfig, which has mmrlhf's options at default.

    `precompute_ref_log_probs=True` works for pictures too, token by token, and then no reference model is held.
    Raises ValueError for an option that cannot be honoured, BadRow (at the row's turn) for a row that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        **others: Any,
    ):
        args = PreferenceConfig() if args is None else args
        options = _options(args)
        support.check_settings(args, data_collator, compute_metrics)
        _loss_settings(args, options)
        if processing_class is None:
            from mmrlhf.models.load import load_processor

            given = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
            revision = given.get("revision")
            processing_class = load_processor(
                model if isinstance(model, str) else model.config._name_or_path,
                revision=None if revision == "main" else revision,  # TRL's default, also for a local folder
                trust_remote_code=bool(given.get("trust_remote_code", False)),
            )
        self._pending = options
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=_collator(processing_class, args, options),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **others,
        )
        if not hasattr(self, "_mmrlhf"):
            self._install(options)


def patch_dpo_trainer(trainer: DPOTrainer, **options: Any) -> DPOTrainer:
    """Make a finished DPOTrainer, or a subclass of it, train as PreferenceTrainer does; returns it.

    `options` are those PreferenceConfig adds (segments, gamma, beta_mode, …). The trainer's class becomes a subclass of
    what it was; its collator, forward and loss are replaced. References it cached are computed again, token by token.
    Raises TypeError for something else than a DPOTrainer or an unknown option, ValueError for one that cannot be
    honoured, a second patch, or a collator of the user's own.
    """
    if not isinstance(trainer, DPOTrainer):
        raise TypeError(f"trainer must be a trl.DPOTrainer, got {type(trainer).__name__}")
    if isinstance(trainer, _PreferenceMethods):
        raise ValueError("trainer is patched already, or a PreferenceTrainer")
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise TypeError(f"unknown options {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    args: Any = trainer.args
    wanted = {**_options(args), **options}
    collator = trainer.data_collator
    own = None if type(collator).__module__.startswith("trl.") else collator
    support.check_settings(args, own, trainer.compute_metrics)
    kind: Any = type(trainer)
    _loss_settings(args, wanted)
    made = _collator(trainer.processing_class, args, wanted)
    patched: Any = trainer
    before = (kind, patched.data_collator, patched._signature_columns)
    patched.__class__ = type(kind.__name__, (_PreferenceMethods, kind), {"__module__": kind.__module__})
    patched.data_collator, patched._signature_columns = made, None
    try:
        patched._install(wanted)
    except BaseException:  # then it is what it was
        patched.__class__, patched.data_collator, patched._signature_columns = before
        raise
    if patched.precompute_ref_logps:
        size = patched.args.precompute_ref_batch_size or patched.args.per_device_train_batch_size
        patched.train_dataset = patched._precompute_ref_logps(patched.train_dataset, "train", size)
        if isinstance(patched.eval_dataset, dict):
            patched.eval_dataset = {
                name: patched._precompute_ref_logps(part, name, size) for name, part in patched.eval_dataset.items()
            }
        elif patched.eval_dataset is not None:
            patched.eval_dataset = patched._precompute_ref_logps(patched.eval_dataset, "eval", size)
    return trainer


def _options(args: DPOConfig) -> dict[str, Any]:
    return {name: getattr(args, name, default) for name, default in OPTIONS.items()}


def _loss_settings(args: DPOConfig, options: dict[str, Any]) -> LossSettings:
    return LossSettings(
        loss_type=tuple(args.loss_type),
        loss_weights=None if args.loss_weights is None else tuple(args.loss_weights),
        beta=args.beta,
        label_smoothing=args.label_smoothing,
        discopop_tau=args.discopop_tau,
        ld_alpha=args.ld_alpha,
        f_divergence_type=args.f_divergence_type,
        f_alpha_divergence_coef=args.f_alpha_divergence_coef,
        use_weighting=args.use_weighting,
        **{name: options[name] for name in ("beta_mode", "beta_w", "beta_k", "reduction")},
    )


def _collator(processor: Any, args: DPOConfig, options: dict[str, Any]) -> PreferenceCollator:
    return PreferenceCollator(
        processor,
        segments=options["segments"],
        gamma=options["gamma"],
        pairs=options["pairs"],
        max_length=args.max_length,
        root=options["image_root"],
    )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Dropout off inside: a reference is one distribution, not a sample of many."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
