"""Varlen kernels for packed attention on CUDA: torch's `varlen_attn`, flash-attn's `flash_attn_varlen_func`.

Both take flat queries and keys with cumulative lengths, and align their causal mask bottom-right when a sequence has
fewer queries than keys, which `attention.self_test` checks before a kernel is used. Signatures grew by versions, so
arguments are taken by name where they exist: torch 2.10 has neither grouped heads nor scale nor windows.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from mmrlhf.models.attention import Packing, gathered


def candidates(*, windowed: bool) -> Iterator[tuple[str, Callable[..., Tensor], str]]:
    """(name, run, what is missing or "") of each kernel, in order of preference; run is as `sdpa_per_sequence`."""
    function, missing = _find("torch.nn.attention.varlen", "varlen_attn")
    if function is not None and windowed and "window_size" not in inspect.signature(function).parameters:
        missing = "this torch's varlen_attn has no sliding window"
    yield "varlen_attn", functools.partial(_run_torch, function), missing
    function, missing = _find("flash_attn", "flash_attn_varlen_func")
    yield "flash_attn", functools.partial(_run_flash, function), missing


def _find(module: str, name: str) -> tuple[Any, str]:
    """(function, "") or (None, why not)."""
    try:
        return getattr(importlib.import_module(module), name), ""
    except (ImportError, AttributeError, OSError) as error:
        return None, f"not available ({error})"


def _flat(query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """[H, T, D] heads first to [T, H, D] tokens first, keys and values gathered."""
    return (
        query.transpose(0, 1).contiguous(),
        gathered(key.transpose(0, 1), packing),
        gathered(value.transpose(0, 1), packing),
    )


def _run_torch(
    function: Any,
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, D]
    packing: Packing,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """[T, Hq, D] by torch.nn.attention.varlen."""
    if dropout:
        raise ValueError(f"varlen_attn has no dropout, the model asks for {dropout}; set attention_dropout to 0")
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {}
    if query.shape[0] != key.shape[0]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = query.shape[0] // key.shape[0]
            key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)  # the kernel's own scale is D ** -0.5
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    cu_q, cu_k = packing.cumulative(query.device)
    flat = _flat(query, key, value, packing)
    return function(*flat, cu_q, cu_k, max(packing.lengths), max(packing.key_lengths), **options)


def _run_flash(
    function: Any,
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, D]
    packing: Packing,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """[T, Hq, D] by flash-attn 2 (grouped heads are its own)."""
    cu_q, cu_k = packing.cumulative(query.device)
    return function(
        *_flat(query, key, value, packing),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max(packing.lengths),
        max_seqlen_k=max(packing.key_lengths),
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1 if window else -1, -1 if window is None else 0),
    )
