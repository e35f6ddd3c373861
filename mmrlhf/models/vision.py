"""Every image through the vision tower once, whatever follows.

`encode` runs `get_image_features` (and `get_video_features`) on a batch's images and keeps one flat tensor of
features, a row a placeholder token, in the order of the tokens. The decoder gets them through `mm_encoder_outputs`
(transformers >= 5.18) or scattered into the embeddings (older). A frozen tower runs under no_grad and its features
serve the policy, the reference and every response; a trained one runs with gradients, once a batch.

Inputs are the processor's tensors joined along dim 0 and zero-padded in the others (`GroupBatch.vision`). Not covered:
cross-attention models (Mllama), whose images are not placeholder tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import GroupBatch
from mmrlhf.models.parts import decoder, image_token_ids, inner_model, vision_parameters

_POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")  # read by get_rope_index as well
PER_TOKEN = ("mm_token_type_ids", "token_type_ids", "attention_mask")  # recomputed from input_ids where needed


@dataclass(frozen=True)
class Encoded:
    """Features of one kind of input, a row for each of its placeholder tokens, in token order."""

    tokens: Tensor  # [n, H]
    deepstack: tuple[Tensor, ...] = ()  # Qwen3-VL: one [n, H] for each of the first decoder layers
    as_list: bool = True  # whether this model's pooler_output is a list of tensors or one tensor

    def select(self, index: Tensor) -> Encoded:
        """Some rows, in the order of `index` [m] int64."""
        return Encoded(self.tokens[index], tuple(layer[index] for layer in self.deepstack), self.as_list)

    def as_encoder_output(self) -> SimpleNamespace:
        """What `mm_encoder_outputs["image"]` must look like."""
        pooled = (self.tokens,) if self.as_list else self.tokens
        return SimpleNamespace(pooler_output=pooled, deepstack_features=[(layer,) for layer in self.deepstack])


@dataclass(frozen=True)
class VisionFeatures:
    """Features of a whole batch; both None for a batch of text."""

    image: Encoded | None = None
    video: Encoded | None = None

    def items(self) -> list[tuple[str, Encoded]]:
        """(kind, features) of the kinds that are there."""
        pairs = (("image", self.image), ("video", self.video))
        return [(kind, encoded) for kind, encoded in pairs if encoded is not None]


def freeze(model: nn.Module, *, projector: bool = True) -> int:
    """Take the vision tower (and, with `projector`, all between it and the decoder) out of training.

    Returns how many parameters were frozen. Without `projector` features still need gradients, and cannot be shared
    with a reference model.
    """
    parameters = vision_parameters(model, projector=projector)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in parameters)


def is_trained(model: nn.Module) -> bool:
    """Whether any parameter between pixels and decoder asks for gradients."""
    return any(parameter.requires_grad for parameter in vision_parameters(model))


def encode(model: nn.Module, batch: GroupBatch, *, grad: bool = False) -> VisionFeatures:
    """Features of every image and video of a batch, each encoded once.

    Without `grad` they carry no gradient, and may be given to `response_hidden` for any model with the same frozen
    tower, any number of times. Raises ValueError if the batch has vision inputs the model does not take, or features
    and placeholder tokens do not match in number.
    """
    inputs = {key: value for key, value in batch.vision.items() if key not in PER_TOKEN}
    if not inputs:
        return VisionFeatures()
    inner = inner_model(model)
    pooled = sorted(key for key in inputs if key.endswith("_token_pooling"))
    if pooled:
        raise ValueError(
            f"the batch's {pooled[0]} numbers the patches of one processor call, which joined prompts would mix up: "
            f"{type(inner).__name__} (Molmo 2) is not supported"
        )
    kinds = {"image": ("get_image_features", "pixel_values"), "video": ("get_video_features", "pixel_values_videos")}
    found: dict[str, Encoded] = {}
    used = set(_POSITION_INPUTS)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        for kind, (method, pixels) in kinds.items():
            if pixels not in inputs:
                continue
            function = getattr(inner, method, None)
            if function is None:
                raise ValueError(
                    f"the batch has {pixels}, but {type(inner).__name__} has no {method}: it takes no {kind}s, or "
                    "takes them by cross-attention, which is not supported"
                )
            known = set(inspect.signature(function).parameters)
            if "kwargs" in known and kind == "image":  # older Llava hands Pixtral's sizes on without naming them
                known |= {"image_sizes"} & set(inspect.signature(inner.forward).parameters)
            arguments = {key: value for key, value in inputs.items() if key in known}
            used |= set(arguments)
            arguments[pixels] = _as_parameters(arguments[pixels], inner)
            found[kind] = _flatten(function(**arguments, return_dict=True))
    unused = sorted(set(inputs) - used)
    if unused:
        raise ValueError(
            f"the batch's vision inputs {', '.join(unused)} are not used by {type(inner).__name__}: "
            "processor and model do not belong together"
        )
    features = VisionFeatures(**found)
    _check_counts(model, batch, features)
    return features


def takes_encoder_outputs(inner: Any) -> bool:
    """Whether this transformers version's forward takes `mm_encoder_outputs` (5.18 and later)."""
    return "mm_encoder_outputs" in inspect.signature(inner.forward).parameters


