"""Tiny vision-language models, processors and batches for the tests of every room, built from configs, offline.

    model, processor = tiny_model("llava_onevision", seed=0)      2 layers, hidden 32, float32, sdpa
    tiny_folder("qwen2_5_vl", tmp_path)                           the same as an ordinary folder on disk
    batch = tiny_batch(model, processor, k=(2, 3))                two prompts with 2 and 3 responses

Every family here runs without torchvision: image processors are the PIL ones, and processors that insist on a
video processor get the stand-in of `mmrlhf.models.frames`. Not covered: anything a real checkpoint's size brings.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mmrlhf.batch import GroupBatch, Layout, cumulative, score_rows
from tiny_families import build

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
    "mistral3",
    "pixtral",
    "glm4v",
)


def tiny_model(family: str, *, seed: int = 0, **text):
    """A fresh (model, processor) of one family; equal seeds give bitwise equal weights. The model is in train mode.

    `text` overrides settings of the decoder's config, for instance layer_types and sliding_window.
    """
    config, model_class, processor = build(family)
    for name, value in text.items():
        setattr(config.text_config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config._attn_implementation = "sdpa"
        model = model_class(config)
        # Weights start at std 0.02, which leaves attention nearly flat: larger ones make mask errors visible.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.15)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model.train(), processor


def tiny_folder(family: str, path: Path | str, *, seed: int = 0) -> Path:
    """The model and its processor saved as an ordinary folder (safetensors); returns the folder."""
    model, processor = tiny_model(family, seed=seed)
    model.save_pretrained(path, safe_serialization=True)
    processor.save_pretrained(path)
    return Path(path)


def tiny_image(width: int = 28, height: int = 28, *, seed: int = 0) -> Image.Image:
    """A picture of coloured noise, RGB."""
    rng = random.Random(f"{width}x{height}:{seed}")
    return Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))


def tiny_messages(images: int, text: str = "what is in the image ?") -> list[dict]:
    """One user message with that many images before its text, as `apply_chat_template` takes it."""
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class TinyGroup:
    """One prompt as the processor gives it, with its responses as token ids."""

    prefix: list[int]
    responses: list[list[int]]
    vision: dict[str, Tensor]
    token_types: list[int]  # of the prefix: 0 text, 1 image, 2 video
    images: int


def tiny_groups(
    processor,
    k: Sequence[int] = (2, 3),
    seed: int = 0,
    *,
    images: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] = ((28, 28), (56, 28), (28, 56), (56, 56)),
    response_len: tuple[int, int] = (1, 7),
    prompts: Sequence[str] = ("what is in the image ?", "a cat and a dog on the mat . red square ?"),
) -> list[TinyGroup]:
    """One group per entry of `k`; the arguments are those of `tiny_batch`."""
    rng = random.Random(seed)
    images = [1] * len(k) if images is None else list(images)
    size = itertools.cycle(sizes)
    ordinary = ordinary_tokens(processor)
    groups = []
    for group, (count, number) in enumerate(zip(k, images, strict=True)):
        pictures = [tiny_image(*next(size), seed=rng.randrange(1 << 30)) for _ in range(number)]
        encoded = encode_prompt(processor, tiny_messages(number, prompts[group % len(prompts)]), pictures)
        responses = [[rng.choice(ordinary) for _ in range(rng.randint(*response_len))] for _ in range(count)]
        groups.append(TinyGroup(encoded[0], responses, encoded[1], encoded[2], number))
    return groups


def tiny_batch(model, processor, k: Sequence[int] = (2, 3), seed: int = 0, **options) -> GroupBatch:
    """A batch with one group per entry of `k` (its number of responses), made straight from the processor.

    `images` says how many images each group has (default: one each; 0 makes a text-only group); their sizes go round
    `sizes` (width, height). Responses have random lengths in `response_len`, inclusive, and random ordinary tokens.
    The first response of each group is the best; margins are 1.0; position_ids are left to the model layer.
    """
    return batch_of(tiny_groups(processor, k, seed, **options))


def batch_of(groups: Sequence[TinyGroup]) -> GroupBatch:
    """The GroupBatch of some groups."""
    layout = Layout(
        tuple(len(group.prefix) for group in groups),
        tuple(tuple(len(response) for response in group.responses) for group in groups),
    )
    responses = [response for group in groups for response in group.responses]
    targets = [token for response in responses for token in response]
    first = cumulative([len(group.responses) for group in groups]).tolist()
    pairs = [(first[g], first[g] + r) for g, group in enumerate(groups) for r in range(1, len(group.responses))]
    ids = [t for group in groups for t in (*group.prefix, *itertools.chain.from_iterable(group.responses))]
    return GroupBatch(
        input_ids=torch.tensor(ids),
        prefix_len=torch.tensor(layout.prefix_len),
        response_len=torch.tensor([len(response) for response in responses]),
        response_group=torch.tensor([g for g, group in enumerate(groups) for _ in group.responses]),
        rows=score_rows(layout),
        targets=torch.tensor(targets),
        token_weight=torch.ones(len(targets)),
        cu_seqlens=cumulative([len(response) for response in responses]),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        margin=torch.ones(len(pairs)),
        vision=merge_vision([group.vision for group in groups]),
        images_per_group=tuple(group.images for group in groups),
        ids=tuple(f"g{g}" for g in range(len(groups))),
        response_keys=tuple(f"g{g}#{r}" for g, group in enumerate(groups) for r in range(len(group.responses))),
    )


def encode_prompt(
    processor, messages: list[dict], pictures: list[Image.Image]
) -> tuple[list[int], dict[str, Tensor], list[int]]:
    """(prefix token ids with image tokens expanded, vision tensors, token types) of one prompt."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # transformers 5.4's Idefics3 cannot give token types to a prompt without images.
    extra = {"images": [pictures], "return_mm_token_type_ids": True} if pictures else {}
    out = processor(text=[text], return_tensors="pt", **extra)
    types = out.get("mm_token_type_ids", out.get("token_type_ids", torch.zeros_like(out["input_ids"])))
    ignored = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    vision = {key: torch.as_tensor(value) for key, value in out.items() if key not in ignored}
    return out["input_ids"][0].tolist(), vision, types[0].tolist()


def merge_vision(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Vision tensors of several prompts as one dict: joined along dim 0, zero-padded in the others."""
    merged: dict[str, Tensor] = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(groups)):
        pieces = [torch.as_tensor(group[key]) for group in groups if key in group]
        largest = [max(lengths) for lengths in zip(*(piece.shape for piece in pieces), strict=True)]
        padded = []
        for piece in pieces:
            full = piece.new_zeros(piece.shape[0], *largest[1:])
            full[tuple(slice(0, length) for length in piece.shape)] = piece
            padded.append(full)
        merged[key] = torch.cat(padded)
    return merged


def ordinary_tokens(processor) -> list[int]:
    """Token ids that are no marker of any kind."""
    tokenizer = processor.tokenizer
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    return [token for token in range(len(tokenizer)) if token not in special]


def read_json(path: Path) -> dict:
    """A JSON file as a dict."""
    return json.loads(path.read_text(encoding="utf-8"))
