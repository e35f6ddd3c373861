"""Every image through the vision tower once, whatever follows.

`encode` runs `get_image_features` (and `get_video_features`) on a batch's images and keeps one flat tensor of
features, a row a placeholder token, in the order of the tokens. The decoder gets them through `mm_encoder_outputs`
(transformers >= 5.18) or scattered into the embeddings (older). A frozen tower runs under no_grad and its features
serve the policy, the reference and every response; a trained one runs with gradients, once a batch.

Inputs are the processor's tensors joined along dim 0 and zero-padded in the others (`GroupBatch.vision`), or each
prompt's kept to themselves (`apart`): then a prompt's features do not depend on what shares its batch, to the last
bit, and some of them may have been computed before. The prompt is the unit, not the image, because LLaVA-OneVision
cuts tiles by how many images a prompt has. Not covered: cross-attention models (Mllama), whose images are not
placeholder tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import GroupBatch
from mmrlhf.models import dummy, tower
from mmrlhf.models.parts import decoder, image_token_ids, inner_model, vision_parameters

POSITION_INPUTS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")  # read by get_rope_index as well
PER_TOKEN = ("mm_token_type_ids", "token_type_ids", "attention_mask")  # recomputed from input_ids where needed
_KINDS = {"image": ("get_image_features", "pixel_values"), "video": ("get_video_features", "pixel_values_videos")}


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
    touch: Tensor | None = None  # [] a zero that depends on the tower, of a batch without pictures; see `dummy`

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


def apart(prompts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """`GroupBatch.vision` in which each prompt's tensors are its own: the processor's outputs, or `pack`ed features.

    One mapping a group, in order, empty for one of text. The caller adds what positions are read from
    (`POSITION_INPUTS`) joined for the whole batch, as `collate` does.
    """
    return {f"prompt{n}/{name}": tensor for n, prompt in enumerate(prompts) for name, tensor in prompt.items()}


def pack(features: VisionFeatures) -> dict[str, Tensor]:
    """Features as named tensors on the CPU: "image/list/0" are the tokens, 1, 2, … the deepstack layers."""
    return {
        f"{kind}/{'list' if encoded.as_list else 'one'}/{layer}": rows.detach().cpu()
        for kind, encoded in features.items()
        for layer, rows in enumerate((encoded.tokens, *encoded.deepstack))
    }


def unpack(tensors: Mapping[str, Tensor]) -> VisionFeatures:
    """What `pack` was given."""
    found: dict[str, dict[int, Tensor]] = {}
    as_list: dict[str, bool] = {}
    for name, rows in tensors.items():
        kind, form, layer = name.split("/")
        found.setdefault(kind, {})[int(layer)] = rows
        as_list[kind] = form == "list"
    made: dict[str, Any] = {
        kind: Encoded(layers[0], tuple(layers[n] for n in range(1, len(layers))), as_list[kind])
        for kind, layers in found.items()
    }
    return VisionFeatures(**made)


def encode(
    model: nn.Module,
    batch: GroupBatch,
    *,
    grad: bool = False,
    computed: Callable[[int, VisionFeatures], None] | None = None,
    touch: Sequence[str] | None = None,
) -> VisionFeatures:
    """Features of every image and video of a batch, each encoded once.

    Without `grad` they carry no gradient, and may be given to `response_hidden` for any model with the same frozen
    tower, any number of times. `computed` is told the number of each prompt of an `apart` batch that went through the
    tower, and its features. `touch`: kinds ("image", "video") that run through the tower in any case, on a dummy where
    the batch has none, so that all ranks do the same collectives; None: "image" for a batch without pictures, where
    `dummy.needed` says so. Raises ValueError if the batch has vision inputs the model does not take, or features and
    placeholder tokens do not match in number.
    """
    inputs = {key: value for key, value in batch.vision.items() if key not in PER_TOKEN}
    inner = inner_model(model)
    tower.install(model)
    with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
        if any(key.startswith("prompt") for key in inputs):
            features = _encode_apart(inner, inputs, computed)
        else:
            features = _run(inner, inputs)
        _check_counts(model, batch, features)
        if touch is None:
            touch = ("image",) if not features.items() and dummy.needed(model) else ()
        missing = [kind for kind in touch if getattr(features, kind) is None]
        if missing:
            features = dataclasses.replace(features, touch=_touch(inner, missing))
    return features


def _encode_apart(
    inner: Any, inputs: Mapping[str, Tensor], computed: Callable[[int, VisionFeatures], None] | None
) -> VisionFeatures:
    """Each prompt by itself, or from what was computed before."""
    prompts: dict[int, dict[str, Tensor]] = {}
    for key, value in inputs.items():
        number, _, name = key.partition("/")
        if name:
            prompts.setdefault(int(number.removeprefix("prompt")), {})[name] = value
    found = []
    for prompt, tensors in sorted(prompts.items()):
        if any("/" in name for name in tensors):
            found.append(unpack(tensors))
            continue
        found.append(_run(inner, tensors))
        if computed is not None:
            computed(prompt, found[-1])
    return _join(found)


def _join(found: Iterable[VisionFeatures]) -> VisionFeatures:
    """Features of prompts, in order, as those of their batch."""
    joined: dict[str, Any] = {}
    for kind in _KINDS:
        pieces = [getattr(features, kind) for features in found if getattr(features, kind) is not None]
        if pieces:
            deepstack = tuple(torch.cat(layer) for layer in zip(*(piece.deepstack for piece in pieces), strict=True))
            joined[kind] = Encoded(torch.cat([piece.tokens for piece in pieces]), deepstack, pieces[0].as_list)
    return VisionFeatures(**joined)


def _run(inner: Any, inputs: Mapping[str, Tensor]) -> VisionFeatures:
    """Processor outputs through the tower and all that lies between it and the decoder."""
    if not inputs:
        return VisionFeatures()
    pooled = sorted(key for key in inputs if key.endswith("_token_pooling"))
    if pooled:
        raise ValueError(
            f"the batch's {pooled[0]} numbers the patches of one processor call, which joined prompts would mix up: "
            f"{type(inner).__name__} (Molmo 2) is not supported"
        )
    found: dict[str, Any] = {}
    used = set(POSITION_INPUTS)
    for kind, (method, pixels) in _KINDS.items():
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
        if kind == "video" and pixels not in known:
            function, known = functools.partial(_videos_and_newlines, inner), {pixels}
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
    return VisionFeatures(**found)


def _videos_and_newlines(inner: Any, pixel_values_videos: Tensor, return_dict: bool) -> Any:
    """`get_video_features` of LLaVA-OneVision in transformers < 5.18, which left each video's newline to forward."""
    if inner.config.model_type != "llava_onevision":
        raise ValueError(
            f"{type(inner).__name__}.get_video_features takes no pixel_values_videos in this version of transformers: "
            "its videos are not supported"
        )
    output = inner.get_video_features(pixel_values_videos, return_dict=return_dict)
    videos = output.pooler_output  # [videos, n, H]
    newlines = inner.image_newline.to(videos).expand(len(videos), 1, -1)
    output.pooler_output = torch.cat([videos, newlines], dim=1)
    return output


