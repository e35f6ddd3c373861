"""One batch of groups through a reward model: their critiques, and the score that is read after each.

With critiques to be written, all of a batch grow in one cache and are scored from it (`decode`); a decoder whose cache
cannot be shared writes them with the model's own `generate`, and one packed row reads the scores. With critiques given,
or none, there is that row alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrlhf.batch import layout_of
from mmrlhf.data.collate import collate
from mmrlhf.data.images import MAX_PIXELS
from mmrlhf.data.schema import PreferenceGroup
from mmrlhf.models import generate, parts, shared_prefix, vision
from mmrlhf.reward import decode
from mmrlhf.reward.critique import RewardModel
from mmrlhf.reward.encode import CritiqueEncoder, CritiqueGroup, asking
from mmrlhf.reward.journal import Scored

CRITICS = ("generated", "given", "none")
Waiting = Sequence[tuple[int, PreferenceGroup, CritiqueGroup]]  # a place among the groups asked for, and the group


@dataclass(frozen=True)
class Scoring:
    """How to score. `critic`: write a critique first, take the data's, or read the score after the answer alone."""

    critic: str = "generated"
    samples: int = 1  # critiques a response, whose scores are averaged; the paper found that to hurt (section 5.3)
    temperature: float = 1.0  # of the samples, where there are several; one critique is greedy
    seed: int = 0
    max_new_tokens: int = 1024  # of a critique; the published evaluation allows 4096
    tokens_per_batch: int = 32768  # critiques to be written counted in full
    max_group_tokens: int = 32768
    max_image_pixels: int = MAX_PIXELS
    video_frames: int = 8

    def __post_init__(self):
        if self.critic not in CRITICS:
            raise ValueError(f"critic must be one of {', '.join(CRITICS)}, got {self.critic!r}")
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and name != "seed" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        if self.samples > 1 and self.critic != "generated":
            raise ValueError(f"samples is {self.samples}, but with critic {self.critic} nothing is sampled")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and positive, got {self.temperature!r}")


def encoder_for(reward: RewardModel, settings: Scoring, root: str | Path) -> CritiqueEncoder:
    return CritiqueEncoder(
        reward.processor,
        root=root,
        max_group_tokens=settings.max_group_tokens,
        max_image_pixels=settings.max_image_pixels,
        video_frames=settings.video_frames,
    )


def cost(encoded: CritiqueGroup, settings: Scoring) -> int:
    """Tokens of a group in the pass that scores it; where critiques are written, every row has the prompt's cache."""
    if settings.critic != "generated":
        return encoded.num_tokens
    prefix = encoded.prefix_ids.numel()
    return sum(settings.samples * (prefix + ids.numel() + settings.max_new_tokens) for ids in encoded.response_ids)


@torch.no_grad()
def score_batch(
    reward: RewardModel,
    encoder: CritiqueEncoder,
    given: Waiting,
    settings: Scoring,
    *,
    apart: bool,
) -> list[Scored]:
    """The groups of one batch; ValueError for a score that is not finite."""
    groups = [group for _, group, _ in given]
    encoded = [each for _, _, each in given]
    texts: list[str | None]
    if settings.critic == "generated" and not apart:
        texts, scores = _generated(reward, encoder, groups, encoded, settings)
    elif settings.critic == "generated":
        texts, scores = _generated_apart(reward, encoder, groups, encoded, settings)
    else:
        texts = [None] * sum(len(group.responses) for group in groups)
        if settings.critic == "given":
            texts = [response.critique for group in groups for response in group.responses]
        scores = _packed_scores(reward, encoded)
    samples = settings.samples
    mean = scores.double().view(-1, samples).mean(dim=1).tolist()
    found = []
    at = 0
    for index, group, _ in given:
        values = tuple(mean[at : at + len(group.responses)])
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"group {group.id} ({group.source or 'no source'}): its scores are not finite: {values}")
        critiques = tuple(texts[at * samples : (at + len(values)) * samples : samples])
        found.append(Scored(index, group.id, values, critiques))
        at += len(values)
    return found


