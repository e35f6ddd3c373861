"""Which decoders can share a prefix, found from the model itself, and the table of families that need more than that.

Packed rows are exact where every layer is causal attention, full or within a window. State that runs through the row
(linear attention, Mamba), cross-attention and soft-capped scores rule them out; attention that is bidirectional inside
a prefix does not, if it is known which tokens see each other: `IMAGE_BLOCKS`.
"""

from __future__ import annotations

import functools
import inspect
import sys

import torch
from torch import Tensor, nn

from mmrlhf.models.parts import base_model, decoder, image_token_ids, inner_model, text_config

# Families (by model_type) whose runs of image tokens attend to each other in both directions, inside an otherwise
# causal prefix. Others of the kind (PaliGemma, Gemma 4, Molmo 2) differ in more than that.
IMAGE_BLOCKS = ("gemma3",)


def can_share(model: nn.Module) -> tuple[bool, str]:
    """(whether packed rows are exact for this decoder, why or why not)."""
    config, inner, text = text_config(model), inner_model(model), decoder(model)
    if getattr(base_model(model).config, "is_encoder_decoder", False):
        return False, "it is an encoder-decoder"
    if getattr(config, "cross_attention_layers", None):
        return False, "its decoder attends to images by cross-attention"
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        return False, f"its decoder has {', '.join(odd)} layers, whose state runs through the whole row"
    if any(type(module).__name__.endswith(("Mamba", "Mixer2", "DeltaNet")) for module in text.modules()):
        return False, "its decoder has recurrent layers, whose state runs through the whole row"
    if getattr(config, "attn_logit_softcapping", None):
        return False, "its attention scores are soft-capped, which the packed attention does not do"
    rope = getattr(config, "rope_parameters", None) or {}
    # One dict, or one for each layer type.
    found = {str(each.get("rope_type")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    scaled = sorted(found & {"dynamic", "longrope"})
    if scaled:
        return False, f"its {', '.join(scaled)} positions depend on the batch's longest row"
    blocks = _bidirectional(type(inner))  # type: ignore[arg-type]
    if blocks and base_model(model).config.model_type not in IMAGE_BLOCKS:
        return False, "its image tokens attend to each other in both directions"
    if getattr(config, "use_bidirectional_attention", False):
        return False, "its text attends in both directions"
    if not getattr(text, "_supports_attention_backend", False):
        return False, f"{type(text).__name__} does not take its attention from transformers' registry"
    if blocks:
        return True, "every layer is causal attention but for image tokens, which a mask a prefix lets see each other"
    return True, "every layer is causal attention"


@functools.lru_cache(maxsize=64)
def _bidirectional(kind: type) -> bool:
    """Whether a model lets some tokens see ahead: it takes token types for its mask, or its file builds such masks.

    Read from the source, because no config says it; what this misses the self-check of the first batch finds.
    """
    if "token_type_ids" in inspect.signature(kind.forward).parameters:  # type: ignore[attr-defined]
        return True
    source = inspect.getsource(sys.modules[kind.__module__])
    return "block_sequence_ids" in source or "or_mask_function" in source


def image_blocks(model: nn.Module, input_ids: Tensor) -> Tensor | None:
    """[T] int64: the number of each run of image tokens, -1 for text; None for a model whose attention is causal."""
    config = base_model(model).config
    if config.model_type not in IMAGE_BLOCKS:
        return None
    is_image = input_ids == image_token_ids(config)["image"]
    starts = is_image.clone()
    starts[1:] &= ~is_image[:-1]
    return torch.where(is_image, starts.cumsum(0) - 1, -1)