def _touch(inner: Any, kinds: Sequence[str]) -> Tensor:
    """[] 0, with a graph through the tower; every feature takes part, so every parameter gets its (zero) gradient."""
    total = torch.zeros((), device=next(inner.parameters()).device)
    for _, encoded in _run(inner, dummy.inputs(inner, kinds)).items():
        for rows in (encoded.tokens, *encoded.deepstack):
            total = total + torch.nan_to_num(rows.float()).sum()  # its gradient is 0 where a row is not finite
    return total * 0.0


def takes_encoder_outputs(inner: Any) -> bool:
    """Whether this transformers version's forward takes `mm_encoder_outputs` (5.18 and later)."""
    return "mm_encoder_outputs" in inspect.signature(inner.forward).parameters


def decoder_inputs(model: nn.Module, input_ids: Tensor, features: VisionFeatures) -> tuple[Any, dict[str, Any]]:
    """(module to call, its keyword arguments) that put features in the place of their tokens.

    `input_ids` is [B, S]; features are in the order of its placeholder tokens, row by row.
    """
    inner = inner_model(model)
    if features.touch is not None:  # among the embeddings, where an image's gradient would come from
        return _scattered(model, input_ids, features)
    if not features.items():
        return inner, {"input_ids": input_ids}
    if takes_encoder_outputs(inner):
        outputs = {kind: encoded.as_encoder_output() for kind, encoded in features.items()}
        return inner, {"input_ids": input_ids, "mm_encoder_outputs": outputs}
    return _scattered(model, input_ids, features)


def _scattered(model: nn.Module, input_ids: Tensor, features: VisionFeatures) -> tuple[Any, dict[str, Any]]:
    """The same for transformers < 5.18, and with a `touch`: features scattered into the embeddings."""
    inner = inner_model(model)
    embeddings = inner.get_input_embeddings()(input_ids)  # [B, S, H]
    if features.touch is not None:
        embeddings = embeddings + features.touch.to(embeddings.dtype)
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
