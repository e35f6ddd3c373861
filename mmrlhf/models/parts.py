"""The parts of a transformers vision-language model, found once and named alike.

    whole    XForConditionalGeneration, with any PEFT or torch.compile wrapper taken off      base_model()
    inner    XModel: vision tower, projector and decoder, no lm_head                          inner_model()
    decoder  the text decoder                                                                 decoder()
    head     the last linear layer, as plain tensors and two numbers                          lm_head()

PEFT's LoRA layers sit inside `whole`, so they stay in force. Not covered: encoder-decoders, prompt-learning adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """What turns a hidden row into logits: softcap(logit_scale * (weight @ h) + bias); see `ops.linear_logp`."""

    weight: Tensor  # [V, H], the parameter itself (tied to the embeddings where the model ties them)
    bias: Tensor | None  # [V]
    logit_scale: float  # factor on weight @ h
    softcap: float | None  # z -> softcap * tanh(z / softcap)
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()  # (a [r, H], b [V, r], scale) of each LoRA in force

    def logits(self, hidden: Tensor) -> Tensor:  # [..., H] -> [..., V] float32
        """The logits themselves, as the model's own forward makes them: for checks and statistics, a few rows each."""

        def linear(rows: Tensor, matrix: Any, dtype: torch.dtype) -> Tensor:
            whole = matrix.full_tensor() if hasattr(matrix, "full_tensor") else matrix  # a DTensor, on every rank
            return nn.functional.linear(rows.to(dtype), whole.to(dtype))

        products = linear(hidden, self.weight, hidden.dtype)
        for a, b, scale in self.adapters:
            products = products + linear(linear(hidden, a, a.dtype), b, b.dtype) * scale
        logits = products.to(hidden.dtype).float() * self.logit_scale
        if self.bias is not None:
            logits = logits + self.bias.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def base_model(model: Any) -> Any:
    """The transformers model itself, without PEFT, torch.compile or data-parallel wrappers.

    Raises ValueError for prompt-learning adapters, which work outside the model and would be lost here.
    """
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise ValueError(
                    f"{model.active_peft_config.peft_type} adapters add tokens outside the model and are not "
                    "supported; use LoRA"
                )
            model = model.get_base_model()
        else:
            return model


def inner_model(model: nn.Module) -> Any:
    """The model without its lm_head (`whole.model`): its output is the last hidden state."""
    whole = base_model(model)
    inner = getattr(whole, whole.base_model_prefix, None) if hasattr(whole, "base_model_prefix") else None
    if inner is None or inner is whole:
        raise ValueError(f"{type(whole).__name__} has no separate model under its head; mmrlhf needs a causal LM")
    return inner


def decoder(model: nn.Module) -> Any:
    """The text decoder: `inner.language_model`, `inner.text_model`, or `inner` itself for a text-only model."""
    inner = inner_model(model)
    for name in ("language_model", "text_model"):
        if isinstance(getattr(inner, name, None), nn.Module):
            return getattr(inner, name)
    return inner


def text_config(model: nn.Module) -> Any:
    """The configuration of the decoder."""
    return base_model(model).config.get_text_config(decoder=True)


def vision_modules(model: nn.Module, *, projector: bool = True) -> list[tuple[str, nn.Module]]:
    """(name, module) of the children of `inner` that are not the decoder; towers only without `projector`."""
    inner, text = inner_model(model), decoder(model)
    if text is inner:
        return []
    towers = ("vision_tower", "visual", "vision_model", "vision_embed_tokens")
    return [
        (name, module)
        for name, module in inner.named_children()
        if module is not text and (projector or name in towers)
    ]


def vision_parameters(model: nn.Module, *, projector: bool = True) -> list[nn.Parameter]:
    """Parameters of `vision_modules`, and those that `inner` holds directly (such as `image_newline`)."""
    found = [p for _, module in vision_modules(model, projector=projector) for p in module.parameters()]
    inner = inner_model(model)
    if projector and decoder(model) is not inner:
        found += list(inner.parameters(recurse=False))
    return found


