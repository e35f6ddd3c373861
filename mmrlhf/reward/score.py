"""Criticise, then score: every response of a data set gets a score, and every pair its margin.

    mmrlhf reward score MODEL DATA -o OUT          OUT: our JSON Lines, with score, critique, pairs and margins
    mmrlhf train mm_dpo data.path=OUT              Dynamic Reward Scaling on r(y_w) - r(y_l)

A group is one pass: its picture is encoded once, its prompt read once, all its critiques decoded together and scored
from the same cache (`decode`); with critiques given, or none, its responses are one packed row. The order of the pairs
stays the data's own: a score that contradicts it gives a negative margin, which `dynamic_beta` holds at beta.

Work that is done is kept in OUT.journal, a line a group, under a hash of the model, the options and the group: what
is stopped goes on where it was, and rows added to DATA later are the only ones computed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmrlhf.batch import layout_of
from mmrlhf.data import readers, writers
from mmrlhf.data.collate import collate
from mmrlhf.data.images import MAX_PIXELS
from mmrlhf.data.schema import BadRow, ListedPair, PreferenceGroup
from mmrlhf.models import generate, parts, shared_prefix, vision
from mmrlhf.reward import decode
from mmrlhf.reward.critique import RewardModel, load_reward_model
from mmrlhf.reward.encode import CritiqueEncoder, CritiqueGroup, asking, listed
from mmrlhf.reward.journal import Journal, Scored
from mmrlhf.train import setup
from mmrlhf.train.state import fingerprint, text_fingerprint

T = TypeVar("T")
CRITICS = ("generated", "given", "none")
logger = logging.getLogger(__name__)


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


def score_groups(
    reward: RewardModel,
    groups: Sequence[PreferenceGroup],
    *,
    root: str | Path,
    on_bad_row: str = "raise",
    bad_rows: list[BadRow] | None = None,
    **options: Any,
) -> Iterator[Scored]:
    """Scores of the responses of each group, in order, a batch at a time; the other arguments are those of `Scoring`.

    `root`: where images and videos lie. Raises BadRow naming a group that cannot be encoded, or (`on_bad_row` "skip")
    leaves it out and puts it into `bad_rows`; ValueError for an argument, or a score that is not finite.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be raise or skip, got {on_bad_row!r}")
    settings = Scoring(**options)
    encoder = _encoder(reward, settings, root)
    reason = decode.why_not(reward.model) if settings.critic == "generated" else None
    if reason is not None:
        logger.warning("every critique reads its prompt anew: %s", reason)
    waiting: list[tuple[int, PreferenceGroup, CritiqueGroup]] = []
    filled = 0
    for index, group in enumerate(groups):
        try:
            if reason is not None and group.videos:
                raise BadRow(group.source or group.id, f"critiques of videos are not possible here: {reason}")
            encoded = encoder.rows(group, settings.critic)
        except BadRow as error:
            if on_bad_row == "raise":
                raise
            if bad_rows is not None:
                bad_rows.append(error)
            continue
        cost = _cost(encoded, settings)
        if waiting and filled + cost > settings.tokens_per_batch:
            yield from _score(reward, encoder, waiting, settings, apart=reason is not None)
            waiting, filled = [], 0
        waiting.append((index, group, encoded))
        filled += cost
    if waiting:
        yield from _score(reward, encoder, waiting, settings, apart=reason is not None)


def _encoder(reward: RewardModel, settings: Scoring, root: str | Path) -> CritiqueEncoder:
    return CritiqueEncoder(
        reward.processor,
        root=root,
        max_group_tokens=settings.max_group_tokens,
        max_image_pixels=settings.max_image_pixels,
        video_frames=settings.video_frames,
    )


def _cost(encoded: CritiqueGroup, settings: Scoring) -> int:
    """Tokens of a group in the pass that scores it; where critiques are written, every row has the prompt's cache."""
    if settings.critic != "generated":
        return encoded.num_tokens
    prefix = encoded.prefix_ids.numel()
    return sum(settings.samples * (prefix + ids.numel() + settings.max_new_tokens) for ids in encoded.response_ids)


@torch.no_grad()
def _score(
    reward: RewardModel,
    encoder: CritiqueEncoder,
    given: Sequence[tuple[int, PreferenceGroup, CritiqueGroup]],
    settings: Scoring,
    *,
    apart: bool,
) -> list[Scored]:
    """The groups of one batch."""
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


