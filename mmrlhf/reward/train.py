"""`mmrlhf reward train`: the reward model as one more objective of the training loop.

The loop, its checkpoints, resuming, metrics and guards are `train.loop`'s own; here is what differs: how a group is
read, the loss, the scoring head that is trained besides the model, the numbers of a step, and what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf.batch import GroupBatch
from mmrlhf.config import TrainConfig
from mmrlhf.data.schema import PreferenceGroup
from mmrlhf.models import load
from mmrlhf.reward import head as heads
from mmrlhf.reward.critique import RewardOutput, check_size, reward_loss
from mmrlhf.reward.encode import CritiqueBatch, CritiqueEncoder, split, with_places
from mmrlhf.train import loop
from mmrlhf.train.objective import Objective, Tally, Totals, require_margins


def train(settings: TrainConfig, *, model: Any = None, processor: Any = None) -> Path:
    """Train a reward model as the settings say (recipe mm_rlhf_reward); returns the run folder.

    `model` and `processor` as for `train.loop.train`, which says what is raised; `model/` in the folder is what
    `load_reward_model` loads. A starting model that has a scoring head goes on with it.
    """
    return loop.train(settings, model=model, processor=processor, objective=RewardObjective(settings))


class RewardObjective(Objective):
    """MM-RLHF's reward loss; see `critique.reward_loss`."""

    encoder: Callable[..., CritiqueEncoder] = CritiqueEncoder

    def __init__(self, settings: TrainConfig):
        super().__init__(settings.loss, backend=settings.backend)
        self.run = settings
        self.needs_reference = False
        self.head: heads.RewardHead | None = None

    def __call__(self, hidden: Tensor, head: Any, batch: GroupBatch, totals: Totals) -> RewardOutput:
        assert self.head is not None
        assert isinstance(batch, CritiqueBatch)
        options: dict[str, Any] = {"num_pairs": totals.pairs, "backend": self.backend}
        return reward_loss(hidden, head, self.head, batch, self.run.reward, **options)

    def groups(self, groups: list[PreferenceGroup]) -> list[PreferenceGroup]:
        return [half for group in groups for half in split(group, self.run.data.pairs)]

    def batch(self, batch: GroupBatch, dataset: Any, indices: Sequence[int]) -> CritiqueBatch:
        return with_places(batch, torch.cat([dataset.text(index).ties for index in indices]))

    def attach(self, model: Any) -> None:
        wanted = self.run.model
        found = None
        if wanted.path:
            found = heads.read(load.local_folder(wanted.path, revision=wanted.revision))
        if found is None:
            settings = self.run.reward
            found = heads.new_head(model, kind=settings.head, dropout=settings.dropout, seed=self.run.seed)
        check_size(found, model)
        weight = load.lm_head(model).weight
        self.head = found.to(weight.device, torch.float32 if self.run.lora.enabled else weight.dtype)
        heads.attach(model, self.head)

    def check_groups(self, groups: Iterable[PreferenceGroup], pairs: Any) -> None:
        if self.run.reward.margin:
            require_margins(groups, pairs, "reward.margin is true", "or set reward.margin=false")

    def tally(self, totals: Totals, *, tokens_per_batch: int) -> RewardTally:
        return RewardTally(totals, tokens_per_batch=tokens_per_batch)

    def save(self, model: Any, processor: Any, folder: Path, *, state: Mapping[str, Tensor] | None = None) -> None:
        heads.save(model, processor, folder, state=state)


class RewardTally(Tally):
    """The numbers of a step of reward training. Chosen, rejected, margins and accuracies are of pairs without a tie."""

    SUMS: tuple[str, ...] = (
        *("loss", "critic", "score", "tie", "center"),
        *("ordered", "chosen", "rejected", "margins", "accuracies", "tied", "apart"),
    )

    def _sums_of(self, out: RewardOutput, batch: GroupBatch) -> tuple[Tensor, ...]:
        assert isinstance(batch, CritiqueBatch)
        assert batch.ties is not None
        ordered = ~batch.ties
        better, worse = out.scores[batch.pairs[:, 0]], out.scores[batch.pairs[:, 1]]
        return (
            *(out.loss, out.critic_loss, out.score_loss, out.tie_loss, out.center_loss),
            ordered.sum(),
            (better * ordered).sum(),
            (worse * ordered).sum(),
            (out.differences * ordered).sum(),
            ((out.differences > 0) & ordered).sum(),
            batch.ties.sum(),
            (out.differences.abs() * batch.ties).sum(),
        )

    def _range_of(self, out: RewardOutput) -> tuple[Tensor, Tensor]:
        return out.scores.min(), out.scores.max()

    def _named(self, total: dict[str, float], least: float, most: float) -> dict[str, float]:
        ordered = max(1.0, total["ordered"])
        return {
            "loss": total["loss"],
            "loss/critic": total["critic"],
            "loss/score": total["score"],
            "loss/tie": total["tie"],
            "loss/center": total["center"],
            "rewards/chosen": total["chosen"] / ordered,
            "rewards/rejected": total["rejected"] / ordered,
            "rewards/margins": total["margins"] / ordered,
            "rewards/accuracies": total["accuracies"] / ordered,
            "rewards/tie_margins": total["apart"] / max(1.0, total["tied"]),
            "rewards/min": least,
            "rewards/max": most,
        }
