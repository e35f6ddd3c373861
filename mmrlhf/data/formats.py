"""The published formats, one function each: a row (dict) -> a Record. What a row must hold is said where it is read.

mm_rlhf        MM-RLHF pairs and RewardBench: id, image (path or list) or video, prompt, chosen, rejected, *_reason
mmrlhf         ranked lists: prompt, responses [{text, score, rank, critique, segments}], or ranking "1>2=3>4"
rlhf_v         RLHF-V-Dataset: image {bytes, path}, text = JSON {question, chosen, rejected}
rlaif_v        RLAIF-V-Dataset: image {bytes, path}, question, chosen, rejected
trl            TRL vision preference: images or image, prompt, chosen, rejected; conversational or plain
llama_factory  LLaMA-Factory ranking: sharegpt conversations + chosen, rejected, or alpaca instruction
swift          ms-swift: messages + rejected_response or rejected_messages; query + response + rejected_response

In every format `<image>` and `<video>` in a prompt that is a string stand for the row's media, in order: there must be
as many as the row has, or none (then they go before the text). A text-only row that holds one is bad, too: a model
whose own marker is another word would be trained to read it as text. A literal one is written as a text part.
Columns that mean nothing here (cached log-probabilities, say) are counted by name, never read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mmrlhf.data import media
from mmrlhf.data.fields import (
    Record,
    answer,
    final_text,
    messages_of,
    number,
    optional_text,
    pair_of,
    place_media,
    split_placeholders,
    text_of,
    texts_of,
    user,
    want,
)
from mmrlhf.data.schema import ListedPair, Message, Part, Response

MAX_RESPONSES = 64  # K of one row; a ranking of more is not one that people made


def parse_mm_rlhf(row: Mapping) -> Record:
    images, videos = media.images_of(row), media.videos_of(row)
    if media.audio_in(row):
        raise ValueError("audio is not supported")
    factor = number(row.get("ls_factor"), "ls_factor")
    return Record(
        prompt=user(text_of(want(row, "prompt", str), "prompt"), len(images), len(videos)),
        images=images,
        videos=videos,
        id=str(row.get("id") or ""),
        # ls_factor is 1 - exp(-k * margin) for a k that the file does not give: kept as it is, not taken for a margin.
        edge_meta={} if factor is None else {"ls_factor": repr(factor)},
        meta=texts_of(row, ("category", "split")),
        **pair_of(row, row.get("chosen"), row.get("rejected")),
    )


def parse_rlhf_v(row: Mapping) -> Record:
    text = row.get("text")
    if isinstance(text, str):
        try:
            text = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'text' is not JSON: {error}") from error
    if not isinstance(text, dict):
        raise ValueError("'text' must be a JSON object with question, chosen and rejected")
    images = media.images_of(row)
    return Record(
        prompt=user(text_of(text.get("question"), "question"), len(images)),
        images=images,
        id=_joined_id(row, ("ds_name", "idx")),
        meta=texts_of(row, ("ds_name", "origin_dataset", "origin_split", "image_path")),
        **pair_of(text, text.get("chosen"), text.get("rejected")),
    )


def parse_rlaif_v(row: Mapping) -> Record:
    images = media.images_of(row)
    return Record(
        prompt=user(text_of(row.get("question"), "question"), len(images)),
        images=images,
        id=_joined_id(row, ("ds_name", "idx")),
        meta=texts_of(row, ("ds_name", "origin_dataset", "origin_split", "image_path")),
        **pair_of(row, row.get("chosen"), row.get("rejected")),
    )


def _joined_id(row: Mapping, keys: tuple[str, ...]) -> str:
    return "-".join(str(row[key]) for key in keys if row.get(key) is not None)


def parse_trl(row: Mapping) -> Record:
    if row.get("tools"):
        raise ValueError("'tools' are not supported")
    images, videos = media.images_of(row), media.videos_of(row)
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        messages = _prompt(prompt)
        better, worse = chosen, rejected
    else:
        left, right = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        if prompt is None:  # implicit: what both sides begin with
            same = 0
            while same < min(len(left), len(right)) - 1 and left[same] == right[same]:
                same += 1
            messages = messages_of(list(chosen or ())[:same], "chosen", placeholders=True)
            left, right = left[same:], right[same:]
        else:
            messages = _prompt(prompt)
        better, worse = final_text(left, "chosen"), final_text(right, "rejected")
    return Record(
        prompt=place_media(messages, len(images), len(videos)),
        images=images,
        videos=videos,
        id=str(row.get("id") or ""),
        **pair_of(row, better, worse),
    )


def _prompt(value: Any) -> list[Message]:
    """A prompt that is a string or a list of messages, placeholders in strings made parts."""
    if not isinstance(value, (list, tuple)):
        value = [{"role": "user", "content": text_of(value, "prompt")}]
    return messages_of(value, "prompt", placeholders=True)


def parse_llama_factory(row: Mapping) -> Record:
    images, videos = media.images_of(row), media.videos_of(row)
    if media.audio_in(row):
        raise ValueError("audio is not supported")
    turns: list[Message] = []
    if row.get("system"):
        turns.append(Message("system", (Part("text", text_of(row["system"], "system")),)))
    chosen, rejected = row.get("chosen"), row.get("rejected")
    better: Any
    worse: Any
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if value is None:
            raise ValueError(f"{name!r} is missing: rows with one answer each compare nothing")
    conversation = row.get("conversations", row.get("messages"))
    if conversation is not None:
        turns += messages_of(conversation, "conversations")
        better = final_text(messages_of([chosen], "chosen"), "chosen")
        worse = final_text(messages_of([rejected], "rejected"), "rejected")
    else:
        for turn in row.get("history") or ():
            if not isinstance(turn, (list, tuple)) or len(turn) != 2:
                raise ValueError("'history' must be a list of [question, answer]")
            turns += messages_of(
                [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}], "history"
            )
        query = text_of(want(row, "instruction", str), "instruction")
        if row.get("input"):
            query += "\n" + text_of(row["input"], "input")
        turns.append(Message("user", (Part("text", query),)))
        better, worse = chosen, rejected
    return Record(
        prompt=place_media(split_placeholders(turns), len(images), len(videos)),
        images=images,
        videos=videos,
        id=str(row.get("id") or ""),
        **pair_of(row, better, worse),
    )


def parse_swift(row: Mapping) -> Record:
    if row.get("rejected_images"):
        raise ValueError("'rejected_images' compares two images for one answer; only answers can be compared here")
    if media.audio_in(row):
        raise ValueError("audio is not supported")
    if row.get("tools"):
        raise ValueError("'tools' are not supported")
    images, videos = media.images_of(row), media.videos_of(row)
    if row.get("messages") is not None:
        messages = messages_of(row["messages"], "messages")
    else:
        query = text_of(row.get("query", row.get("question")), "query")
        messages = messages_of(
            [{"role": "user", "content": query}, {"role": "assistant", "content": row.get("response")}], "messages"
        )
    prompt, better = messages[:-1], final_text(messages[-1:], "the last of messages")
    worse = _swift_rejected(row, prompt)
    record = pair_of(row, better, worse[0])
    for text in worse[1:]:
        record["pairs"].append(ListedPair(0, len(record["responses"])))
        record["responses"].append(answer(text, "rejected_response"))
    return Record(
        prompt=place_media(split_placeholders(prompt), len(images), len(videos)),
        images=images,
        videos=videos,
        id=str(row.get("id") or ""),
        **record,
    )


def _swift_rejected(row: Mapping, prompt: list[Message]) -> list[str]:
    if row.get("rejected_messages") is not None:
        other = messages_of(row["rejected_messages"], "rejected_messages")
        if other[:-1] != prompt:
            raise ValueError("'rejected_messages' must repeat the prompt of 'messages' exactly")
        return [final_text(other[-1:], "the last of rejected_messages")]
    value = row.get("rejected_response")
    if isinstance(value, str):
        return [value]
    if isinstance(value, (list, tuple)) and value:
        if all(isinstance(v, str) for v in value):
            return list(value)
        return [final_text(messages_of(value, "rejected_response"), "rejected_response")]
    raise ValueError("'rejected_response' must be text, a list of texts or one assistant message")


def parse_mmrlhf(row: Mapping) -> Record:
    images, videos = media.images_of(row), media.videos_of(row)
    given = want(row, "responses", (list, tuple))
    if not 2 <= len(given) <= MAX_RESPONSES:
        raise ValueError(f"'responses' must hold 2 to {MAX_RESPONSES}, got {len(given)}")
    scores, ranks = _column(row, "scores", len(given)), _column(row, "ranks", len(given))
    order = row.get("ranking", row.get("rank"))
    if order is not None:
        ranks = list(parse_ranking(text_of(order, "ranking"), len(given)))
    responses = []
    for index, item in enumerate(given):
        fields = {"text": item} if isinstance(item, str) else item
        if not isinstance(fields, Mapping):
            raise ValueError(f"responses[{index}] must be text or an object, got {type(item).__name__}")
        responses.append(_ranked_response(fields, index, scores[index], ranks[index]))
    return Record(
        prompt=place_media(_prompt(row.get("prompt")), len(images), len(videos)),
        images=images,
        videos=videos,
        id=str(row.get("id") or ""),
        responses=responses,
        pairs=_listed_pairs(row.get("pairs"), len(responses)),
        ties=[(p.better, p.worse) for p in _listed_pairs(row.get("ties"), len(responses), "ties") or ()],
        meta={str(k): str(v) for k, v in (want(row, "meta", dict, optional=True) or {}).items()},
    )


def _ranked_response(fields: Mapping, index: int, score: Any, rank: Any) -> Response:
    name = f"responses[{index}]"
    rank = fields.get("rank", rank)
    if rank is not None and (isinstance(rank, bool) or int(number(rank, f"{name}.rank") or 0) != rank or rank < 1):
        raise ValueError(f"{name}.rank must be a whole number from 1, got {rank!r}")
    text = text_of(fields.get("text"), f"{name}.text")
    segments = fields.get("segments")
    if segments is not None:
        segments = tuple(_span(s, len(text), f"{name}.segments") for s in segments)
    return answer(
        text,
        f"{name}.text",
        score=number(fields.get("score", score), f"{name}.score"),
        rank=None if rank is None else int(rank),
        critique=optional_text(fields.get("critique"), f"{name}.critique"),
        segments=segments,
    )


def _span(value: Any, length: int, name: str) -> tuple[int, int]:
    ok = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int for v in value)
    if not ok or not 0 <= value[0] < value[1] <= length:
        raise ValueError(f"{name} must be [start, end) within 0..{length}, got {value!r}")
    return value[0], value[1]


def _column(row: Mapping, key: str, count: int) -> list:
    values = want(row, key, (list, tuple), optional=True)
    if values is not None and len(values) != count:
        raise ValueError(f"{key!r} has {len(values)} entries for {count} responses")
    return list(values) if values is not None else [None] * count


def _listed_pairs(value: Any, count: int, name: str = "pairs") -> list[ListedPair] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name!r} must be a list, got {type(value).__name__}")
    pairs = []
    for item in value:
        ok = isinstance(item, (list, tuple)) and len(item) in (2, 3) and all(type(v) is int for v in item[:2])
        if not ok or not all(0 <= v < count for v in item[:2]) or item[0] == item[1]:
            raise ValueError(
                f"{name!r} must hold [better, worse] or [better, worse, margin] below {count}, got {item!r}"
            )
        pairs.append(ListedPair(item[0], item[1], number(item[2], "margin") if len(item) == 3 else None))
    return pairs


def parse_ranking(text: str, count: int) -> tuple[int, ...]:
    """ "1>2=3>4" -> the rank of each of `count` responses (1 is best, ties share a rank): (1, 2, 2, 4).

    Numbers name responses from 1, as MM-RLHF's annotators write them. ValueError unless each is named once.
    """
    ranks: dict[int, int] = {}
    for level in text.split(">"):
        rank = len(ranks) + 1
        for word in level.split("="):
            word = word.strip()
            if not word.isascii() or not word.isdigit() or not 1 <= int(word) <= count or int(word) in ranks:
                raise ValueError(f"ranking {text[:60]!r} must name each of 1..{count} once, with > and = between")
            ranks[int(word)] = rank
    if len(ranks) != count:
        raise ValueError(f"ranking {text[:60]!r} names {len(ranks)} of {count} responses")
    return tuple(ranks[i + 1] for i in range(count))


_MEDIA = "image images video videos"
_PAIR = "id chosen rejected margin is_tie score_chosen score_rejected chosen_score rejected_score"
# The columns each format reads.
COLUMNS: dict[str, frozenset[str]] = {
    name: frozenset(columns.split())
    for name, columns in {
        "mm_rlhf": f"{_PAIR} {_MEDIA} prompt chosen_reason rejected_reason ls_factor category split",
        "mmrlhf": f"id {_MEDIA} prompt responses scores ranks ranking rank pairs ties meta",
        "rlhf_v": "ds_name image text origin_dataset origin_split idx image_path",
        "rlaif_v": f"{_PAIR} ds_name image question origin_dataset origin_split idx image_path",
        "trl": f"{_PAIR} {_MEDIA} prompt tools",
        "llama_factory": f"{_PAIR} {_MEDIA} audios conversations messages system instruction input history",
        "swift": f"id {_MEDIA} audios messages query question response rejected_response rejected_messages "
        "rejected_images margin tools",
    }.items()
}

PARSERS: dict[str, Callable[[Mapping], Record]] = {
    "mm_rlhf": parse_mm_rlhf,
    "mmrlhf": parse_mmrlhf,
    "rlhf_v": parse_rlhf_v,
    "rlaif_v": parse_rlaif_v,
    "trl": parse_trl,
    "llama_factory": parse_llama_factory,
    "swift": parse_swift,
}


def detect(row: Mapping) -> str | None:
    """The format of a row by what it holds, or None. First match in this order."""
    pair = "chosen" in row and "rejected" in row
    if "responses" in row:
        return "mmrlhf"
    if any(k in row for k in ("rejected_response", "rejected_messages", "rejected_images")):
        return "swift"
    if "conversations" in row or (pair and ("instruction" in row or "messages" in row)):
        return "llama_factory"
    if isinstance(row.get("text"), (str, dict)) and ("image" in row or "idx" in row) and not pair:
        return "rlhf_v"
    if pair and "question" in row:
        return "rlaif_v"
    if not pair:
        return None
    named_by_path = isinstance(row.get("image"), str) or isinstance(row.get("video"), str) or "chosen_reason" in row
    if isinstance(row.get("prompt"), str) and (named_by_path or ("id" in row and "images" not in row)):
        return "mm_rlhf"
    return "trl"
