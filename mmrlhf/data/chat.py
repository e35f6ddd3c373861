"""Chat templates and markers: a prompt's text, an answer's text up to its end of turn, and what users may not write.

The prefix of a group is the template's own generation prompt; an answer is what the template adds to it for an
assistant turn, through the end-of-turn token (what it writes after that, "\\n" for instance, is not scored). A template
that writes no end of turn (LLaVA-1.5's) gets the tokenizer's end-of-sequence token, so that stopping is scored too.
An answer's tokens are those it has in its place, after the prompt, unless the tokenizer would merge across that
boundary: then it is tokenised apart. Either way the prefix keeps exactly its own tokens, whatever answer follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmrlhf.data.schema import BadRow, Message, Part, PreferenceGroup

_MARKERS = (
    "image_token",
    "video_token",
    "audio_token",
    "boi_token",
    "eoi_token",
    "vision_start_token",
    "vision_end_token",
    "start_image_token",
    "end_image_token",
    "context_image_token",
    "fake_image_token",
    "image_break_token",
    "image_end_token",
    "full_image_sequence",
)


_PROBE = "\u2402probe\u2403"  # no user writes it, no template trims it
_SHORT = 64  # texts of the template whose tokens are kept


def _trimmed(text: str) -> tuple[str, ...]:
    """The text, and what a template that trims would leave of it."""
    return text, text.strip(), text.rstrip(), text.lstrip()


@dataclass(frozen=True)
class Answer:
    """The tokens of one response, end of turn included, and where each lies in the characters of its text."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...] | None  # [start, end) characters of Response.text; None: slow tokenizer


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer to one conversation."""

    messages: tuple[Message, ...]
    prompt: str  # the prefix's text, generation prompt included
    before: str  # between that and the answer; usually nothing
    after: str  # all that follows the answer
    end: str  # the part of it that is scored: through the end of turn


class Chat:
    """The text side of a processor (or of a bare tokenizer, for text-only models)."""

    def __init__(self, processor: Any):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.text_only = self.tokenizer is processor
        template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not template:
            raise ValueError(f"{type(processor).__name__} has no chat template; set processor.chat_template")
        self.template = template
        self._short: dict[str, tuple[int, ...]] = {}

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """Strings that stand for special tokens or for places of media: never part of user text."""
        tokens = set(self.tokenizer.all_special_tokens)
        tokens |= {str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        tokens |= {v for name in _MARKERS if isinstance(v := getattr(self.processor, name, None), str)}
        return tuple(sorted((t for t in tokens if t.strip()), key=lambda t: (-len(t), t)))

    @cached_property
    def _marker_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.markers)) or r"(?!)")

    @cached_property
    def special_ids(self) -> frozenset[int]:
        ids = set(self.tokenizer.all_special_ids)
        ids |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        return frozenset(ids - {self.tokenizer.unk_token_id})

    @cached_property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    def check_user_text(self, text: str, what: str, source: str) -> None:
        """BadRow if the text holds a marker, literally or after the tokenizer's normalisation (D12)."""
        self._check_markers(text, what, source)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        special = next((i for i in ids if i in self.special_ids), None)
        if special is not None:
            name = self.tokenizer.convert_ids_to_tokens(special)
            raise BadRow(source, f"{what} is tokenised to {name!r}, a special token; user text must not")

    def _check_markers(self, text: str, what: str, source: str) -> None:
        hit = self._marker_pattern.search(text)
        if hit is not None:
            raise BadRow(source, f"{what} holds {hit.group()!r}, a marker of the model; user text must not")

    def _num_special(self, ids: Sequence[int]) -> int:
        return sum(map(self.special_ids.__contains__, ids))

    def _template_ids(self, text: str) -> tuple[int, ...]:
        """Tokens of what the template writes; it writes the same around most answers."""
        if text not in self._short:
            if len(self._short) == _SHORT:
                self._short.clear()
            self._short[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._short[text]

    def render(self, messages: Sequence[Message], source: str, *, generation_prompt: bool) -> str:
        """The conversation as text, media as the template's placeholders.

        BadRow where the template refuses it (its raise_exception: no system role, roles must alternate, …);
        ValueError for a template that no conversation can pass, since it does not compile.
        """
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        conversation = [{"role": m.role, "content": self._content(m)} for m in messages]
        try:
            return self.processor.apply_chat_template(
                conversation, chat_template=self.template, add_generation_prompt=generation_prompt, tokenize=False
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid: {error.message} (line {error.lineno})") from error
        except TemplateError as error:
            raise BadRow(source, f"the chat template refuses the conversation: {error.message}") from error

    def _content(self, message: Message) -> Any:
        if self.text_only:
            return "".join(p.text for p in message.content)
        return [{"type": p.type, "text": p.text} if p.type == "text" else {"type": p.type} for p in message.content]

    def prompt(self, group: PreferenceGroup, messages: Sequence[Message]) -> str:
        """The text of the prefix, generation prompt included. BadRow for markers, or text that the template loses."""
        source = group.source or group.id
        texts = [p.text for m in messages for p in m.content if p.type == "text"]
        for text in texts:
            self.check_user_text(text, "prompt", source)
        rendered = self.render(messages, source, generation_prompt=True)
        lost = next((t for t in texts if t.strip() not in rendered), None)
        if lost is not None:
            raise BadRow(source, f"the chat template leaves out or changes message text: {lost.strip()[:60]!r}")
        return rendered

    def frame(self, messages: Sequence[Message], prompt: str, source: str) -> Frame:
        """What the template writes around an answer to these messages, seen on a probe. ValueError if unusable."""
        full = self._with_answer(messages, _PROBE, source)
        if not full.startswith(prompt):
            raise ValueError(
                "the chat template's assistant turn does not continue its generation prompt: the prompt ends "
                f"{prompt[-40:]!r}, but with an answer it reads {full[max(0, len(prompt) - 40) : len(prompt) + 20]!r}"
            )
        before, found, after = full[len(prompt) :].partition(_PROBE)
        if not found:
            raise ValueError(f"the chat template changes an answer's text: {_PROBE!r} became {before[:80]!r}")
        hit = self._marker_pattern.search(after)
        if hit is not None:
            end = after[: hit.end()]
        elif self.tokenizer.eos_token is not None:
            end = after.rstrip() + self.tokenizer.eos_token
        else:
            raise ValueError("the chat template ends answers with no special token, and the tokenizer has no eos_token")
        return Frame(tuple(messages), prompt, before, after, end)

    def _with_answer(self, messages: Sequence[Message], text: str, source: str) -> str:
        turn = Message("assistant", (Part("text", text),))
        return self.render([*messages, turn], source, generation_prompt=False)

    def answer(self, frame: Frame, text: str, source: str, *, offsets: bool) -> Answer:
        """The tokens the model should give for `text`, end of turn included.

        BadRow for user text with markers, an answer without tokens, and one that the template rewrites (Qwen3's cuts
        what stands before "</think>"); a template that rewrites every answer meets the cap on bad rows.
        """
        self._check_markers(text, "response", source)
        rest = self._with_answer(frame.messages, text, source).removeprefix(frame.prompt)
        kept = next((t for t in _trimmed(text) if rest == frame.before + t + frame.after), None)
        if kept is None:
            self.check_user_text(text, "response", source)
            raise BadRow(source, f"the chat template changes an answer's text: {text[:60]!r} became {rest[:80]!r}")
        ids, spans = self._tokens(frame.prompt, frame.before + kept + frame.end, offsets)
        # Tokenising a text by itself costs as much as in its place: only where that shows a special token too many.
        if self._num_special(ids) != self._num_special(self._template_ids(frame.before + frame.end)):
            self.check_user_text(text, "response", source)
        if not ids or min(ids) < 0 or max(ids) >= self.vocabulary:
            raise BadRow(source, f"a response gives token ids outside 0..{self.vocabulary - 1}" if ids else "no tokens")
        shift = len(frame.before) - text.index(kept)  # from characters of what was tokenised to those of the response
        moved = None if spans is None else tuple((a - shift, b - shift) for a, b in spans)
        return Answer(tuple(ids), moved)

    def _tokens(self, prompt: str, answer: str, offsets: bool) -> tuple[list[int], list[tuple[int, int]] | None]:
        """Token ids of `answer` in its place after `prompt`, and their characters in `answer`."""
        offsets = offsets and self.tokenizer.is_fast
        last = None
        for last in self._marker_pattern.finditer(prompt):  # noqa: B007
            pass
        before = prompt[last.start() :] if last is not None else prompt
        context = self._template_ids(before)
        joined = self.tokenizer(before + answer, add_special_tokens=False, return_offsets_mapping=offsets)
        ids, cut = joined["input_ids"], len(before)
        if tuple(ids[: len(context)]) == context:
            skip = len(context)
        else:  # a merge across the boundary
            joined = self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=offsets)
            ids, cut, skip = joined["input_ids"], 0, 0
        if not offsets:
            return ids[skip:], None
        return ids[skip:], [(a - cut, b - cut) for a, b in joined["offset_mapping"][skip:]]

    def check_prefix(self, ids: Sequence[int], prompt: str) -> None:
        """ValueError if the tokenizer closed the prompt with an end of sequence that the template did not write."""
        eos = self.tokenizer.eos_token
        if eos and ids and ids[-1] == self.tokenizer.eos_token_id and not prompt.rstrip().endswith(eos):
            raise ValueError(f"the tokenizer appends {eos!r} to prompts; turn that off (add_eos_token=False)")
