"""Attention over packed groups: each prefix once, each response against its prefix and itself.

One row [1, T] holds `prefix 0 | r0 | r1 | prefix 1 | r2 | …` (see `mmrlhf.batch`). Its attention is a list of
ordinary causal problems: a prefix attends to itself, a response's queries attend to the keys of [prefix, response],
aligned bottom-right. Keys of a response lie next to each other by position, so a sliding window means what it means
in a row of its own. The layout travels as the keyword `mmrlhf_layout` through the model's forward, so a gradient
checkpoint's recompute sees it too; without it (generate, ordinary forwards) the function is transformers' sdpa.
Where image tokens attend to each other in both directions (`Packing.blocks`), a prefix gets a mask of its own.

CUDA in bf16/fp16: one call for all sequences (`torch.nn.attention.varlen`, flash-attn or flex_attention), each kernel
checked against SDPA before its first use. Elsewhere, and with blocks: SDPA a sequence. Not covered: soft-capped scores,
sinks.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmrlhf.batch import Layout, on_device

NAME = "mmrlhf"  # of the attention function in transformers' registry
KEYWORD = "mmrlhf_layout"  # of the forward argument that carries a `Packing`
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")  # keyword arguments that change the scores
logger = logging.getLogger(__name__)


class Packing:
    """A batch's layout in the form the attention function uses; built once a batch, shared by all layers.

    `lengths`: pieces in order (prefix, its responses, the next prefix, …), summing to T.
    `prefix_of`: for each piece, the index of its prefix piece; a prefix's own index for a prefix.
    `blocks`: [T] int64, tokens of one number >= 0 in one prefix attend to each other in both directions; -1: causal.
    `rows`: [N'] int64, the rows read after the last layer, where its MLP is to run on no others; see `last_layer`.
    """

    def __init__(self, layout: Layout, *, blocks: Tensor | None = None):
        self.blocks = blocks
        self.rows: Tensor | None = None
        self.lengths: list[int] = []
        self.prefix_of: list[int] = []
        for prefix, responses in zip(layout.prefix_len, layout.response_len, strict=True):
            index = len(self.lengths)
            self.lengths += [prefix, *responses]
            self.prefix_of += [index] * (1 + len(responses))
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}
        self._block_masks: dict[tuple[int, int | None], Tensor] = {}
        self._cumulative: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._kept: dict[Hashable, Any] = {}

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What a kernel derives from the layout: made for the first layer, there for the others."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def key_lengths(self) -> list[int]:
        """Keys each piece attends to: itself, and its prefix if it is a response."""
        return [
            length + (self.lengths[prefix] if prefix != index else 0)
            for index, (length, prefix) in enumerate(zip(self.lengths, self.prefix_of, strict=True))
        ]

    def cumulative(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cu_q, cu_k), each [pieces + 1] int32 on `device`: distinct tensors, as torch's cuDNN check wants."""
        if device not in self._cumulative:
            pair = []
            for lengths in (self.lengths, self.key_lengths):
                pair.append(on_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device))
            self._cumulative[device] = (pair[0], pair[1])
        return self._cumulative[device]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
        """Bottom-right causal (and windowed) mask [queries, keys], True = attend; None where `is_causal` says it."""
        if window is not None and window >= keys:
            window = None
        if queries == keys and window is None:
            return None
        key = (queries, keys, window, device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            mask = distance >= 0
            self._masks[key] = mask if window is None else mask & (distance < window)
        return self._masks[key]

    def prefix_mask(self, index: int, window: int | None) -> Tensor:
        """[P, P] mask of prefix `index` with its blocks: (causal or same block), and no further back than `window`.

        transformers' composition (create_masks_for_vision_model): a window cuts a block's past, never its future.
        """
        assert self.blocks is not None
        key = (index, window)
        if key not in self._block_masks:
            start, length = sum(self.lengths[:index]), self.lengths[index]
            block = self.blocks[start : start + length]
            position = torch.arange(length, device=block.device)
            distance = position[:, None] - position
            mask = (distance >= 0) | ((block[:, None] == block) & (block >= 0))
            self._block_masks[key] = mask if window is None else mask & (distance < window)
        return self._block_masks[key]


def register() -> None:
    """Make `NAME` known to transformers, once. Its mask function is sdpa's, for forwards without a layout."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if NAME not in AttentionInterface().valid_keys():
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [B, Hq, S, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,  # [B, Hkv, S, D]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: returns ([B, S, Hq, D], None).

    Raises ValueError for score modifications it does not know: they must not be dropped silently.
    """
    packing: Packing | None = kwargs.pop(KEYWORD, None)
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"this model's attention uses {name}, which shared-prefix attention does not do; use share_prefix=false"
            )
    if query.shape[0] != 1 or query.shape[2] != sum(packing.lengths):
        raise ValueError(
            f"a packed batch is one row of {sum(packing.lengths)} tokens, attention got query {tuple(query.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packing.blocks is not None:  # varlen kernels know causal masks only
        run: Callable[..., Tensor] = sdpa_per_sequence
    else:
        run = packed_attention(
            query.device, query.dtype, query.shape[-1], value.shape[-1], windowed=bool(sliding_window)
        )
    out = run(query[0], key[0], value[0], packing, scale=scale, window=sliding_window or None, dropout=dropout)
    return out[None], None


def packed_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int, *, windowed: bool
) -> Callable[..., Tensor]:
    """The implementation for a kind of tensors; which one, and why, is logged once a kind."""
    return _choose(device.type, device.index, dtype, head_dim, value_dim, windowed)[0]


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> tuple[str, str]:
    """(name, reason) of what `packed_attention` takes: "varlen_attn", "flash_attn", "flex_attention" or "sdpa"."""
    return _choose(device.type, device.index, dtype, head_dim, head_dim, False)[1:]


