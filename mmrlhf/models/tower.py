"""The attention of a vision tower that cuts its pictures into windows, as one kernel call a layer, on CUDA.

Qwen2.5-VL's tower attends inside windows of 64 patches, Qwen's and GLM's others inside a frame. transformers' sdpa path
calls SDPA once a window, 81 times a layer for a picture of 1296 tokens, and reads the windows' lengths from the device
three times a layer; only flash attention gets the cumulative lengths. An attention function whose name holds "flash" is
given them too, so here one is registered that hands them to torch's `varlen_attn`, or to flash-attn where that is
installed. It is checked against SDPA before its first use, and set only where a tower would run sdpa, on CUDA in half
precision. A transformers that does not ask it for windows calls it once a window, and gets SDPA.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mmrlhf.models import varlen
from mmrlhf.models.parts import parameter_device, vision_modules

NAME = "mmrlhf_flash_tower"  # transformers hands cumulative lengths to functions with "flash" in their name
Run = Callable[..., Tensor]  # (query, key, value [S, H, D], cumulative [pieces + 1] int32, longest, scale) -> [S, H, D]
logger = logging.getLogger(__name__)
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def install(model: nn.Module) -> bool:
    """Set the tower's attention, once a model; whether it is this module's. Only asks for kernels on CUDA."""
    towers = [tower for _, tower in vision_modules(model, projector=False)]
    if not towers:
        return False
    (tower, *_) = towers
    if tower not in _seen:
        _seen.add(tower)
        layers: list[Any] = [m for m in tower.modules() if "cu_seqlens" in inspect.signature(m.forward).parameters]
        layers = [layer for layer in layers if getattr(getattr(layer, "config", None), "_attn_implementation", None)]
        device, dtype = parameter_device(model), next(tower.parameters()).dtype
        if layers and {layer.config._attn_implementation for layer in layers} == {"sdpa"}:
            width = getattr(layers[0], "head_dim", 0) or 64
            if kernel(device, dtype, width)[0] is not None:
                register()
                for layer in layers:
                    layer.config._attn_implementation = NAME
    return getattr(tower.config, "_attn_implementation", None) == NAME


def register() -> None:
    """Make `NAME` known to transformers, once."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,  # [1, H, S, D]
    key: Tensor,  # [1, H, S, D]
    value: Tensor,  # [1, H, S, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,  # [pieces + 1]
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: ([1, S, H, D], None). Without cumulative lengths, or with dropout, SDPA."""
    run = None
    if cu_seq_lens_q is not None and max_length_q is not None and not dropout:
        run = kernel(query.device, query.dtype, query.shape[-1])[0]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if run is None and cu_seq_lens_q is not None:
        lengths = cu_seq_lens_q.diff().tolist()
        return sdpa_pieces(query[0], key[0], value[0], lengths, scale=scale, dropout=dropout)[None], None
    if run is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    assert cu_seq_lens_q is not None
    return run(*flat, cu_seq_lens_q.to(torch.int32), int(max_length_q or 0), scale)[None], None


def sdpa_pieces(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], *, scale: float, dropout: float = 0.0
) -> Tensor:
    """[S, H, D] of [H, S, D]: one SDPA call a piece, each attending to itself in both directions."""
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
    out = [
        scaled_dot_product_attention(q[None], k[None], v[None], scale=scale, dropout_p=dropout)[0] for q, k, v in pieces
    ]
    return torch.cat(out, dim=1).transpose(0, 1)


@functools.lru_cache(maxsize=16)
def kernel(device: torch.device, dtype: torch.dtype, width: int) -> tuple[Run | None, str]:
    """(a kernel that passed its self-test, its name), or (None, why there is none); logged once a kind."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None, f"varlen kernels are for CUDA in bf16 and fp16, this is {device.type} in {dtype}"
    reasons = []
    for name, run, missing in varlen.bidirectional():
        problem = missing or self_test(run, device, dtype, width)
        if not problem:
            logger.info("vision tower's attention: %s", name)
            return run, name
        reasons.append(f"{name}: {problem}")
    logger.warning("vision tower's attention: sdpa, one call a window (%s)", "; ".join(reasons))
    return None, "; ".join(reasons)


def self_test(run: Run, device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Compare a kernel with SDPA a piece, forward and backward; "" or what is wrong. Tolerance as `attention`'s."""
    lengths = [37, 16, 64]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn((sum(lengths), 2, width), generator=generator).to(device, dtype) for _ in range(4)]
    *inputs, direction = drawn
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)

    def evaluate(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [tensor.to(to, copy=True).requires_grad_() for tensor in inputs]
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad((out * direction.to(to)).sum(), leaves)]

    def exact(*leaves: Tensor) -> Tensor:
        query, key, value = (leaf.transpose(0, 1) for leaf in leaves)
        return sdpa_pieces(query, key, value, lengths, scale=width**-0.5)

    try:
        got = evaluate(lambda *leaves: run(*leaves, ends, max(lengths), width**-0.5), dtype)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"self-test failed with {type(error).__name__}: {error}"
    pairs = zip(got, evaluate(exact, torch.float32), strict=True)
    largest = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return "" if largest <= 2e-2 else f"self-test error {largest:.3g}, allowed 2e-2"
