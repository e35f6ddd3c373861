"""From hidden rows to the loss of a micro-batch, and from micro-batches to the numbers of a step.

`Objective` picks beta as the settings say and calls the one fused op; another one (a reward model's) overrides what it
does differently, from how groups are encoded to what is saved. `Tally` adds the numbers of a step's micro-batches on
the device and moves them to the host once, so a step costs one synchronisation, not one a number.
Losses whose pairs are coupled (bco_pair, beta_mode implicit) see a micro-batch at a time, so there the cut of a step
does matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf import ops
from mmrlhf.batch import GroupBatch
from mmrlhf.config import LossConfig
from mmrlhf.data.collate import Encoder
from mmrlhf.data.schema import PreferenceGroup
from mmrlhf.models import load
from mmrlhf.ops.reference import Beta
from mmrlhf.train.distributed import World

REFERENCE_FREE = ("simpo", "orpo")


@dataclass(frozen=True)
class Totals:
    """What the loss of a whole optimiser step is divided by."""

    pairs: int
    sft_tokens: int  # of the better responses, once a pair

    @classmethod
    def of(cls, dataset: Any, parts: Sequence[Sequence[int]]) -> Totals:
        """`parts`: the step's micro-batches, as indices into the data."""
        groups = [index for part in parts for index in part]
        return cls(sum(map(dataset.num_pairs, groups)), sum(map(dataset.num_sft_tokens, groups)))


def require_margins(groups: Iterable[PreferenceGroup], pairs: Any, why: str, remedy: str) -> None:
    """ValueError naming the first pair without a finite reward margin; `why` one is needed, and a last `remedy`."""
    for group in groups:
        for pair in group.preference_pairs(pairs):
            if pair.margin is None or not math.isfinite(pair.margin):
                raise ValueError(
                    f"group {group.id} ({group.source or 'no source'}): {why}, but its responses {pair.better} and "
                    f"{pair.worse} have no reward margin. Give them scores, or their pair a margin, {remedy}"
                )


