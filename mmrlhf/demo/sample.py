"""Captions from the model: greedy or drawn at a temperature, many pictures at once.

Every prompt is the same question, so a batch needs no padding; a picture's prefix is computed once and its keys
and values are repeated for all its samples. Randomness comes from a generator of its own: the global state is neither
read nor changed. Not covered: other prompts (`mmrlhf.models.generate` answers any).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmrlhf.demo.base import image_inputs, prompt_ids, special_ids

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

BATCH = 50  # pictures at once
MAX_TOKENS = 40  # the longest true caption, four objects, has 28


def captions(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    images: np.ndarray,  # [count, 3, 48, 48] uint8
    *,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """`samples` captions of each picture; temperature 0 is greedy. Image, padding and turn tokens never come out.

    Raises ValueError for a negative temperature, or for several samples at temperature 0 (they would be equal).
    """
    import torch

    if temperature < 0 or samples < 1 or (samples > 1 and temperature == 0):
        raise ValueError(f"{samples} samples at temperature {temperature}: several need a temperature above 0")
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.tensor(prompt_ids(tokenizer))
    banned = torch.tensor(special_ids(tokenizer))
    end = tokenizer.eos_token_id
    texts: list[str] = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = images[start : start + BATCH]
            output = model(
                input_ids=prompt.expand(len(batch), -1), **image_inputs(batch), use_cache=True, logits_to_keep=1
            )
            cache = output.past_key_values
            cache.batch_repeat_interleave(samples)
            logits = output.logits[:, -1].repeat_interleave(samples, dim=0)  # [B·samples, V]
            rows = [torch.empty(len(batch) * samples, 0, dtype=torch.int64)]
            finished = torch.zeros(len(batch) * samples, dtype=torch.bool)
            for _ in range(MAX_TOKENS):
                logits = logits.float().index_fill(-1, banned, float("-inf"))
                if temperature == 0:
                    token = logits.argmax(-1)
                else:
                    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
                token = torch.where(finished, end, token)
                rows.append(token[:, None])
                finished |= token == end
                if finished.all():
                    break
                logits = model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
            texts += tokenizer.batch_decode(torch.cat(rows, dim=1), skip_special_tokens=True)
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]
