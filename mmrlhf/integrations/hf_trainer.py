"""transformers.Trainer on mmrlhf: a collator, a loss for `compute_loss_func`, and a reference cached into the rows.

    loss = PreferenceLossFunction(model, reference=frozen_copy, beta=0.1)
    Trainer(model, args, train_dataset=rows, data_collator=TrainerCollator(processor), compute_loss_func=loss)

`args.remove_unused_columns` must be False: Trainer would drop the columns that rows are made of. The loss is divided by
the pairs of the whole optimiser step, however it is accumulated and spread. Rows are those of `integrations.rows`.
Not covered: compute_metrics (there are no logits), ZeRO-3.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.integrations.cached import score_rows, with_reference
from mmrlhf.integrations.forward import add_forward
from mmrlhf.integrations.objective import LossSettings, objective
from mmrlhf.integrations.rows import BATCH, REFERENCE, PackedRows, PreferenceCollator
from mmrlhf.train.reference import reference_key


class TrainerCollator(PreferenceCollator):
    """`PreferenceCollator` with the labels Trainer counts: one 0 a pair, so that its count is the step's pairs."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        out = super().__call__(rows)
        labels = torch.zeros(out[BATCH].batch.pairs.shape[0], dtype=torch.int64)
        return out | {
            "labels": labels,
            "shift_labels": labels,
        }  # shift_labels: counted as they are, not from the second


class PreferenceLossFunction:
    """What `Trainer(compute_loss_func=…)` calls; making it teaches `model` the keyword it needs.

    reference: a frozen model of the same family; "adapter": the PEFT model itself without its adapter (the default
    for one); "cached": the rows' `reference_logp` (see `cache_reference`), which nothing else reads. `beta`,
    `beta_mode`, `loss_type`, … are those of `objective.LossSettings`. Raises ValueError for a setting out of range or a
    reference that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        reference: nn.Module | str | None = None,
        share_prefix: bool = True,
        self_check: bool = True,
        backend: str | None = None,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        **settings: Any,
    ):
        self.settings = LossSettings(
            loss_type=(loss_type,) if isinstance(loss_type, str) else tuple(loss_type),
            loss_weights=None if loss_weights is None else tuple(loss_weights),
            **settings,
        )
        adapted = hasattr(model, "peft_config")
        self.model, self.reference = model, "adapter" if reference is None and adapted else reference
        if self.reference is None:
            raise ValueError(
                "reference is needed where no adapter is trained: give a frozen copy of the model, "
                'or "cached" with rows from cache_reference'
            )
        if isinstance(self.reference, str) and self.reference not in ("adapter", "cached"):
            raise ValueError(f'reference must be a model, "adapter" or "cached", got {self.reference!r}')
        if self.reference == "adapter" and not adapted:
            raise ValueError('reference is "adapter", but the model has none; wrap it with peft, or give a frozen copy')
        if self.reference is model:
            raise ValueError("reference is the model that is trained; give a frozen copy")
        wanted = ("log_sum_sq",) if self.settings.use_weighting else ()
        add_forward(model, share_prefix=share_prefix, self_check=self_check, backend=backend, statistics=wanted)
        if isinstance(self.reference, nn.Module):
            self.reference.requires_grad_(False).eval()
            add_forward(self.reference, share_prefix=share_prefix, self_check=False, backend=backend)

    def __call__(self, outputs: Mapping[str, Any], labels: Any, num_items_in_batch: Any = None) -> Tensor:
        """The share of this micro-batch in the step's loss; without `num_items_in_batch`, its own mean."""
        packed: PackedRows = outputs[BATCH]
        kept = self._reference_logp(packed)
        return objective(
            outputs["logp"],
            packed,
            kept,
            self.settings,
            num_pairs=num_items_in_batch,
            log_sum_sq=outputs.get("log_sum_sq"),
        ).loss

    def _reference_logp(self, packed: PackedRows) -> Tensor:
        """[N], nats."""
        if self.reference == "cached":
            if packed.batch.reference_logp is None:
                raise ValueError(f'reference is "cached", but these rows have no {REFERENCE}; see cache_reference')
            return packed.batch.reference_logp
        if self.reference == "adapter":
            return reference_logp(self.model, packed)
        assert isinstance(self.reference, nn.Module)
        return reference_logp(self.reference.to(packed.batch.input_ids.device), packed)


@torch.no_grad()
def reference_logp(model: nn.Module, packed: PackedRows) -> Tensor:
    """[N] of a model as it is without its adapter, if it has one; dropout off."""
    training = model.training
    peft: Any = model
    without = peft.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()
    model.eval()
    try:
        with without:
            return model(**{BATCH: packed, "mmrlhf_statistics": ()})["logp"]
    finally:
        model.train(training)


def cache_reference(
    model: nn.Module,
    rows: Any,
    collator: PreferenceCollator,
    *,
    batch_size: int = 4,
    share_prefix: bool = True,
    folder: str | Path | None = None,
) -> Any:
    """The rows with a column `reference_logp`: the model's log-probabilities as it is now, a number a response token.

    `rows` is a `datasets.Dataset` or a list of dicts, and so is what comes back. With `folder`, a Dataset's column is
    kept there, read again by later runs of the same model, rows and settings, and not held in memory. The column
    belongs to this collator's settings; another tokenizer or another cut is found out and raises BadRow. One process.
    Raises ValueError naming the row for a log-probability that is not finite.
    """
    if not hasattr(rows, "__len__"):
        raise ValueError("rows must have a length; load a streamed data set first")
    add_forward(model, share_prefix=share_prefix)
    score = functools.partial(reference_logp, model)
    if folder is not None:
        if not hasattr(rows, "add_column"):
            raise ValueError(f"folder needs rows as a datasets.Dataset, got {type(rows).__name__}; see from_list")
        key = reference_key(model, share_prefix=share_prefix, adapter=not hasattr(model, "peft_config"))
        return with_reference(rows, collator, score, folder, key=key, batch_size=batch_size)
    column: list[list[float]] = []
    for start in range(0, len(rows), batch_size):
        part = [{**rows[i], REFERENCE: None} for i in range(start, min(start + batch_size, len(rows)))]
        column += [values.tolist() for values in score_rows(part, range(len(part)), collator, score, batch_size)]
    if hasattr(rows, "add_column"):
        return rows.select_columns([n for n in rows.column_names if n != REFERENCE]).add_column(REFERENCE, column)
    return [{**row, REFERENCE: values} for row, values in zip(rows, column, strict=True)]
