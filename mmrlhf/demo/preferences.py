"""Preference data from the model's own samples, in both published forms.

Each picture is captioned five times at temperature .7. Form one, RLHF-V: the first caption with an error and its
correction, which differ in the wrong segments alone (parquet, picture's bytes inside). Form two, MM-RLHF: all distinct
captions with the oracle's scores, so that pairs have reward margins (ranked JSONL, with the published
dpo_pairs.jsonl beside it, which has no room for scores). Not covered: human noise; the oracle never errs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmrlhf.data.schema import ImageRef, ListedPair, Message, Part, PreferenceGroup, Response
from mmrlhf.demo.language import QUESTION, correct, critique, score
from mmrlhf.demo.world import Scene, draw

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

SAMPLES = 5
TEMPERATURE = 0.7  # at 1.0 most errors would be slips of the eye rather than the habit


@dataclass(frozen=True)
class PreferenceData:
    """Where the files lie, and what is in them."""

    root: Path  # pictures are looked up here
    corrected: Path  # RLHF-V parquet
    ranked: Path  # scores and critiques, our JSONL
    dpo_pairs: Path  # the same as pairs, MM-RLHF's JSONL
    scenes: int
    corrected_groups: int
    ranked_groups: int
    ranked_pairs: int


def question_prompt() -> tuple[Message, ...]:
    """The one prompt of this world: a picture, and what is in it."""
    return (Message("user", (Part("image"), Part("text", QUESTION))),)


def corrected_group(scene: Scene, texts: Sequence[str], *, id: str, picture: str) -> PreferenceGroup | None:
    """The first caption that needs correcting, against its correction; None where all are right."""
    for text in texts:
        better = correct(text, scene)
        if better != text:
            return PreferenceGroup(
                id=id,
                prompt=question_prompt(),
                responses=(Response(better), Response(text)),
                images=(ImageRef(path=picture),),
                pairs=(ListedPair(0, 1),),
            )
    return None


def ranked_group(scene: Scene, texts: Sequence[str], *, id: str, picture: str) -> PreferenceGroup | None:
    """The distinct captions with scores, ranks (equal scores share one) and critiques; None where all are as good."""
    distinct = sorted(dict.fromkeys(texts), key=lambda text: -score(text, scene))
    scores = [score(text, scene) for text in distinct]
    levels = sorted(set(scores), reverse=True)
    if len(levels) < 2:
        return None
    responses = tuple(
        Response(text, score=value, rank=1 + levels.index(value), critique=critique(text, scene))
        for text, value in zip(distinct, scores, strict=True)
    )
    return PreferenceGroup(id=id, prompt=question_prompt(), responses=responses, images=(ImageRef(path=picture),))


def make_preferences(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: Sequence[Scene],
    folder: Path,
    *,
    seed: int,
) -> PreferenceData:
    """Sample, judge and write: `folder` gets pictures/, corrected.parquet, ranked.jsonl and dpo_pairs.jsonl."""
    from mmrlhf.data.writers import write_dpo_pairs, write_ranked, write_rlhf_v_parquet
    from mmrlhf.demo.sample import captions
    from mmrlhf.demo.world import pixels

    samples = captions(model, tokenizer, pixels(list(scenes)), samples=SAMPLES, temperature=TEMPERATURE, seed=seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    corrected: list[PreferenceGroup] = []
    ranked: list[PreferenceGroup] = []
    for number, (scene, texts) in enumerate(zip(scenes, samples, strict=True)):
        id = f"scene-{number:04d}"
        picture = f"pictures/{id}.png"
        draw(scene).save(folder / picture)
        pair = corrected_group(scene, texts, id=id, picture=picture)
        if pair is not None:
            corrected.append(pair)
        ranks = ranked_group(scene, texts, id=id, picture=picture)
        if ranks is not None:
            ranked.append(ranks)
    data = PreferenceData(
        root=folder,
        corrected=folder / "corrected.parquet",
        ranked=folder / "ranked.jsonl",
        dpo_pairs=folder / "dpo_pairs.jsonl",
        scenes=len(scenes),
        corrected_groups=len(corrected),
        ranked_groups=len(ranked),
        ranked_pairs=sum(len(group.preference_pairs()) for group in ranked),
    )
    write_rlhf_v_parquet(corrected, data.corrected, folder)
    write_ranked(ranked, data.ranked)
    write_dpo_pairs(ranked, data.dpo_pairs)
    return data
