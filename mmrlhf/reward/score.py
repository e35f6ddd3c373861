"""Criticise, then score: every response of a data set gets a score, and every pair its margin.

    mmrlhf reward score MODEL DATA -o OUT          OUT: our JSON Lines, with score, critique, pairs and margins
    mmrlhf train mm_dpo data.path=OUT              Dynamic Reward Scaling on r(y_w) - r(y_l)

A group is one pass: its picture is encoded once, its prompt read once, all its critiques decoded together and scored
from the same cache (`decode`); with critiques given, or none, its responses are one packed row. The order of the pairs
stays the data's own: a score that contradicts it gives a negative margin, which `dynamic_beta` holds at beta.

Work that is done is kept in OUT.journal, a line a group, under a hash of the model, the options and the group: what
is stopped goes on where it was, and rows added to DATA later are the only ones computed. Under torchrun each process
scores every n-th batch; the first keeps the journal and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mmrlhf.data import readers, writers
from mmrlhf.data.schema import BadRow, ListedPair, PreferenceGroup
from mmrlhf.models import parts
from mmrlhf.reward import decode
from mmrlhf.reward.critique import RewardModel, load_reward_model
from mmrlhf.reward.encode import CritiqueEncoder, CritiqueGroup, listed
from mmrlhf.reward.journal import Journal, Scored
from mmrlhf.reward.passes import Scoring, Waiting, cost, encoder_for, score_batch
from mmrlhf.train import setup
from mmrlhf.train.checkpoint import together
from mmrlhf.train.distributed import World, join
from mmrlhf.train.state import fingerprint, text_fingerprint

T = TypeVar("T")
logger = logging.getLogger(__name__)


def score_groups(
    reward: RewardModel,
    groups: Sequence[PreferenceGroup],
    *,
    root: str | Path,
    on_bad_row: str = "raise",
    bad_rows: list[BadRow] | None = None,
    world: World | None = None,
    **options: Any,
) -> Iterator[Scored]:
    """Scores of the responses of each group, in order, a batch at a time; the other arguments are those of `Scoring`.

    `root`: where images and videos lie. `world`: all its processes call with the same arguments; each scores its share
    of the batches, which are those of one process, and all get everything. Raises BadRow naming a group that cannot be
    encoded, or (`on_bad_row` "skip") leaves it out and puts it into `bad_rows`; ValueError for an argument, or a score
    that is not finite.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be raise or skip, got {on_bad_row!r}")
    settings = Scoring(**options)
    encoder = encoder_for(reward, settings, root)
    reason = decode.why_not(reward.model) if settings.critic == "generated" else None
    if reason is not None:
        logger.warning("every critique reads its prompt anew: %s", reason)

    def encoded(group: PreferenceGroup) -> CritiqueGroup | None:
        try:
            if reason is not None and group.videos:
                raise BadRow(group.source or group.id, f"critiques of videos are not possible here: {reason}")
            return encoder.rows(group, settings.critic)
        except BadRow as error:
            if on_bad_row == "raise":
                raise
            if bad_rows is not None:
                bad_rows.append(error)
            return None

    batches = _batches(groups, encoded, settings)
    world = world or World()
    apart = reason is not None
    yield from _in_turn(batches, lambda batch: score_batch(reward, encoder, batch, settings, apart=apart), world)


def _batches(
    groups: Sequence[PreferenceGroup], encoded: Callable[[PreferenceGroup], CritiqueGroup | None], settings: Scoring
) -> Iterator[Waiting]:
    """Groups in order, as many as `tokens_per_batch` allows together."""
    waiting: list[tuple[int, PreferenceGroup, CritiqueGroup]] = []
    filled = 0
    for index, group in enumerate(groups):
        found = encoded(group)
        if found is None:
            continue
        size = cost(found, settings)
        if waiting and filled + size > settings.tokens_per_batch:
            yield waiting
            waiting, filled = [], 0
        waiting.append((index, group, found))
        filled += size
    if waiting:
        yield waiting


