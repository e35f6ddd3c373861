"""Rows of the published formats, groups made of plain words, and what the tests of data ask of them."""

from __future__ import annotations

import json

import pytest

from mmrlhf.data.schema import Message, Part, PreferenceGroup, Response

PAIR = {"id": "q1", "image": "mcq/a.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def kinds(group):
    return [part.type for message in group.prompt for part in message.content]


def texts(group):
    return [response.text for response in group.responses]


def edges(group):
    return [(p.better, p.worse) for p in group.preference_pairs()]


def parquet(path, rows, **options):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def rlhf_v_row(picture, idx, chosen="A red cat.", rejected="A blue cat.", color=(1, 2, 3)):
    return {
        "ds_name": "RLHF-V",
        "image": {"bytes": picture(color=color), "path": None},
        "text": json.dumps({"question": "Describe.", "chosen": chosen, "rejected": rejected}),
        "origin_dataset": "coco",
        "origin_split": json.dumps({"model": "m", "type": "detailed_description"}),
        "idx": idx,
        "image_path": "a.jpg",
    }


CONVERSATIONAL = {
    "images": ["a.png"],
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
    "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}],
}


SHAREGPT = {
    "conversations": [{"from": "human", "value": "<image>What?"}],
    "chosen": {"from": "gpt", "value": "A cat."},
    "rejected": {"from": "gpt", "value": "A dog."},
    "images": ["a.png"],
}


SWIFT = {
    "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
    "rejected_response": "A dog.",
    "images": ["a.png"],
}


FAMILIES = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3")


def preference(*responses, id="g", images=(), videos=(), text="what is in the image ?", pairs=None, ranked=True):
    """Responses best first; images and videos before the text."""
    parts = [*(Part("image") for _ in images), *(Part("video") for _ in videos), Part("text", text)]
    answers = tuple(
        r if isinstance(r, Response) else Response(r, rank=i + 1 if ranked and pairs is None else None)
        for i, r in enumerate(responses)
    )
    return PreferenceGroup(
        id,
        (Message("user", tuple(parts)),),
        answers,
        images=tuple(images),
        videos=tuple(videos),
        pairs=pairs,
        source=id,
    )


def decode(encoder, ids):
    """The text of token ids."""
    return encoder.chat.tokenizer.decode(ids)
