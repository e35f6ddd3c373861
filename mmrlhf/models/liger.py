"""Liger's layer kernels in the decoder: RMSNorm, SwiGLU or GeGLU, rotary embedding. Not its losses.

Module instances are patched, as liger-kernel's own `apply_liger_kernel_to_*` do with `model=`. Those also patch names
in transformers' modules, which every later model of a family would inherit, have none for LLaVA-OneVision and
LLaVA-NeXT, and for Qwen-VL import names that transformers 5 no longer has; so here a table says what a decoder takes.
A rotary function cannot belong to an instance: the patched one serves CUDA tensors and leaves others to the original.
The packed attention comes after it, untouched: cos and sin are those of the batch's own positions, mRoPE's too.

Not covered: the vision tower, which is frozen more often than not; MoE decoders.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmrlhf.models.parts import base_model, decoder, parameter_device

_MARK = "_mmrlhf_liger"
_PROJECTIONS = {"LigerSwiGLUMLP": "gate_proj", "LigerGEGLUMLP": "gate_proj", "LigerPhi3SwiGLUMLP": "gate_up_proj"}
_ACTIVATIONS = {"LigerGEGLUMLP": ("gelu_pytorch_tanh",)}  # the others: silu
_ROTARY = {
    "apply_rotary_pos_emb": "liger_rotary_pos_emb",
    "apply_multimodal_rotary_pos_emb": "liger_multimodal_rotary_pos_emb",  # older Qwen-VL
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kernels:
    """What a kind of decoder takes."""

    mlp: str = "LigerSwiGLUMLP"
    offset: float = 0.0  # of the norm's weight: Gemma scales by 1 + weight
    casting: str = "llama"
    rotary: bool = True  # halves of a head, all of it


_DECODERS = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_vl"), _Kernels()),
    "gemma3": _Kernels(mlp="LigerGEGLUMLP", offset=1.0, casting="gemma"),
    "glm4v": _Kernels(mlp="LigerPhi3SwiGLUMLP", rotary=False),  # rotates neighbours, not halves
}


def applied(model: nn.Module) -> tuple[str, ...]:
    """What `apply` put into this model, for instance ("rms_norm", "swiglu", "rope"); () before."""
    return getattr(base_model(model), _MARK, ())


def apply(model: nn.Module) -> tuple[str, ...]:
    """Put Liger's kernels into the decoder, before adapters are added; returns what was put in, and logs it.

    Raises ValueError if the model is not on a CUDA device, liger-kernel is not installed, or the decoder is not one of
    those in the table: nothing is left out silently.
    """
    whole, text = base_model(model), decoder(model)
    if applied(model):
        return applied(model)
    liger = check(parameter_device(model))
    kernels = _DECODERS.get(text.config.model_type.removesuffix("_text"))
    if kernels is None:
        raise ValueError(
            f"model.liger: no kernels are known for {type(text).__name__} (decoders: {', '.join(sorted(_DECODERS))}); "
            "set it to false"
        )
    allowed = _ACTIVATIONS.get(kernels.mlp, ("silu", "swish"))
    activation = getattr(text.config, "hidden_act", None) or getattr(text.config, "hidden_activation", None)
    if activation not in allowed:
        raise ValueError(f"model.liger: {kernels.mlp} computes {allowed[0]}, this decoder's MLP has {activation}")
    norms = mlps = 0
    for module in text.modules():
        if type(module).__name__.endswith("RMSNorm"):
            # Not in place: its backward would write over a gradient that a norm after attention shares with the
            # residual stream (GLM-4.1V).
            liger._patch_rms_norm_module(module, offset=kernels.offset, casting_mode=kernels.casting, in_place=False)
            norms += 1
        elif hasattr(module, _PROJECTIONS[kernels.mlp]) and hasattr(module, "down_proj"):
            liger._patch_swiglu_module(module, getattr(liger, kernels.mlp))  # any MLP: it binds a forward
            mlps += 1
    rotary = kernels.rotary and _patch_rotary(text, liger)
    activation_name = "geglu" if kernels.mlp == "LigerGEGLUMLP" else "swiglu"
    counts = {f"rms_norm in {norms} modules": norms, f"{activation_name} in {mlps}": mlps, "rope": rotary}
    found = tuple(name.split(" ")[0] for name, count in counts.items() if count)
    setattr(whole, _MARK, found)
    logger.info(
        "Liger's kernels in %s: %s", type(text).__name__, ", ".join(name for name, count in counts.items() if count)
    )
    return found


def check(device: torch.device) -> Any:
    """liger-kernel's patching module. ValueError if it is not there, not as known, or of no use on `device`."""
    if device.type != "cuda" and not _interpreted():
        raise ValueError(f"model.liger: Liger's kernels run on CUDA, the model is on {device.type}; set it to false")
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise ValueError(f"model.liger needs liger-kernel ({error}): pip install liger-kernel") from error
    for name in ("_patch_rms_norm_module", "_patch_swiglu_module", *_PROJECTIONS):
        if not hasattr(monkey_patch, name):
            raise ValueError(f"model.liger: this version of liger-kernel has no {name}; use 0.8.5 or set it to false")
    return monkey_patch


def _patch_rotary(text: nn.Module, liger: Any) -> bool:
    """Let the decoder's module use Liger's rotary function for CUDA tensors; whether it has one that can be."""
    module: Any = sys.modules[type(text).__module__]
    for name, fast in _ROTARY.items():
        original = getattr(module, name, None)
        if original is None or not hasattr(liger, fast):
            continue
        if not hasattr(original, _MARK):
            setattr(module, name, _by_device(original, getattr(liger, fast)))
        return True
    return False


def _by_device(original: Any, fast: Any) -> Any:
    """A rotary function that is `fast` for CUDA tensors and `original` for others."""

    @functools.wraps(original)
    def rotate(q, k, *args, **kwargs):
        return (fast if q.is_cuda or _interpreted() else original)(q, k, *args, **kwargs)

    setattr(rotate, _MARK, original)
    return rotate


def _interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device (a test's way to check them without a GPU)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
