"""Answers from a model under training, for samples and evaluation.

Prompts are batched with padding on the left and decoded with the model's own cache; markers that only a prompt may
contain (image, video and pad tokens) are never emitted. The model is in eval mode inside, and afterwards as it was:
training modes, cached rope offsets, random state. A decoder whose attention was set to `mmrlhf` generates through
its sdpa fallback. All processes of a sharded model (FSDP2) ask it the same. Not covered: videos, beam search.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mmrlhf.models.parts import base_model, image_token_ids, inner_model, parameter_device

Prompt = tuple[Sequence[Any], Sequence[Any]]  # (messages, PIL images in the order of their parts)


def answer(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[str]:
    """Greedy answers, one a prompt, deterministic.

    A prompt is (messages, images): messages as `apply_chat_template` takes them, or `data.schema.Message`s; images
    as PIL images in the order of their parts. Raises ValueError if their numbers differ.
    """
    return _generate(model, processor, prompts, batch_size, {"do_sample": False, "max_new_tokens": max_new_tokens})


def sample(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[list[str]]:
    """`n` answers a prompt drawn at a temperature from the whole distribution (no top-k, no top-p).

    The same arguments give the same answers; the caller's random state is left alone.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}; use answer() for greedy decoding")
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n!r}")
    device = parameter_device(model)
    options = {
        "do_sample": True,
        "temperature": float(temperature),
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": max_new_tokens,
    }
    # A prompt is repeated rather than expanded by generate: some families expand several images a prompt wrongly.
    repeated = [prompt for prompt in prompts for _ in range(n)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        flat = _generate(model, processor, repeated, batch_size, options)
    return [flat[start : start + n] for start in range(0, len(flat), n)]


def suppressed_tokens(model: nn.Module, processor: Any) -> list[int]:
    """Ids that an answer may never contain: placeholders, pad, and the markers around images; never end of text."""
    whole = base_model(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    rows = whole.get_output_embeddings().weight.shape[0]
    found = set(image_token_ids(whole.config).values()) | {tokenizer.pad_token_id}
    for name in ("vision_start_token_id", "vision_end_token_id", "boi_token_id", "eoi_token_id"):
        found |= {getattr(owner, name, None) for owner in (whole.config, processor, tokenizer)}
    for name, token in vars(processor).items():  # fake_image_token, global_image_token, start_image_token, …
        if name.endswith("_token") and isinstance(token, str) and ("image" in name or "video" in name):
            found.add(tokenizer.convert_tokens_to_ids(token))
    return sorted(t for t in found if isinstance(t, int) and 0 <= t < rows and t not in end_tokens(whole, tokenizer))


def _generate(
    model: nn.Module, processor: Any, prompts: Sequence[Prompt], batch_size: int, options: dict[str, Any]
) -> list[str]:
    if options["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {options['max_new_tokens']!r}")
    from transformers import GenerationConfig

    whole = base_model(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token (pad_token_id is None), which batched generation needs")
    settings = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(whole, tokenizer) or None,
        suppress_tokens=suppressed_tokens(model, processor) or None,
        use_cache=True,
        **options,
    )
    plain = [(to_messages(messages), list(images)) for messages, images in prompts]
    for index, (messages, images) in enumerate(plain):
        places = sum(part.get("type") == "image" for message in messages for part in _parts(message))
        if places != len(images):
            raise ValueError(f"prompt {index} has {places} image parts but {len(images)} images")
    answers: list[str] = [""] * len(plain)
    with torch.no_grad(), _evaluating(whole):
        # Prompts of text alone go apart from those with images: processors refuse a mixed list.
        for with_images in (True, False):
            order = [index for index, (_, images) in enumerate(plain) if bool(images) == with_images]
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                inputs = _inputs(processor, [plain[index] for index in chosen], parameter_device(model), whole.dtype)
                out = whole.generate(**inputs, generation_config=settings)
                new = out[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(new, skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text.strip()
    return answers


def to_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages as plain dicts: dicts as they are, `data.schema.Message`s turned into them."""
    out = []
    for message in messages:
        if isinstance(message, dict):
            out.append(message)
            continue
        parts = [
            {"type": "text", "text": part.text} if part.type == "text" else {"type": part.type}
            for part in message.content
        ]
        out.append({"role": message.role, "content": parts})
    return out


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [] if isinstance(content, str) else content


def _inputs(processor: Any, prompts: list[tuple[list, list]], device: torch.device, dtype: torch.dtype) -> Any:
    """Left-padded model inputs of prompts that all have images, or none."""
    texts = [
        processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) for messages, _ in prompts
    ]
    tokenizer = getattr(processor, "tokenizer", processor)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    try:
        images = {"images": [images for _, images in prompts]} if prompts[0][1] else {}
        inputs = processor(text=texts, padding=True, return_tensors="pt", **images)
    finally:
        tokenizer.padding_side = side
    from transformers import BatchFeature

    # A bare tokenizer gives a BatchEncoding, which takes no dtype; BatchFeature casts floating point entries only.
    return BatchFeature(dict(inputs)).to(device, dtype)


def end_tokens(whole: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the model's own, and the tokenizer's."""
    own = getattr(getattr(whole, "generation_config", None), "eos_token_id", None)
    listed = list(own) if isinstance(own, (list, tuple)) else [own]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if token is not None})


@contextlib.contextmanager
def _evaluating(whole: Any) -> Iterator[None]:
    """Every module in eval mode inside; modes and rope offsets restored after."""
    modes = [(module, module.training) for module in whole.modules()]
    inner = inner_model(whole)
    deltas = getattr(inner, "rope_deltas", None)
    whole.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = deltas
