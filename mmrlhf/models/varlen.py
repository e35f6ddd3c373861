"""Kernels for packed attention on CUDA: torch's `varlen_attn`, flash-attn's `flash_attn_varlen_func`, flex_attention.

The first two take flat queries and keys with cumulative lengths, and align their causal mask bottom-right when a
sequence has fewer queries than keys, which `attention.self_test` checks before a kernel is used. Signatures grew by
versions, so arguments are taken by name where they exist: torch 2.10 has neither grouped heads nor scale nor windows.
flex_attention reads the row as it lies, without gathered keys, under a block mask made from the layout; it is third
because it has to be compiled first (once, for every length). Its backward is for CUDA only.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
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
    function, missing = _find("torch.nn.attention.flex_attention", "flex_attention")
    yield "flex_attention", functools.partial(_run_flex, function), missing


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


def _run_flex(
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
    """[T, Hq, D] by torch's flex_attention, compiled on CUDA: uncompiled it would hold all scores at once."""
    if dropout:
        raise ValueError(f"flex_attention has no dropout, the model asks for {dropout}; set attention_dropout to 0")
    run = _compiled(function) if query.is_cuda else function
    mask = packing.kept(("flex", window, query.device), functools.partial(block_mask, packing, window, query.device))
    grouped = query.shape[0] != key.shape[0]
    return run(query[None], key[None], value[None], block_mask=mask, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _compiled(function: Any) -> Any:
    """One graph for all lengths: a fresh one takes 10 s or more."""
    return torch.compile(function, dynamic=True)


def block_mask(packing: Packing, window: int | None, device: torch.device) -> Any:
    """Who sees whom in the row: a token its own piece and its prefix, not what comes later, not beyond the window."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = torch.tensor(packing.lengths)
    before = [key - length for key, length in zip(packing.key_lengths, packing.lengths, strict=True)]
    piece = torch.arange(len(lengths)).repeat_interleave(lengths)  # [T]
    prefix = torch.tensor(packing.prefix_of)[piece]  # [T]
    start = lengths.cumsum(0) - lengths  # [pieces]
    position = torch.arange(len(piece)) - start[piece] + torch.tensor(before)[piece]  # [T] in a row of its own
    piece, prefix, position = (tensor.to(device) for tensor in (piece, prefix, position))

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (piece[k] == piece[q]) | (piece[k] == prefix[q])
        distance = position[q] - position[k]
        return own & (distance >= 0) if window is None else own & (distance >= 0) & (distance < window)

    total = len(piece)
    # Compiled, it evaluates a block at a time; else it would hold [T, T] booleans.
    return create_block_mask(seen, None, None, total, total, device=str(device), _compile=device.type == "cuda")