@functools.lru_cache(maxsize=64)
def _choose(
    kind: str, index: int | None, dtype: torch.dtype, head_dim: int, value_dim: int, windowed: bool
) -> tuple[Callable[..., Tensor], str, str]:
    device = torch.device(kind, index) if index is not None else torch.device(kind)
    reasons = []
    if kind != "cuda":
        reasons.append(f"varlen kernels are for CUDA, this is {kind}")
    elif dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"varlen kernels take bf16 and fp16, this is {dtype}")
    elif head_dim > 256 or head_dim != value_dim:
        reasons.append(f"varlen kernels take equal head sizes up to 256, these are {head_dim} and {value_dim}")
    else:
        from mmrlhf.models.varlen import candidates

        for name, run, missing in candidates(windowed=windowed):
            problem = missing or self_test(run, device, dtype, head_dim, windowed=windowed)
            if not problem:
                logger.info("packed attention: %s", name)
                return run, name, "first varlen kernel that is installed and passes its self-test"
            reasons.append(f"{name}: {problem}")
    reason = "; ".join(reasons)
    # On CUDA in half precision this path costs speed, which the user should hear of once.
    level = logging.WARNING if kind == "cuda" else logging.INFO
    logger.log(level, "packed attention: sdpa, one call a sequence (%s)", reason)
    return sdpa_per_sequence, "sdpa", reason


def sdpa_per_sequence(
    query: Tensor,  # [Hq, T, D]
    key: Tensor,  # [Hkv, T, D]
    value: Tensor,  # [Hkv, T, Dv]
    packing: Packing,
    *,
    scale: float,
    window: int | None,
    dropout: float,
) -> Tensor:
    """[T, Hq, Dv]: one SDPA call a piece. Any device and dtype."""
    # split, not slices: the backward of one split is one cat, that of n slices is n zero-filled tensors of T rows.
    queries, keys, values = (tensor.split(packing.lengths, dim=1) for tensor in (query, key, value))
    grouped = query.shape[0] != key.shape[0]
    pieces = []
    for index, prefix in enumerate(packing.prefix_of):
        k, v = keys[index], values[index]
        if prefix != index:
            k, v = torch.cat((keys[prefix], k), dim=1), torch.cat((values[prefix], v), dim=1)
        if prefix == index and packing.blocks is not None:
            mask: Tensor | None = packing.prefix_mask(index, window)
        else:
            mask = packing.mask(queries[index].shape[1], k.shape[1], window, query.device)
        pieces.append(
            scaled_dot_product_attention(
                queries[index][None],
                k[None],
                v[None],
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=grouped,
            )[0]
        )
    return torch.cat(pieces, dim=1).transpose(0, 1)


def gathered(tensor: Tensor, packing: Packing) -> Tensor:
    """Keys or values [T, H, D] laid out for varlen: each piece with its prefix before it, [sum(key_lengths), H, D].

    split and cat, not index_select: their backward adds each prefix's gradients in a fixed order.
    """
    pieces = tensor.split(packing.lengths)
    out = []
    for index, prefix in enumerate(packing.prefix_of):
        if prefix != index:
            out.append(pieces[prefix])
        out.append(pieces[index])
    return torch.cat(out)


def self_test(
    run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_dim: int, *, windowed: bool
) -> str:
    """Compare a varlen kernel with SDPA a sequence on a small case, forward and backward; "" or what is wrong.

    It catches a kernel that aligns its causal mask top-left (cuDNN's packed one), which is off by order 1 wherever
    a response is shorter than its keys. Tolerance 2e-2 of the largest value: half precision gives about 5e-3.
    """
    packing = Packing(Layout((37, 5), ((3, 9), (11,))))
    total = sum(packing.lengths)
    generator = torch.Generator().manual_seed(0)
    shapes: Sequence[tuple[int, int, int]] = ((4, total, head_dim), (2, total, head_dim), (2, total, head_dim))
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    direction = torch.randn((total, 4, head_dim), generator=generator).to(device, dtype)
    options = {"scale": head_dim**-0.5, "window": 16 if windowed else None, "dropout": 0.0}

    def evaluate(function: Callable[..., Tensor], to: torch.dtype) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [tensor.to(to).requires_grad_() for tensor in inputs]
            out = function(*leaves, packing, **options)
            return [out.detach(), *torch.autograd.grad((out * direction.to(to)).sum(), leaves)]

    try:
        got = evaluate(run, dtype)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"self-test failed with {type(error).__name__}: {error}"
    want = evaluate(sdpa_per_sequence, torch.float32)
    pairs = zip(got, want, strict=True)
    largest = max(((a.float() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    return "" if largest <= 2e-2 else f"self-test error {largest:.3g}, allowed 2e-2 (causal alignment?)"