def _in_turn(batches: Iterator[Waiting], work: Callable[[Waiting], list[Scored]], world: World) -> Iterator[Scored]:
    """What the batches give, in order. Every process makes all of them, which is cheap beside a critique, so that a
    batch is the same whoever scores it, to the last bit; as many as there are processes are scored side by side."""

    def take() -> tuple[int, list[Scored]]:
        taken, own = 0, None
        for number in range(world.size):
            batch = next(batches, None)
            if batch is None:
                break
            taken += 1
            if number == world.rank:
                own = batch
        return taken, [] if own is None else work(own)

    while True:
        outcomes = together(world, take)
        if len({taken for taken, _ in outcomes}) > 1:
            raise ValueError("the processes do not read the same data: every one needs the same files")
        for _, found in outcomes:
            yield from found
        if outcomes[0][0] < world.size:
            return


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
    result. Under torchrun the processes share the work, and the first writes what one alone would have written; they
    need the same files and one storage. Raises BadRow, TooManyBadRows, ValueError for an argument, a journal of another
    model or other options, or a model without a scoring head; what fails in one process is a RuntimeError in others.
    """
    output = Path(output)
    settings = Scoring(**options)
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"output: {output} must be a file in a folder that is there")
    with join(setup.pick_device(device)) as world, contextlib.ExitStack() as stack:
        found = readers.read_groups(data, format=format, root=root, on_bad_row=on_bad_row, max_bad_rows=max_bad_rows)
        if Path(data).exists() and output.exists() and output.samefile(data):
            raise ValueError(f"output: {output} is the data itself")
        if not found.groups:
            raise ValueError(
                f"{data} has no group with a pair to score: of {found.rows} rows {len(found.bad_rows)} are bad"
            )
        code: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        reward = load_reward_model(model, device=device, dtype=dtype, backend=backend, **code)
        key = _key(reward, settings) if world.first else ""
        journal = Journal(output.with_name(output.name + ".journal"), key=key)
        together(world, lambda: stack.enter_context(journal).path if world.first else None)
        bad = list(found.bad_rows)
        hashes = _hashes(encoder_for(reward, settings, found.root), found.groups, on_bad_row, bad, world)
        readers.check_cap(bad, found.rows, max_bad_rows, what="rows", where=str(data))  # before hours of scoring
        usable = [group for group in found.groups if group.id in hashes]
        # The first process alone knows what is done.
        open_ = [i for i, group in enumerate(usable) if world.first and journal.get(hashes[group.id], group) is None]
        todo = [usable[index] for index in world.gather(open_)[0]]
        asked: dict[str, Any] = {"root": found.root, "on_bad_row": on_bad_row, "bad_rows": bad, "world": world}
        scored = score_groups(reward, todo, **asked, **dataclasses.asdict(settings))
        for new in _shown(scored, len(todo), "score", world):
            if world.first:
                journal.add(hashes[new.id], new)
        readers.check_cap(bad, found.rows, max_bad_rows, what="rows", where=str(data))

        def write() -> dict[str, int]:
            done = [(group, journal.get(hashes[group.id], group)) for group in usable]
            written = [with_scores(group, scores) for group, scores in done if scores is not None]
            writers.write_ranked(written, output)
            pairs = [pair for group in written for pair in group.preference_pairs()]
            return {
                "groups": len(written),
                "responses": sum(len(group.responses) for group in written),
                "pairs": len(pairs),
                "agreeing": sum(pair.margin is not None and pair.margin > 0 for pair in pairs),
            }

        counts = together(world, lambda: write() if world.first else {})[0]
    return ScoredFile(
        path=output,
        root=found.root,
        computed=len(todo),
        without_pairs=tuple(found.without_pairs),
        bad_rows=tuple(bad),
        **counts,
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
    encoder: CritiqueEncoder, groups: Sequence[PreferenceGroup], on_bad_row: str, bad: list[BadRow], world: World
) -> dict[str, str]:
    """`row_hash` of each group by id; a group whose files cannot be read is a bad row. Each process reads its share."""

    def look() -> list[tuple[int, str, str, str]]:
        """(index, hash, source and reason of a bad row) of every group of this process."""
        made = []
        own = range(world.rank, len(groups), world.size)
        for index in _shown(own, len(own), "look", world):  # every picture is read
            try:
                made.append((index, encoder.row_hash(groups[index]), "", ""))
            except BadRow as error:
                if on_bad_row == "raise":
                    raise
                made.append((index, "", error.source, error.reason))
        return made

    made = sorted(each for part in together(world, look) for each in part)
    bad += [BadRow(source, reason) for _, name, source, reason in made if not name]
    return {groups[index].id: name for index, name, _, _ in made if name}


def _shown(groups: Iterable[T], total: int, what: str, world: World) -> Iterator[T]:
    from tqdm import tqdm

    hidden = None if world.first else True
    yield from tqdm(groups, total=total, desc=what, unit="group", leave=False, disable=hidden)


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