def decoder_inputs(model: nn.Module, input_ids: Tensor, features: VisionFeatures) -> tuple[Any, dict[str, Any]]:
    """(module to call, its keyword arguments) that put features in the place of their tokens.

    `input_ids` is [B, S]; features are in the order of its placeholder tokens, row by row.
    """
    inner = inner_model(model)
    if not features.items():
        return inner, {"input_ids": input_ids}
    if takes_encoder_outputs(inner):
        outputs = {kind: encoded.as_encoder_output() for kind, encoded in features.items()}
        return inner, {"input_ids": input_ids, "mm_encoder_outputs": outputs}
    return _scattered(model, input_ids, features)


def _scattered(model: nn.Module, input_ids: Tensor, features: VisionFeatures) -> tuple[Any, dict[str, Any]]:
    """The same for transformers < 5.18: features scattered into the embeddings."""
    inner = inner_model(model)
    embeddings = inner.get_input_embeddings()(input_ids)  # [B, S, H]
    ids = image_token_ids(inner.config)
    masks = {kind: input_ids == ids[kind] for kind, _ in features.items()}
    for kind, encoded in features.items():
        embeddings = embeddings.masked_scatter(masks[kind][..., None], encoded.tokens.to(embeddings))
    if not any(encoded.deepstack for _, encoded in features.items()):
        return inner, {"inputs_embeds": embeddings}
    visual = torch.stack(list(masks.values())).any(0)  # [B, S]
    layers = []
    for layer in range(max(len(encoded.deepstack) for _, encoded in features.items())):
        joint = embeddings.new_zeros(embeddings.shape)  # [B, S, H]
        for kind, encoded in features.items():
            joint = joint.masked_scatter(masks[kind][..., None], encoded.deepstack[layer].to(joint))
        layers.append(joint[visual])
    return decoder(model), {
        "inputs_embeds": embeddings,
        "visual_pos_masks": visual,
        "deepstack_visual_embeds": layers,
    }


def _flatten(output: Any) -> Encoded:
    """Encoder output to flat rows. Families give a list of [n_i, H], one [n, H], or one [images, n, H]."""
    pooled = output.pooler_output
    as_list = isinstance(pooled, (list, tuple))
    tokens = torch.cat([piece.flatten(0, -2) for piece in pooled]) if as_list else pooled.flatten(0, -2)
    layers = getattr(output, "deepstack_features", None) or ()
    deepstack = tuple(torch.cat(list(layer)) if isinstance(layer, (list, tuple)) else layer for layer in layers)
    return Encoded(tokens, deepstack, as_list)


def _as_parameters(pixels: Tensor, inner: Any) -> Tensor:
    """Pixels in the dtype of the vision tower (some families cast by themselves, some do not)."""
    return pixels.to(inner.dtype) if pixels.is_floating_point() else pixels


def _check_counts(model: nn.Module, batch: GroupBatch, features: VisionFeatures) -> None:
    ids = image_token_ids(inner_model(model).config)
    for kind, encoded in features.items():
        if kind not in ids:
            raise ValueError(f"the batch has {kind}s, but the model's config names no {kind} token")
        tokens = int((batch.input_ids == ids[kind]).sum())
        if tokens != encoded.tokens.shape[0]:
            raise ValueError(
                f"{tokens} {kind} tokens but {encoded.tokens.shape[0]} {kind} features in the batch of groups "
                f"{', '.join(batch.ids) or '(no ids)'}: processor and model disagree, or a prompt was cut"
            )
