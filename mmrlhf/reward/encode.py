"""PreferenceGroup -> the rows a reward model reads: each (response, critique) is a branch of the group's prefix.

    prefix   picture, instruction, "[Question]: …", "[LMM Response]:"            once a group
    branch   " answer", "[Evaluation]:", the assistant's turn: critique, end of turn, what the template writes after it

A group whose pairs have no critiques is read as it was asked: the prompt is the prefix, a branch is the answer's turn.
`token_weight` is 1 on the tokens of a critique (end of turn included) and 0 elsewhere, so the NLL of a branch without
one is 0. The score is read at the last token of a branch, so a branch carries one token more, which nothing reads and
whose "predicting" hidden row is the one wanted.

Not covered: the expansion of annotators' short reasons into critiques, done once, by whoever publishes the data (the
prompt that MM-RLHF used is table 7 of the paper).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrlhf.batch import GroupBatch, cumulative
from mmrlhf.data.chat import Chat, Frame
from mmrlhf.data.collate import EncodedGroup, Encoder
from mmrlhf.data.looks import Look
from mmrlhf.data.schema import BadRow, ImageRef, ListedPair, Message, Part, PreferenceGroup

# The user's turn as MM-RLHF trains it: llava/train/train_dpo.py:509-517 of its repository at 7c8af1d. There a line
# break stands between "[Question]:" and the question, left over from the image token that was cut out; not here.
INSTRUCTION = (
    "You are an unbiased and fair evaluator tasked with assessing the quality of answers provided by a Large "
    "Multimodal Model (LMM). Given the following question and the LMM's response, please evaluate the correctness, "
    "clarity, and completeness of the answer. Provide a detailed explanation of your assessment, including specific "
    "points of strength and areas for improvement.\n\n"
)
QUESTION, ANSWER, EVALUATION = "[Question]: ", "\n[LMM Response]:", "\n\n[Evaluation]:"
Looked = Mapping[ImageRef, Look] | None  # as `Encoder._encode` takes it
_PROBE = "\u2402answer\u2403"  # no user writes it, no template trims it


@dataclass(frozen=True)
class CritiqueGroup(EncodedGroup):
    """One group for a reward model: `response_ids` are branches, `pairs` has the ties too."""

    ties: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # [p] bool

    flags: ClassVar[tuple[str, ...]] = ("ties",)


@dataclass(frozen=True)
class CritiqueBatch(GroupBatch):
    """A GroupBatch with the places that the loss reads, found on the CPU (finding them on a GPU would wait for it)."""

    critique: Tensor | None = None  # [C] int64, into N: the tokens of critiques
    critique_cu: Tensor | None = None  # [R + 1] int64, where each branch's lie in [C]
    last: Tensor | None = None  # [R] int64, into N: the row whose hidden state is scored
    ties: Tensor | None = None  # [P] bool


def with_places(batch: GroupBatch, ties: Tensor | None = None) -> CritiqueBatch:
    """The batch of some CritiqueGroups with its places; on the CPU. `ties` [P] bool; none without it."""
    spoken = batch.token_weight > 0
    counts = [int(part.sum()) for part in spoken.split(batch.response_len.tolist())]
    given = {f.name: getattr(batch, f.name) for f in dataclasses.fields(GroupBatch)}
    return CritiqueBatch(
        **given,
        critique=spoken.nonzero()[:, 0],
        critique_cu=cumulative(counts),
        last=batch.cu_seqlens[1:] - 1,
        ties=torch.zeros(batch.pairs.shape[0], dtype=torch.bool) if ties is None else ties,
    )


def tied_pairs(group: PreferenceGroup) -> tuple[tuple[int, int], ...]:
    """The pairs (i < j) that the data calls equally good: named ones, those of equal ranks, else (where no pairs are
    listed) of equal scores."""
    levels = _levels(group)
    ordered = {frozenset((p.better, p.worse)) for p in group.preference_pairs()}
    pairs = {(i, j) for j in range(len(levels)) for i in range(j) if levels[i] == levels[j]} | set(group.ties)
    return tuple(sorted(pair for pair in pairs if frozenset(pair) not in ordered))


def _levels(group: PreferenceGroup) -> list[float]:
    """A number a response, equal where they are tied; empty where the data does not say."""
    ranks = [response.rank for response in group.responses]
    if None not in ranks:
        return [float(rank) for rank in ranks if rank is not None]
    scores = [response.score for response in group.responses]
    if group.pairs is not None or None in scores:
        return []
    return [float(score) for score in scores if score is not None]


def criticised(group: PreferenceGroup, *indices: int) -> bool:
    """Whether all of these responses have a critique: a pair is read with both, or (train_dpo.py:1240) without."""
    return all((group.responses[index].critique or "").strip() for index in indices)


def split(group: PreferenceGroup, mode: Any = "all") -> list[PreferenceGroup]:
    """The group, or two where some of its pairs and ties have critiques and some do not: those without are group
    "<id>#plain". `mode` says which pairs are meant, as in `preference_pairs`.

    A score with a critique is not to be compared with one without.
    """
    pairs, ties = group.preference_pairs(mode), tied_pairs(group)
    kinds = {criticised(group, p.better, p.worse) for p in pairs} | {criticised(group, *tie) for tie in ties}
    if len(kinds) < 2:
        return [group]
    # Each half names its own pairs and ties, so no rank may say of the others' ties what they are.
    responses = tuple(dataclasses.replace(response, rank=None) for response in group.responses)
    return [
        dataclasses.replace(
            group,
            id=name,
            responses=responses,
            pairs=tuple(p for p in pairs if criticised(group, p.better, p.worse) == spoken),
            ties=tuple(tie for tie in ties if criticised(group, *tie) == spoken),
        )
        for name, spoken in ((group.id, True), (f"{group.id}#plain", False))
    ]


def listed(group: PreferenceGroup) -> PreferenceGroup:
    """The group with its pairs as a list; where scores alone ordered it, ranks say what they said of ties."""
    responses = group.responses
    if None in [response.rank for response in responses] and (levels := _levels(group)):
        order = sorted(set(levels), reverse=True)
        ranks = [order.index(level) + 1 for level in levels]
        responses = tuple(dataclasses.replace(r, rank=n) for r, n in zip(responses, ranks, strict=True))
    return dataclasses.replace(group, responses=responses, pairs=group.preference_pairs())


def asking(prompt: Sequence[Message], answer: str, source: str) -> tuple[Message, ...]:
    """The conversation that asks for a critique of `answer`: the last user turn within the instruction.

    Media before the question stay before the instruction. BadRow if the last turn is not the user's.
    """
    *before, last = prompt
    if last.role != "user":
        raise BadRow(source, f"the last turn of the prompt is the {last.role}'s, and a critique asks about the user's")
    content = list(last.content)
    leading = next((at for at, part in enumerate(content) if part.type == "text"), len(content))
    question = content[leading:]
    opening = Part("text", INSTRUCTION + QUESTION + (question.pop(0).text if question else ""))
    ending = f"{ANSWER} {answer}{EVALUATION}"
    if question and question[-1].type == "text":
        question[-1] = Part("text", question[-1].text + ending)
    elif question:
        question.append(Part("text", ending))
    else:
        opening = Part("text", opening.text + ending)
    return (*before, Message("user", (*content[:leading], opening, *question)))


class _CritiqueChat(Chat):
    """A `Chat` whose prompts end where the answer to be criticised begins."""

    def prompt(self, group: PreferenceGroup, messages: Sequence[Message]) -> str:
        rendered = super().prompt(group, messages)
        at = rendered.find(f" {_PROBE}")
        if at < 0:
            raise ValueError("the chat template changes the text of a user's turn; critiques cannot be asked for")
        return rendered[:at]

    def asked(self, messages: Sequence[Message], prefix: str, answer: str, source: str) -> Frame:
        """The frame of a critique of `answer`; `messages` have the probe in its place."""
        self.check_user_text(answer, "response", source)
        content = tuple(
            Part(part.type, part.text.replace(_PROBE, answer)) if part.type == "text" else part
            for part in messages[-1].content
        )
        messages = (*messages[:-1], Message("user", content))
        prompt = self.render(messages, source, generation_prompt=True)
        if not prompt.startswith(f"{prefix} {answer}"):
            raise BadRow(source, f"the chat template changes the answer to be criticised: {answer[:60]!r}")
        return self.frame(messages, prompt, source)

    def ids(self, before: str, text: str) -> tuple[int, ...]:
        """The tokens of `text` in its place."""
        return tuple(self._tokens(before, text, False)[0]) if text else ()

    def tail(self, frame: Frame) -> tuple[int, ...]:
        """What the template writes after the end of turn (ChatML's line break): the score is read at its last token."""
        return self.ids(frame.end, frame.after[len(frame.end) :]) if frame.after.startswith(frame.end) else ()


class CritiqueEncoder(Encoder):
    """An `Encoder` of groups for a reward model; the same arguments. Segments weigh nothing here."""

    makes = CritiqueGroup
    makers = (sys.modules[__name__],)  # for `data.kept`: tokens are made anew where this file changes

    def __init__(self, processor: Any, **options: Any):
        super().__init__(processor, **options)
        self.chat: _CritiqueChat = _CritiqueChat(processor)
        self._plain = Encoder(processor, **{**options, "looks": None})

    def _encode(self, group: PreferenceGroup, looks: Looked) -> CritiqueGroup:
        """Pairs, ties and their branches, teacher-forced critiques included. Raises as `Encoder.encode` does."""
        spoken, pairs, ties = self._compared(group)
        listed = [*pairs, *(ListedPair(i, j) for i, j in ties)]
        used = sorted({index for p in listed for index in (p.better, p.worse)})
        encoded = self.rows(group, "given" if spoken else "none", used, looks=looks)
        slot = {index: number for number, index in enumerate(used)}
        return dataclasses.replace(
            encoded,
            pairs=torch.tensor([(slot[p.better], slot[p.worse]) for p in listed], dtype=torch.int64).view(-1, 2),
            margin=torch.tensor([math.nan if p.margin is None else p.margin for p in listed], dtype=torch.float32),
            ties=torch.tensor([False] * len(pairs) + [True] * len(ties), dtype=torch.bool),
        )

    def _compared(self, group: PreferenceGroup) -> tuple[bool, tuple[ListedPair, ...], tuple[tuple[int, int], ...]]:
        """Whether the pairs are read with critiques, the pairs, and the ties. BadRow for a group without either."""
        pairs, ties = group.preference_pairs(self.pairs), tied_pairs(group)
        kinds = {criticised(group, *compared) for compared in (*((p.better, p.worse) for p in pairs), *ties)}
        if not kinds:
            raise BadRow(group.source or group.id, group.why_no_pairs(self.pairs))
        if len(kinds) > 1:
            raise BadRow(
                group.source or group.id, "some pairs have critiques and some have not: give it to reward.encode.split"
            )
        return kinds.pop(), pairs, ties

    def rows(
        self, group: PreferenceGroup, critic: str, used: Sequence[int] | None = None, *, looks: Looked = None
    ) -> CritiqueGroup:
        """The responses `used` (default: all) of a group as branches, without pairs.

        `critic` "given": with the critique that the data has; "none": without; "generated": up to where a critique
        begins, and no token more. Raises BadRow (TooLong) for the group.
        """
        source = group.source or group.id
        used = range(len(group.responses)) if used is None else used
        for index in used:
            if not group.responses[index].text.strip():
                raise BadRow(source, f"response {index} is empty")
            if critic == "given" and not criticised(group, index):
                raise BadRow(source, f"response {index} has no critique")
        if critic == "none":
            prefix_ids, aligned, vision, messages, prompt = self._plain._prefix(group, looks)
            branches = self._plain_branches(group, used, messages, prompt)
        else:
            prefix_ids, aligned, vision, messages, prompt = self._probed(group, looks)
            branches = [
                self._branch(group, index, messages, prompt, spoken=critic == "given", source=source) for index in used
            ]
        if critic != "generated":  # the token whose row is the last one's hidden state; any but a picture's will do
            branches = [([*ids, ids[-1]], [*weights, 0.0]) for ids, weights in branches]
        encoded = CritiqueGroup(
            id=group.id,
            prefix_ids=prefix_ids,
            response_ids=tuple(torch.tensor(ids, dtype=torch.int64) for ids, _ in branches),
            weights=tuple(torch.tensor(weights, dtype=torch.float32) for _, weights in branches),
            responses=tuple(used),
            pairs=torch.empty(0, 2, dtype=torch.int64),
            margin=torch.empty(0),
            aligned=aligned,
            vision=vision if looks is None else {},
            images=len(group.images) + len(group.videos),
        )
        self._check_length(encoded, source)
        return encoded

    def closing(self, group: PreferenceGroup) -> tuple[int, ...]:
        """The tokens that follow a critique: end of turn, and what the template writes after it."""
        source = group.source or group.id
        messages = asking(group.prompt, _PROBE, source)
        prompt = self.chat.render(messages, source, generation_prompt=True)
        frame = self.chat.frame(messages, prompt, source)
        return (*self.chat.ids("", frame.end), *self.chat.tail(frame))

    def opened(self, group: PreferenceGroup) -> list[Any]:
        """The pictures of a group, in order, as PIL images."""
        return self._media(group, group.source or group.id, None)[1]

    def spoken(self, text: str) -> list[int]:
        """The tokens of a generated critique; what would read as a marker of the model is left out."""
        ids = self.chat.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token not in self.chat.special_ids]

    def _plain_branches(
        self, group: PreferenceGroup, used: Sequence[int], messages: Sequence[Message], prompt: str
    ) -> list[tuple[list[int], list[float]]]:
        """Answers as the assistant's turn, no token of which is a critique's."""
        source = group.source or group.id
        frame = self.chat.frame(messages, prompt, source)
        tail = self.chat.tail(frame)
        answers = [self.chat.answer(frame, group.responses[index].text, source, offsets=False) for index in used]
        return [([*answer.ids, *tail], [0.0] * (len(answer.ids) + len(tail))) for answer in answers]

    def _branch(
        self,
        group: PreferenceGroup,
        index: int,
        messages: Sequence[Message],
        prefix: str,
        *,
        spoken: bool,
        source: str,
    ) -> tuple[list[int], list[float]]:
        """Tokens and weights of one answer and (`spoken`) its critique."""
        frame = self.chat.asked(messages, prefix, group.responses[index].text, source)
        head = self.chat.ids(prefix, frame.prompt[len(prefix) :])
        if not spoken:
            return list(head), [0.0] * len(head)
        try:
            critique = self.chat.answer(frame, group.responses[index].critique or "", source, offsets=False).ids
        except BadRow as error:
            raise BadRow(source, f"the critique of response {index}: {error.reason}") from error
        tail = self.chat.tail(frame)
        return [*head, *critique, *tail], [0.0] * len(head) + [1.0] * len(critique) + [0.0] * len(tail)

    def _prefix(self, group: PreferenceGroup, looks: Looked):
        if self._compared(group)[0]:
            return self._probed(group, looks)
        return self._plain._prefix(group, looks)

    def _probed(self, group: PreferenceGroup, looks: Looked):
        """`_prefix` of the conversation that asks for a critique, up to where the answer begins."""
        probed = dataclasses.replace(group, prompt=asking(group.prompt, _PROBE, group.source or group.id))
        return super()._prefix(probed, looks)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything here that changes tokens, pixels or pairs, the instruction included."""
        words = (INSTRUCTION, QUESTION, ANSWER, EVALUATION)
        return hashlib.sha256(repr((self._plain.fingerprint, words)).encode()).hexdigest()
