"""Models, processors and preference data for the whole-step benchmark, made from configs with random weights.

`small` has the shape of Qwen2.5-VL at 38 M parameters, so that a step of either trainer takes seconds on two cores;
`mini` (11 M) keeps its proportions for prompts of thousands of tokens, `tiny` is for tests. `qwen2_5_vl_7b` has the
published shape of the 7B model and is meant for a GPU. One image token covers 28 x 28 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

PATCH, MERGE = 14, 2
CELL = PATCH * MERGE  # pixels a side of one image token
MARKERS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Decoder and tower sizes of a benchmark model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tower_hidden: int
    tower_depth: int
    tower_mlp: int
    tower_heads: int
    full_blocks: tuple[int, ...]  # tower blocks that attend to the whole picture; the others to windows of 4 x 4 tokens

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    "tiny": Shape(32, 2, 2, 1, 64, 512, 32, 2, 48, 2, (1,)),
    "mini": Shape(256, 4, 4, 2, 704, 16000, 128, 3, 256, 2, (2,)),
    "small": Shape(384, 6, 6, 2, 1024, 32000, 256, 4, 512, 4, (3,)),
    "qwen2_5_vl_7b": Shape(3584, 28, 28, 4, 18944, 152064, 1280, 32, 3420, 16, (7, 15, 23, 31)),
}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def build_processor(max_image_tokens: int = 4096):
    """A Qwen2.5-VL processor with a byte-level tokenizer and an ordinary chat template; images only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from mmrlhf.models.processors import build_video_processor, processor_scope

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", *MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator(["what is in the picture ?"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=engine,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=MARKERS,
        padding_side="left",
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": CELL * CELL, "longest_edge": CELL * CELL * max_image_tokens},
    )
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": PATCH, "merge_size": MERGE}
    with processor_scope():
        return Qwen2_5_VLProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=build_video_processor(video, images),
            chat_template=TEMPLATE,
        )


def build_model(name: str, processor, *, dtype: torch.dtype = torch.float32, seed: int = 0):
    """A Qwen2.5-VL of one of SHAPES with random weights and a frozen tower, on the default device (`with device:`)."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = build_config(SHAPES[name], processor)
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(previous)
    model.model.visual.requires_grad_(False)
    return model


def with_lora(model: Any, *, seed: int = 0) -> Any:
    """Adapters of rank 16 on the decoder's linear layers; the tower is frozen already, everything else becomes so."""
    from peft import get_peft_model

    adapted = get_peft_model(model, lora_config())
    seed_adapters(adapted, seed)
    return adapted


def seed_adapters(model: Any, seed: int = 0) -> None:
    """Draw the adapters' first matrices anew, so that two trainers that made their own start from the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            bound = parameter.shape[1] ** -0.5  # PEFT's own: kaiming_uniform_ with a = sqrt(5)
            drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
            parameter.data.copy_(drawn)


def lora_config() -> Any:
    """The PEFT configuration of `with_lora`."""
    from peft import LoraConfig

    decoder = r".*language_model.*\.(" + "|".join(ADAPTED) + ")"
    return LoraConfig(r=16, lora_alpha=32, target_modules=decoder, lora_dropout=0.0)


def build_config(shape: Shape, processor) -> Any:
    """The Qwen2_5_VLConfig of a shape, with the special tokens of `processor`."""
    from transformers import Qwen2_5_VLConfig

    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    half = shape.head_dim // 2
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocab,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],  # 16, 24, 24 at head size 128
            },
            **special,
        },
        vision_config={
            "depth": shape.tower_depth,
            "hidden_size": shape.tower_hidden,
            "intermediate_size": shape.tower_mlp,
            "num_heads": shape.tower_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": CELL * 4,
            "fullatt_block_indexes": list(shape.full_blocks),
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
        **special,
    )


def build_records(groups: int, *, image_tokens: int, response_tokens: int, k: int, seed: int = 0) -> list[dict]:
    """`groups` prompts with a random picture of about `image_tokens` tokens and K ranked answers, best first.

    The byte-level tokenizer gives one token a letter for text it has not seen, so lengths are known.
    """
    import random

    import numpy as np
    from PIL import Image

    rng = random.Random(seed)
    pixels = np.random.default_rng(seed)
    side = max(1, round(image_tokens**0.5))
    records = []
    for index in range(groups):
        picture = pixels.integers(0, 256, (side * CELL, side * CELL, 3), dtype=np.uint8)
        answers = [
            "".join(rng.choice("BDGJKLMQVXZ") for _ in range(round(response_tokens * rng.uniform(0.8, 1.2)) - 1))
            for _ in range(k)
        ]
        records.append(
            {"id": f"g{index}", "image": Image.fromarray(picture), "prompt": "QXZ" * 4, "responses": answers}
        )
    return records
