"""Kernels for packed attention on CUDA: torch's `varlen_attn`, flash-attn's `flash_attn_varlen_func`, flex_attention.

The first two take flat queries and keys with cumulative lengths, and align their causal mask bottom-right when a
sequence has fewer queries than keys, which `attention.self_test` checks before a kernel is used. Signatures grew by
versions, so arguments are taken by name where they exist: 2.10 has neither scale nor windows. Grouped heads have an
argument from 2.12 on; before, the kernel under it takes them all the same, which the self-test decides, and the next
candidate repeats keys and values: for 28 heads on 4, seven times the bytes.
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
    if function is not None and "enable_gqa" not in inspect.signature(function).parameters:
        yield "varlen_attn with repeated heads", functools.partial(_run_torch, function, repeated=True), missing
    function, missing = _find("flash_attn", "flash_attn_varlen_func")
    yield "flash_attn", functools.partial(_run_flash, function), missing
    function, missing = _find("torch.nn.attention.flex_attention", "flex_attention")
    yield "flex_attention", functools.partial(_run_flex, function), missing


def bidirectional() -> Iterator[tuple[str, Callable[..., Tensor], str]]:
    """The same for pieces that attend to themselves in both directions: (q, k, v [S, H, D], cumulative [pieces + 1]
    int32, longest, scale) -> [S, H, D]."""
    torchs, missing = _find("torch.nn.attention.varlen", "varlen_attn")

    def run_torch(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
        query, options = _scaled(torchs, query, scale)
        return torchs(query, key, value, ends, ends, longest, longest, **options)

    yield "varlen_attn", run_torch, missing
    flash, missing = _find("flash_attn", "flash_attn_varlen_func")

    def run_flash(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float) -> Tensor:
        return flash(query, key, value, ends, ends, longest, longest, softmax_scale=scale)

    yield "flash_attn", run_flash, missing


def _scaled(function: Any, query: Tensor, scale: float) -> tuple[Tensor, dict[str, Any]]:
    """The query and the arguments that make torch's kernel scale by `scale`."""
    if "scale" in inspect.signature(function).parameters:
        return query, {"scale": scale}
    return query * (scale * query.shape[-1] ** 0.5), {}  # the kernel's own scale is D ** -0.5


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
    repeated: bool = False,
) -> Tensor:
    """[T, Hq, D] by torch.nn.attention.varlen; `repeated`: a key and value head for each query head."""
    if dropout:
        raise ValueError(f"varlen_attn has no dropout, the model asks for {dropout}; set attention_dropout to 0")
    known = inspect.signature(function).parameters
    query, options = _scaled(function, query, scale)
    groups = query.shape[0] // key.shape[0]
    if groups > 1 and "enable_gqa" in known:
        options["enable_gqa"] = True
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    cu_q, cu_k = packing.cumulative(query.device)
    queries, keys, values = _flat(query, key, value, packing)
    if repeated and groups > 1:  # after the gathering, which moves fewer bytes so
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return function(queries, keys, values, cu_q, cu_k, max(packing.lengths), max(packing.key_lengths), **options)


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