def _packed_scores(reward: RewardModel, encoded: Sequence[CritiqueGroup]) -> Tensor:
    """[R] float32: the score of every branch, read in one packed row."""
    batch = collate(encoded)
    layout, last = layout_of(batch), batch.cu_seqlens[1:] - 1
    batch = shared_prefix.prepare(reward.model, batch).to(reward.device)
    hidden = shared_prefix.response_hidden(reward.model, batch, share_prefix=reward.share_prefix, layout=layout)
    return reward.head(hidden[last.to(reward.device)])


def _generated(
    reward: RewardModel,
    encoder: CritiqueEncoder,
    groups: Sequence[PreferenceGroup],
    encoded: Sequence[CritiqueGroup],
    settings: Scoring,
) -> tuple[list[str | None], Tensor]:
    """Critiques and scores [R * samples] from one cache."""
    batch = collate(encoded)
    layout = layout_of(batch)
    batch = shared_prefix.prepare(reward.model, batch).to(reward.device)
    whole, tokenizer = parts.base_model(reward.model), encoder.chat.tokenizer
    decoding = decode.Decoding(
        max_new_tokens=settings.max_new_tokens,
        ends=tuple(generate.end_tokens(whole, tokenizer)),
        suppressed=tuple(generate.suppressed_tokens(reward.model, reward.processor)),
        temperature=settings.temperature if settings.samples > 1 else None,
        seed=settings.seed,
    )
    spoken, hidden = decode.speak(
        reward.model,
        batch,
        layout,
        vision.encode(reward.model, batch),
        [encoder.closing(group) for group in groups],
        decoding,
        samples=settings.samples,
    )
    texts = tokenizer.batch_decode(spoken, skip_special_tokens=True)
    return [text.strip() for text in texts], reward.head(hidden)


def _generated_apart(
    reward: RewardModel,
    encoder: CritiqueEncoder,
    groups: Sequence[PreferenceGroup],
    encoded: Sequence[CritiqueGroup],
    settings: Scoring,
) -> tuple[list[str | None], Tensor]:
    """The same for a decoder whose cache cannot be shared: critiques by the model's own `generate`, then one pass."""
    prompts: list[generate.Prompt] = []
    keys = []
    for group in groups:
        pictures = encoder.opened(group)
        source = group.source or group.id
        prompts += [(asking(group.prompt, response.text, source), pictures) for response in group.responses]
        keys += [f"{group.id}#{index}" for index in range(len(group.responses))]
    words: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    if settings.samples == 1:
        spoken = [[text] for text in generate.answer(reward.model, reward.processor, prompts, **words)]
    else:  # an answer at a time: its draws must not depend on its batch, which differs once a stopped run goes on
        words |= {"n": settings.samples, "temperature": settings.temperature}
        spoken = []
        for prompt, key in zip(prompts, keys, strict=True):
            seed = decode.seed_of(settings.seed, key)
            spoken += generate.sample(reward.model, reward.processor, [prompt], seed=seed, **words)
    at = 0
    branches = []
    for group, each in zip(groups, encoded, strict=True):
        closing = encoder.closing(group)
        rows = []
        for head, texts in zip(each.response_ids, spoken[at : at + len(each.response_ids)], strict=True):
            rows += [torch.tensor([*head.tolist(), *encoder.spoken(text), *closing, closing[-1]]) for text in texts]
        at += len(each.response_ids)
        weights = tuple(torch.zeros(row.numel()) for row in rows)
        indices = tuple(index for index in each.responses for _ in range(settings.samples))
        branches.append(dataclasses.replace(each, response_ids=tuple(rows), weights=weights, responses=indices))
    return [text for texts in spoken for text in texts], _packed_scores(reward, branches)
