"""What every format is made of: fields checked one by one, messages, and the Record they make.

Each helper returns what the schema wants or raises ValueError with a sentence that names the field, what came and what
is allowed; the reader adds the file and line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmrlhf.data.schema import ImageRef, ListedPair, Message, Part, Response, VideoRef

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = re.compile(r"<(image|video)>")


@dataclass
class Record:
    """One row, understood. `pairs` None means: derive them from ranks or scores."""

    prompt: tuple[Message, ...]
    responses: list[Response]
    pairs: list[ListedPair] | None
    images: tuple[ImageRef, ...] = ()
    videos: tuple[VideoRef, ...] = ()
    id: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    edge_meta: dict[str, str] = field(default_factory=dict)  # belongs to the one pair of this row
    ties: list[tuple[int, int]] = field(default_factory=list)  # pairs that the row names as tied


def want(row: Mapping, key: str, kind: type | tuple[type, ...], *, optional: bool = False) -> Any:
    """row[key], or ValueError naming the key, what came and what is allowed."""
    value = row.get(key)
    if value is None:
        if optional:
            return None
        raise ValueError(f"{key!r} is {'null' if key in row else 'missing'}")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{key!r} must be {names}, got {type(value).__name__}")
    return value


def text_of(value: Any, name: str) -> str:
    """A text that can be stored and tokenised, or ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{name} must be str, got {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a lone surrogate at character {error.start}") from error
    return value


def answer(value: Any, name: str, **extra) -> Response:
    """A response; empty and blank ones are refused (there is nothing to score)."""
    text = text_of(value, name)
    if not text.strip():
        raise ValueError(f"{name} is {'empty' if not text else 'only whitespace'}")
    return Response(text=text, **extra)


def number(value: Any, name: str) -> float | None:
    """A finite number or None, or ValueError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be finite") from error
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def pair_of(row: Mapping, better: Any, worse: Any, names: tuple[str, str] = ("chosen", "rejected")) -> dict[str, Any]:
    """`responses` and `pairs` of a chosen/rejected row, with critiques, scores and a margin where the row has them."""
    responses = [
        answer(
            text,
            name,
            score=number(row.get(f"score_{key}", row.get(f"{key}_score")), f"score_{key}"),
            critique=optional_text(row.get(f"{key}_reason"), f"{key}_reason"),
        )
        for text, name, key in zip((better, worse), names, ("chosen", "rejected"), strict=True)
    ]
    if responses[0].text == responses[1].text:
        raise ValueError("chosen and rejected are the same text")
    if row.get("is_tie") in (True, 1, "True", "true"):
        return {"responses": responses, "pairs": [], "ties": [(0, 1)]}
    return {"responses": responses, "pairs": [ListedPair(0, 1, number(row.get("margin"), "margin"))]}


def optional_text(value: Any, name: str) -> str | None:
    return None if value is None or value == "" else text_of(value, name)


def user(text: str, images: int = 0, videos: int = 0) -> tuple[Message, ...]:
    """One user turn: media where `<image>` and `<video>` stand in the text, or before it where none does."""
    return place_media([Message("user", _split(text) or (Part("text", text),))], images, videos)


def has_placeholder(text: str) -> bool:
    return _PLACEHOLDER.search(text) is not None


def texts_of(row: Mapping, keys: tuple[str, ...]) -> dict[str, str]:
    return {key: str(row[key])[:2000] for key in keys if row.get(key) is not None}


def messages_of(value: Any, name: str, *, placeholders: bool = False) -> list[Message]:
    """Messages in the OpenAI ("role", "content") or ShareGPT ("from", "value") spelling.

    With `placeholders`, `<image>` and `<video>` in a content that is a string become parts. A content that is a list
    says itself which parts are media, so its text stays text.
    """
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name!r} must be a list of messages, got {type(value).__name__}")
    out = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise ValueError(f"{where} must be a message, got {type(item).__name__}")
        role = item.get("role", item.get("from"))
        if role not in ROLES:
            raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {role!r}")
        content = item.get("content", item.get("value"))
        parts = _parts(content, where)
        if placeholders and isinstance(content, str):
            parts = _split(content) or parts
        out.append(Message(ROLES[role], parts))
    return out


def _parts(content: Any, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", text_of(content, where)),)
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: content must be text or a list of parts, got {type(content).__name__}")
    parts = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text":
            parts.append(Part("text", text_of(item.get("text", item.get("value")), where)))
        elif kind in ("image", "video"):
            parts.append(Part(kind))
        else:
            raise ValueError(f"{where}: a part must be of type text, image or video, got {kind!r}")
    return tuple(parts)


def split_placeholders(messages: list[Message]) -> list[Message]:
    """`<image>` and `<video>` in the text become parts; the text around them stays as it is."""
    out = []
    for message in messages:
        parts: list[Part] = []
        for part in message.content:
            if part.type != "text":
                parts.append(part)
                continue
            parts += _split(part.text)
        out.append(Message(message.role, tuple(parts)))
    return out


def _split(text: str) -> tuple[Part, ...]:
    parts = []
    for index, piece in enumerate(_PLACEHOLDER.split(text)):
        if index % 2:
            parts.append(Part("image" if piece == "image" else "video"))
        elif piece:
            parts.append(Part("text", piece))
    return tuple(parts)


def place_media(messages: list[Message], images: int, videos: int) -> tuple[Message, ...]:
    """Check that the parts fit the media; where a kind has no part at all, its parts go before the first user text."""
    counted = {kind: sum(p.type == kind for m in messages for p in m.content) for kind in ("image", "video")}
    missing: tuple[Part, ...] = ()
    for kind, given in (("image", images), ("video", videos)):
        if counted[kind] == given:
            continue
        if counted[kind]:
            hint = "" if given else f" (<{kind}> in a prompt stands for one)"
            raise ValueError(f"{counted[kind]} {kind} placeholders for {given} {kind}s{hint}")
        missing += (Part(kind),) * given  # type: ignore[arg-type]
    if missing:
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if first is None:
            raise ValueError("the prompt has no user turn to hold its images")
        messages = [Message(m.role, missing + m.content) if i == first else m for i, m in enumerate(messages)]
    return tuple(messages)


def final_text(messages: list[Message], name: str) -> str:
    """The text of a completion: exactly one assistant message, without media."""
    if len(messages) != 1 or messages[0].role != "assistant":
        raise ValueError(f"{name} must be one assistant message, got roles {[m.role for m in messages]}")
    if any(p.type != "text" for p in messages[0].content):
        raise ValueError(f"{name} holds an image or a video; responses are text")
    return "".join(p.text for p in messages[0].content)