def score_file(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    format: str = "auto",
    root: str | Path | None = None,
    on_bad_row: str = "raise",
    max_bad_rows: float = 0.05,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: str | None = None,
    **options: Any,
) -> ScoredFile:
    """Score a file's responses and write it back; the other arguments are those of `readers.read_groups` and `Scoring`.

    Groups without any pair (ties, contradictions) are scored by nobody's order and are left out; they are in the
    result. Raises BadRow, TooManyBadRows, ValueError for an argument, a journal of another model or other options, or
    a model without a scoring head.
    """
    setup.single_process("mmrlhf reward score")
    output = Path(output)
    settings = Scoring(**options)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output} must be a file in a folder that is there")
    found = readers.read_groups(data, format=format, root=root, on_bad_row=on_bad_row, max_bad_rows=max_bad_rows)
    if Path(data).exists() and output.exists() and output.samefile(data):
        raise ValueError(f"output: {output} is the data itself")
    if not found.groups:
        raise ValueError(
            f"{data} has no group with a pair to score: of {found.rows} rows {len(found.bad_rows)} are bad"
        )
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    reward = load_reward_model(model, device=device, dtype=dtype, backend=backend, **code)
    encoder = _encoder(reward, settings, found.root)
    bad = list(found.bad_rows)
    with Journal(output.with_name(output.name + ".journal"), key=_key(reward, settings)) as journal:
        hashes = _hashes(encoder, found.groups, on_bad_row, bad)
        readers.check_cap(bad, found.rows, max_bad_rows, what="rows", where=str(data))  # before hours of scoring
        usable = [group for group in found.groups if group.id in hashes]
        todo = [group for group in usable if journal.get(hashes[group.id], group) is None]
        asked = {"root": found.root, "on_bad_row": on_bad_row, "bad_rows": bad, **dataclasses.asdict(settings)}
        for new in _shown(score_groups(reward, todo, **asked), len(todo), "score"):
            journal.add(hashes[new.id], new)
        readers.check_cap(bad, found.rows, max_bad_rows, what="rows", where=str(data))
        written = [
            with_scores(group, done) for group in usable if (done := journal.get(hashes[group.id], group)) is not None
        ]
    pairs = [pair for group in written for pair in group.preference_pairs()]
    writers.write_ranked(written, output)
    return ScoredFile(
        path=output,
        root=found.root,
        groups=len(written),
        responses=sum(len(group.responses) for group in written),
        computed=len(todo),
        pairs=len(pairs),
        agreeing=sum(pair.margin is not None and pair.margin > 0 for pair in pairs),
        without_pairs=tuple(found.without_pairs),
        bad_rows=tuple(bad),
    )


@dataclass(frozen=True)
class ScoredFile:
    """What `score_file` did."""

    path: Path
    root: Path  # where the images of its rows are looked up
    groups: int
    responses: int
    computed: int  # groups scored now; the others were in the journal
    pairs: int
    agreeing: int  # pairs whose margin is above 0
    without_pairs: tuple[str, ...]  # sources of groups that are left out: only ties, or contradictions
    bad_rows: tuple[BadRow, ...]

    def text(self) -> str:
        """A few lines for the terminal."""
        lines = [
            f"{self.responses} responses of {self.groups} groups are scored, {self.computed} groups now",
            f"{self.agreeing} of {self.pairs} pairs have a positive margin: the scores agree with their order",
        ]
        if self.without_pairs:
            lines.append(f"{len(self.without_pairs)} groups have no pair and are left out: {_few(self.without_pairs)}")
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows)} rows or groups are bad and left out:")
            lines += [f"  {row}" for row in self.bad_rows[:20]]
            lines += [f"  and {len(self.bad_rows) - 20} more"] * (len(self.bad_rows) > 20)
        words = ["mmrlhf", "train", "mm_dpo", f"data.path={self.path}"]
        if self.root.resolve() != self.path.parent.resolve():
            words.append(f"data.root={self.root}")
        lines.append(f"the data lies in {self.path}: {shlex.join(words)}")
        return "\n".join(lines)


def with_scores(group: PreferenceGroup, done: Scored) -> PreferenceGroup:
    """The group with these scores and critiques; its pairs keep their order and get the margins of the scores.

    A critique that was written takes the place of the data's.
    """
    group = listed(group)
    responses = tuple(
        dataclasses.replace(response, score=score, critique=response.critique if critique is None else critique or None)
        for response, score, critique in zip(group.responses, done.scores, done.critiques, strict=True)
    )
    pairs = tuple(
        ListedPair(p.better, p.worse, done.scores[p.better] - done.scores[p.worse]) for p in group.pairs or ()
    )
    return dataclasses.replace(group, responses=responses, pairs=pairs)


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _hashes(
    encoder: CritiqueEncoder, groups: Sequence[PreferenceGroup], on_bad_row: str, bad: list[BadRow]
) -> dict[str, str]:
    """`row_hash` of each group by id; a group whose files cannot be read is a bad row."""
    found = {}
    for group in _shown(groups, len(groups), "look"):  # every picture is read
        try:
            found[group.id] = encoder.row_hash(group)
        except BadRow as error:
            if on_bad_row == "raise":
                raise
            bad.append(error)
    return found


def _shown(groups: Iterable[T], total: int, what: str) -> Iterator[T]:
    from tqdm import tqdm

    yield from tqdm(groups, total=total, desc=what, unit="group", leave=False, disable=None)


def _key(reward: RewardModel, settings: Scoring) -> str:
    """A hash over what the scores depend on besides the data: weights, config, head, and how critiques are made."""
    weights = dict(reward.model.named_parameters()) | {f"head.{n}": p for n, p in reward.head.named_parameters()}
    asked = dataclasses.asdict(settings)
    del asked["tokens_per_batch"], asked["max_group_tokens"]
    if settings.critic != "generated":
        del asked["max_new_tokens"]
    if settings.samples == 1:
        del asked["temperature"], asked["seed"]
    return text_fingerprint(
        fingerprint(weights),
        json.dumps(parts.base_model(reward.model).config.to_dict(), sort_keys=True, default=str),
        json.dumps(dataclasses.asdict(reward.head.described), sort_keys=True),
        json.dumps(asked, sort_keys=True),
    )
