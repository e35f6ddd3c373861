"""A dummy picture through the vision tower, for a rank whose batch has none.

Data parallelism runs the same collectives on every rank: DDP waits for a gradient of every parameter, FSDP and ZeRO-3
gather the tower's shards whenever a rank runs it. A rank whose micro-batch is text alone would leave the others
waiting. So it encodes the smallest picture the model takes, and adds 0 times its features to the embeddings: the
values are unchanged, the tower's gradients are zeros instead of None, and the backward passes the tower where it does
on the other ranks, after the decoder. Not covered: ranks of which some have images and some images and native videos;
they must name both kinds in `vision.encode(touch=...)`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.models.parts import vision_modules, vision_parameters


def needed(model: nn.Module) -> bool:
    """Whether a batch without pictures must touch the tower: several ranks, and it is sharded or gets gradients."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if torch.distributed.get_world_size() == 1:
        return False
    parameters = vision_parameters(model)
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    return trained or is_sharded(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether running the tower gathers its weights from other ranks: FSDP (1 or 2), ZeRO-3."""
    modules = [part for _, module in vision_modules(model) for part in module.modules()]
    wrapped = any(hasattr(m, "unshard") or type(m).__name__ == "FullyShardedDataParallel" for m in modules)
    # DTensor: sharded by a parent's fully_shard. ds_id: DeepSpeed's mark on a parameter of ZeRO-3.
    return wrapped or any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in vision_parameters(model))


def inputs(inner: Any, kinds: Sequence[str] = ("image",)) -> dict[str, Tensor]:
    """The smallest picture of each kind ("image", "video") that `inner` takes, as its processor's tensors.

    Pixels are ones: Idefics 3 drops tiles of zeros. Raises ValueError for a kind the model does not take.
    """
    device = next(inner.parameters()).device
    found: dict[str, Tensor] = {}
    for kind in kinds:
        function = getattr(inner, f"get_{kind}_features", None)
        if function is None:
            raise ValueError(f"{type(inner).__name__} takes no {kind}s, so there is no dummy for one")
        made = _image(inner, function) if kind == "image" else _video(inner, function)
        found |= {name: value.to(device) for name, value in made.items()}
    return found


def _image(inner: Any, function: Any) -> dict[str, Tensor]:
    """By what the model's `get_image_features` takes, which is what its families differ in."""
    config, known = inner.config.vision_config, inspect.signature(function).parameters
    if "image_grid_thw" in known:  # Qwen-VL, GLM-4.1V: one merged patch
        patches, grid = _patches(config)
        return {"pixel_values": patches, "image_grid_thw": grid}
    patch = _edge(config.patch_size)
    if config.model_type == "pixtral":  # also Mistral 3, which squeezes a lone merged patch away: two of them
        edge = patch * getattr(inner.config, "spatial_merge_size", 1)
        return {"pixel_values": torch.ones(1, 3, edge, 2 * edge), "image_sizes": torch.tensor([[edge, 2 * edge]])}
    if "pixel_attention_mask" in known:  # Idefics 3, SmolVLM: any size, in steps of a shuffled patch
        edge = patch * inner.config.scale_factor
        return {"pixel_values": torch.ones(1, 1, 3, edge, edge)}
    edge = _edge(config.image_size)
    if getattr(inner.config, "image_grid_pinpoints", None):  # LLaVA-NeXT, LLaVA-OneVision: as many tiles as it cuts
        module: Any = sys.modules[type(inner).__module__]
        tiles = module.image_size_to_num_patches((edge, edge), inner.config.image_grid_pinpoints, edge)
        return {"pixel_values": torch.ones(1, tiles, 3, edge, edge), "image_sizes": torch.tensor([[edge, edge]])}
    return {"pixel_values": torch.ones(1, 3, edge, edge)}


def _video(inner: Any, function: Any) -> dict[str, Tensor]:
    config = inner.config.vision_config
    if "video_grid_thw" in inspect.signature(function).parameters:
        patches, grid = _patches(config)
        return {"pixel_values_videos": patches, "video_grid_thw": grid}
    edge = _edge(config.image_size)
    return {"pixel_values_videos": torch.ones(1, 1, 3, edge, edge)}


def _patches(config: Any) -> tuple[Tensor, Tensor]:
    """One merged patch as rows of pixels, and its grid."""
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    merge = config.spatial_merge_size
    width = channels * config.temporal_patch_size * config.patch_size**2
    return torch.ones(merge * merge, width), torch.tensor([[1, merge, merge]])


def _edge(size: Any) -> int:
    """The longer edge of a size that configs give as a number or a pair."""
    return max(size) if isinstance(size, (list, tuple)) else int(size)