def lm_head(model: nn.Module) -> Head:
    """The output layer, as the tensors and numbers the ops take.

    Tied heads give the embedding's own parameter, PEFT's `modules_to_save` the copy that is trained, a LoRA the base
    layer's tensors and the factors of the adapters that are active now. An adapter that is no plain LoRA, a quantised
    head and an unknown kind of layer raise ValueError: computing with what can be read of them would be silently wrong.
    `shared_prefix.self_check` compares the result with the model's own logits.
    """
    whole = base_model(model)
    layer = whole.get_output_embeddings()
    if layer is None:
        raise ValueError(f"{type(whole).__name__} has no lm_head (get_output_embeddings() is None)")
    if hasattr(layer, "modules_to_save") and hasattr(layer, "active_adapter"):
        layer = layer.modules_to_save[layer.active_adapter]
    adapters: tuple[tuple[Tensor, Tensor, float], ...] = ()
    if hasattr(layer, "base_layer"):
        layer, adapters = layer.base_layer, _lora_factors(layer)
    weight: Any = getattr(layer, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() >= 2
    sharded = hasattr(layer, "unshard") and nn.Linear in type(layer).__bases__  # `fully_shard` derives its own class
    if not plain or not (type(layer) is nn.Linear or sharded):
        dtype = getattr(weight, "dtype", None)
        raise ValueError(
            f"lm_head is a {type(layer).__module__}.{type(layer).__name__} with weight {dtype}: a quantised or custom "
            "head is not supported; load the model with lm_head in bf16, fp16 or fp32 (for bitsandbytes: "
            'llm_int8_skip_modules=["lm_head"])'
        )
    scale, softcap = _logit_options(whole)
    return Head(weight, getattr(layer, "bias", None), scale, softcap, adapters)


def _lora_factors(layer: Any) -> tuple[tuple[Tensor, Tensor, float], ...]:
    """(a, b, scale) of each adapter that `peft.tuners.lora.Linear.forward` would add now; none where they are merged
    into the base layer or switched off. ValueError for what is more than that: the message says what."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    refusal = f"lm_head carries an adapter ({kind}) that the loss cannot see"
    if kind != "peft.tuners.lora.layer.Linear":
        raise ValueError(f"{refusal}: only a plain LoRA on a plain linear layer; leave lm_head out of its targets")
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise ValueError(f"{refusal}: it is merged into the weight and switched off at once; unmerge it first")
        return ()
    found = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if name in layer.lora_variant or layer.use_dora.get(name):
            raise ValueError(f"{refusal}: {name!r} is DoRA or another variant of LoRA; use plain LoRA there")
        if layer.lora_B[name].bias is not None:
            raise ValueError(f"{refusal}: {name!r} has a bias of its own (lora_bias); set it to false")
        trained = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
        if trained and getattr(layer.lora_dropout[name], "p", 0) > 0:
            raise ValueError(
                f"{refusal}: {name!r} is trained with a dropout of {layer.lora_dropout[name].p} before it; set "
                "lora_dropout to 0, or leave lm_head out of its targets"
            )
        found.append((a, b, float(layer.scaling[name])))
    return tuple(found)


def _logit_options(whole: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) that the model's own forward applies, from its configuration.

    Names by model: logit_scale (Cohere, multiplies), logits_scaling (Granite divides, HyperCLOVA X multiplies),
    lm_head_multiplier (Falcon-H1), output_multiplier (Muse), final_logit_softcapping (Gemma).
    """
    config = whole.config.get_text_config(decoder=True)
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(config, name, 1.0)
    divisor = _number(config, "logits_scaling", 1.0)
    scale = scale * divisor if "hyperclovax" in config.model_type else scale / divisor
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, float(softcap) if softcap else None


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{name} in the model's config must be a positive number, got {value!r}")
    return float(value)


def image_token_ids(config: Any) -> dict[str, int]:
    """{"image": id, "video": id} of the placeholder tokens a model's config names."""
    found = {}
    for kind in ("image", "video"):
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                found[kind] = value
                break
    return found


def parameter_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    return next(model.parameters()).device
