"""The reward model and its loss (MM-RLHF, arXiv 2502.10391, section 3).

    critique head   the lm_head: log p(critique | prompt, answer), from the rows of critique tokens alone
    scoring head    r(prompt, answer, critique), from one row a branch

All pairs of a group's K answers come from one packed forward: the picture is encoded once, the prompt is read once, and
an answer that is in three pairs is read once. The released trainer reads each pair as two rows, encodes the picture
twice, and computes logits and scores at every position; the loss is the same (`pair_losses`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf import ops
from mmrlhf.config import RewardConfig
from mmrlhf.models import load, parts, shared_prefix
from mmrlhf.reward import head as heads
from mmrlhf.reward.encode import CritiqueBatch
from mmrlhf.train import setup


@dataclass(frozen=True)
class RewardOutput:
    """What the loss of a micro-batch is made of. Only `loss` has a gradient."""

    loss: Tensor  # []
    scores: Tensor  # [R]
    nll: Tensor  # [R] nats a token, 0 where a branch has no critique
    differences: Tensor  # [P] score of the better less that of the worse
    critic_loss: Tensor  # [] these four are parts of `loss`, without their weights
    score_loss: Tensor  # []
    tie_loss: Tensor  # []
    center_loss: Tensor  # []


def pair_losses(
    scores: Tensor,  # [R]
    nll: Tensor,  # [R] token-mean NLL of each branch's critique; 0 where there is none
    pairs: Tensor,  # [P, 2] (better, worse), ties in any order
    ties: Tensor,  # [P] bool
    *,
    margin: Tensor | None = None,  # [P]; NaN where a pair has none
) -> dict[str, Tensor]:
    """Each pair's terms, [P]: "score", "tie", "center" and "critic" (reward_trainer.py:241-300 of MM-RLHF at 7c8af1d).

    score = -log sigmoid(r_b - r_w - margin), 0 for a tie; tie = (r_b - r_w)^2, 0 for others; center = (r_b + r_w)^2;
    critic = nll_b + nll_w. `margin` None, or NaN for a pair: nothing is taken off.
    """
    better, worse = scores[pairs[:, 0]], scores[pairs[:, 1]]
    difference = better - worse
    ahead = difference if margin is None else difference - torch.nan_to_num(margin)
    zero = torch.zeros_like(difference)
    return {
        "score": torch.where(ties, zero, -nn.functional.logsigmoid(ahead)),
        "tie": torch.where(ties, difference.square(), zero),
        "center": (better + worse).square(),
        "critic": nll[pairs[:, 0]] + nll[pairs[:, 1]],
    }


def critique_nll(
    hidden: Tensor,  # [N, H]
    lm_head: Any,  # models.parts.Head
    batch: CritiqueBatch,
    *,
    backend: str | None = None,
) -> Tensor:
    """[R] float32: the mean of -log p over each branch's critique tokens, nats; 0 where there are none.

    Only the rows of critique tokens meet the lm_head.
    """
    assert batch.critique is not None
    assert batch.critique_cu is not None
    if batch.critique.numel() == 0:
        return hidden.new_zeros(batch.num_responses, dtype=torch.float32)
    logp = ops.linear_logp(
        hidden[batch.critique],
        lm_head.weight,
        batch.targets[batch.critique],
        bias=lm_head.bias,
        logit_scale=lm_head.logit_scale,
        softcap=lm_head.softcap,
        adapter=[ops.LoraAdapter(*factors) for factors in lm_head.adapters],
        backend=backend,
    )
    return -ops.sequence_score(logp, batch.critique_cu, reduction="mean")


def reward_loss(
    hidden: Tensor,  # [N, H]
    lm_head: Any,  # models.parts.Head
    head: heads.RewardHead,
    batch: CritiqueBatch,
    settings: RewardConfig,
    *,
    num_pairs: int,
    backend: str | None = None,
) -> RewardOutput:
    """The loss of a micro-batch; `num_pairs` of the whole step, so that micro-batches add up to the mean over pairs.

    critic_weight * critic + score_weight * (score + tie_weight * tie) + center_weight * center, see `pair_losses`.
    """
    assert batch.last is not None
    assert batch.ties is not None
    scores = head(hidden[batch.last])
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.critic_weight > 0):
        nll = critique_nll(hidden, lm_head, batch, backend=backend)
    terms = pair_losses(scores, nll, batch.pairs, batch.ties, margin=batch.margin if settings.margin else None)
    mean = {name: values.sum() / num_pairs for name, values in terms.items()}
    ranking = mean["score"] + settings.tie_weight * mean["tie"]
    loss = settings.score_weight * ranking + settings.center_weight * mean["center"]
    if settings.critic_weight > 0:
        loss = loss + settings.critic_weight * mean["critic"]
    mean = {name: value.detach() for name, value in mean.items()}
    known = scores.detach()
    return RewardOutput(
        loss=loss,
        scores=known,
        nll=nll.detach(),
        differences=known[batch.pairs[:, 0]] - known[batch.pairs[:, 1]],
        critic_loss=mean["critic"],
        score_loss=mean["score"],
        tie_loss=mean["tie"],
        center_loss=mean["center"],
    )


@dataclass(frozen=True)
class RewardModel:
    """A model that scores: the language model, its scoring head and its processor, in eval mode."""

    model: Any
    head: heads.RewardHead
    processor: Any
    share_prefix: bool  # one pass over a prompt for all its answers
    backend: str | None = None

    @property
    def device(self) -> torch.device:
        return parts.parameter_device(self.model)


def load_reward_model(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: str | None = None,
) -> RewardModel:
    """The reward model of a local folder or hub id, as `mmrlhf reward train` writes it.

    `device`, `dtype`: as the settings of those names. Raises what `load.load_model` raises, and ValueError for a folder
    without a reward head, or with one of another size.
    """
    place = setup.pick_device(device)
    options: Mapping[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    folder = load.local_folder(path, **options)
    head = heads.read(folder)
    if head is None:
        raise ValueError(
            f"{path} has no {heads.NAME}.json: it is no reward model. `mmrlhf reward train` makes one, in its model "
            "folder"
        )
    processor = load.load_processor(path, **options)
    model = load.load_model(path, dtype=dtype, device=place, **options).eval()
    load.check_pair(model, processor)
    check_size(head, model)
    shared, _ = shared_prefix.can_share(model)
    return RewardModel(model, head.to(place).eval(), processor, shared, backend)


def check_size(head: heads.RewardHead, model: nn.Module) -> None:
    """ValueError for a head whose rows are not those of the model."""
    size = int(parts.text_config(model).hidden_size)
    if head.described.hidden_size != size:
        raise ValueError(
            f"{heads.NAME}.json has hidden_size {head.described.hidden_size}, the model has {size}: they do not belong "
            "together"
        )