class Objective:
    """The loss of one micro-batch, normalised by the totals of its whole optimiser step."""

    encoder: Callable[..., Encoder] = Encoder  # with the arguments of `data.collate.Encoder`

    def __init__(self, settings: LossConfig, *, backend: str | None = None):
        self.settings, self.backend = settings, backend
        self.needs_reference = settings.kind not in REFERENCE_FREE

    def __call__(
        self,
        hidden: Tensor,  # [N, H]
        head: Any,  # models.load.Head
        batch: GroupBatch,
        totals: Totals,
    ) -> Any:
        """A FusedPreferenceOutput; summed over the micro-batches of a step, its losses are the step's loss."""
        reference_scores = None
        if self.needs_reference:
            assert batch.reference_logp is not None
            reference_scores = ops.sequence_score(
                batch.reference_logp,
                batch.cu_seqlens,
                token_weight=batch.token_weight,
                reduction=self.settings.reduction,
            )
        return ops.fused_preference_loss(
            hidden,
            head.weight,
            batch.targets,
            batch.cu_seqlens,
            batch.pairs,
            token_weight=batch.token_weight,
            reduction=self.settings.reduction,
            reference_scores=reference_scores,
            beta=self.beta(batch),
            kind=self.settings.kind,
            label_smoothing=self.settings.label_smoothing,
            sft_weight=self.settings.sft_weight,
            num_pairs=totals.pairs,
            num_sft_tokens=totals.sft_tokens,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            adapter=[ops.LoraAdapter(*factors) for factors in head.adapters],
            backend=self.backend,
        )

    def beta(self, batch: GroupBatch) -> Beta:
        """A number, one a pair [P], or (implicit) a function of this micro-batch's scores."""
        settings = self.settings
        if settings.beta_mode == "margin":
            assert batch.margin is not None
            return ops.dynamic_beta(batch.margin, beta=settings.beta, w=settings.w, k=settings.k)
        if settings.beta_mode == "implicit":
            return lambda scores, reference: self._implicit(scores, reference, batch.pairs)
        return settings.beta

    def _implicit(self, scores: Tensor, reference: Tensor | None, pairs: Tensor) -> Tensor:  # [R], [R], [P, 2]
        log_ratio = scores if reference is None else scores - reference
        margin = log_ratio[pairs[:, 0]] - log_ratio[pairs[:, 1]]
        return ops.implicit_beta(margin, beta=self.settings.beta, w=self.settings.w)

    def check_groups(self, groups: Iterable[PreferenceGroup], pairs: Any) -> None:
        """Raise ValueError naming the first group whose pairs lack what the loss needs."""
        if self.settings.beta_mode == "margin":
            require_margins(groups, pairs, "loss.beta_mode is margin", "or set loss.beta_mode to fixed")

    def groups(self, groups: list[PreferenceGroup]) -> list[PreferenceGroup]:
        """The groups to train on, of those that the data has."""
        return groups

    def batch(self, batch: GroupBatch, dataset: Any, indices: Sequence[int]) -> GroupBatch:
        """The batch of these groups with all that the loss reads of it; on the CPU."""
        return batch

    def attach(self, model: Any) -> None:
        """Give the model what is trained besides its own weights; before the optimiser is made."""

    def tally(self, totals: Totals, *, tokens_per_batch: int) -> Tally:
        return Tally(totals, tokens_per_batch=tokens_per_batch)

    def save(self, model: Any, processor: Any, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained model into an empty folder. `state`: its weights, where it has only a share of them."""
        load.save_pretrained(model, processor, folder, state=state)


class Tally:
    """The sums of a step: device numbers stay there until `read`."""

    SUMS: tuple[str, ...] = (
        *("loss", "chosen", "rejected", "margins", "accuracies"),
        *("logps_chosen", "logps_rejected", "beta", "sft"),
    )

    def __init__(self, totals: Totals, *, tokens_per_batch: int) -> None:
        self.totals, self.tokens_per_batch = totals, tokens_per_batch
        self._sums: list[Tensor] = []
        self._extremes: list[Tensor] = []
        self._ids: list[str] = []
        self.batches = self.tokens = self.scored = self.images = 0

    def add(self, out: Any, batch: GroupBatch, tokens: int) -> None:
        """One micro-batch of so many tokens through the decoder; its loss is normalised by the step's totals already,
        so losses add up."""
        self._sums.append(torch.stack([value.detach().double() for value in self._sums_of(out, batch)]))
        least, most = self._range_of(out)
        self._extremes.append(torch.stack((least, -most)).detach().double())
        self._ids.extend(batch.ids)
        self.batches += 1
        self.tokens += tokens
        self.scored += batch.num_scored
        self.images += sum(batch.images_per_group)

    def _sums_of(self, out: Any, batch: GroupBatch) -> tuple[Tensor, ...]:
        """The numbers of SUMS."""
        better, worse = batch.pairs[:, 0], batch.pairs[:, 1]
        totals = ops.sequence_score(out.logp, batch.cu_seqlens)  # [R] nats, every token weighing 1
        return (
            out.loss.detach(),
            out.rewards[better].sum(),
            out.rewards[worse].sum(),
            out.margins.sum(),
            (out.margins > 0).sum(),
            totals[better].sum(),
            totals[worse].sum(),
            out.beta.sum(),
            out.sft_loss,
        )

    def _range_of(self, out: Any) -> tuple[Tensor, Tensor]:
        """A least and a largest value, of beta."""
        return out.beta.min(), out.beta.max()

    def _named(self, total: dict[str, float], least: float, most: float) -> dict[str, float]:
        """The sums and the range under the names of TRL's log."""
        mean = {name: value / self.totals.pairs for name, value in total.items()}
        return {
            "loss": total["loss"],
            "rewards/chosen": mean["chosen"],
            "rewards/rejected": mean["rejected"],
            "rewards/margins": mean["margins"],
            "rewards/accuracies": mean["accuracies"],
            "logps/chosen": mean["logps_chosen"],
            "logps/rejected": mean["logps_rejected"],
            "beta/mean": mean["beta"],
            "beta/min": least,
            "beta/max": most,
            "sft_loss": total["sft"],
        }

    def counts(self) -> dict[str, float]:
        return {
            "tokens": self.tokens,
            "scored_tokens": self.scored,
            "images": self.images,
            "utilization": self.tokens / (self.batches * self.tokens_per_batch),
        }

    def names(self, most: int = 8) -> str:
        """The groups of the step, for messages."""
        more = len(self._ids) - most
        return ", ".join(self._ids[:most]) + (f" and {more} more" if more > 0 else "")

    def read(self, grad_norm: Tensor, world: World | None = None) -> dict[str, float]:
        """The step's numbers under the names of TRL's log; the one synchronisation of a step.

        With several processes, those of all of them; the counts too, from then on. `grad_norm`: of the whole step.
        """
        world, norm = world or World(), grad_norm.detach().double().reshape(1)
        own = (self.batches, self.tokens, self.scored, self.images)
        counts = torch.tensor(own, dtype=torch.float64, device=norm.device)
        sums = torch.stack(self._sums).sum(0).to(norm.device) if self._sums else norm.new_zeros(len(self.SUMS))
        lowest = norm.new_full((2,), math.inf)
        if self._extremes:
            lowest = torch.stack(self._extremes).amin(0).to(norm.device)
        values = torch.cat((world.sum(torch.cat((sums, counts))), world.minimum(lowest), norm)).tolist()
        total = dict(zip(self.SUMS, values, strict=False))
        *counted, least, most, norm_value = values[len(self.SUMS) :]
        self.batches, self.tokens, self.scored, self.images = map(int, counted)
        return self._named(total, least, -most) | {"grad_norm": norm_value}
