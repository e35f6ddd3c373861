"""Hidden states of response tokens, with each prompt and its images computed once for all its responses.

    packed   one row [1, T] with every group of the batch, no padding; `attention` keeps pieces apart     the default
    apart    the same row with a copy of the prefix for each response                           share_prefix=False
    padded   [K, L] rows a group under the model's own attention, for decoders that cannot be packed; also what the
             packed path is checked against

The lm_head is never run. Positions are the model's own: mRoPE from its `get_rope_index` on the prefixes, going on
from there by one on every axis; else 0, 1, 2, …. Exact in exact arithmetic, with dropout off. Not covered:
encoder-decoders, and cross-attention decoders (Mllama) with images.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrlhf.batch import GroupBatch, Layout, cumulative, layout_of, on_device, score_rows, text_positions
from mmrlhf.models import adapters, attention, last_layer
from mmrlhf.models.parts import (
    base_model,
    image_token_ids,
    inner_model,
    lm_head,
    text_config,
)
from mmrlhf.models.sharing import can_share, image_blocks
from mmrlhf.models.vision import PER_TOKEN, VisionFeatures, decoder_inputs, encode, is_trained

__all__ = ["SelfCheck", "can_share", "packed_inputs", "position_ids", "prepare", "response_hidden", "self_check"]
logger = logging.getLogger(__name__)
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose way of running was logged
# Relative error allowed between two exact paths: rounding only. A wrong mask is off by 0.1 to 1.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 6e-2}


def response_hidden(
    model: nn.Module,
    batch: GroupBatch,
    *,
    vision: VisionFeatures | None = None,
    share_prefix: bool = True,
    layout: Layout | None = None,
) -> Tensor:
    """Hidden states of the rows that predict each response token: [N, H], in the order of `batch.targets`.

    `batch` lies on the model's device. `vision` are features from `vision.encode` (encoded here otherwise, with
    gradients if the tower is trained). `layout` saves a device sync if `layout_of(batch)` was read on the CPU. Sets
    the decoder's attention to `mmrlhf` for good: forwards without a layout run sdpa through it. A decoder that
    cannot share a prefix (`can_share`) runs padded rows, and says so once in the log.
    """
    layout = layout or layout_of(batch)
    vision = encode(model, batch, grad=is_trained(model)) if vision is None else vision
    positions = position_ids(model, batch, layout) if batch.position_ids is None else batch.position_ids
    shared, reason = can_share(model)
    _tell(model, shared, share_prefix, reason)
    if not shared:
        return _padded(model, batch, layout, vision, positions)
    if not share_prefix:
        return _packed(model, *_apart(model, batch, layout, vision, positions))
    return _packed(model, batch.input_ids, layout, vision, positions)


def prepare(model: nn.Module, batch: GroupBatch) -> GroupBatch:
    """The batch with its `position_ids` filled in; on the CPU this costs no device sync."""
    return batch.replace(position_ids=position_ids(model, batch, layout_of(batch)))


def position_ids(model: nn.Module, batch: GroupBatch, layout: Layout) -> Tensor:
    """[1, T] int64, or [3, T] (time, height, width) for a model with mRoPE, on the batch's device."""
    plain = text_positions(layout)
    inner = inner_model(model)
    if not hasattr(inner, "get_rope_index"):
        return plain.to(batch.input_ids.device)
    if not any(key.endswith("grid_thw") for key in batch.vision):
        return plain.expand(3, -1).to(batch.input_ids.device)
    # All prefixes as one padded batch: the model consumes the grids in order, whatever group they belong to.
    ids = batch.input_ids.cpu()
    # One text token more each: its position is where responses go on. That is not the prefix's largest plus one where
    # a video's time positions run ahead of the text (Qwen2.5-VL: up to 25 a second).
    longest = max(layout.prefix_len) + 1
    prefixes = ids.new_full((len(layout.prefix_len), longest), text_token(model))
    mask = torch.zeros_like(prefixes)
    for group, (start, length) in enumerate(zip(layout.group_start, layout.prefix_len, strict=True)):
        prefixes[group, :length] = ids[start : start + length]
        mask[group, : length + 1] = 1
    known = inspect.signature(inner.get_rope_index).parameters
    grids = {key: value.cpu() for key, value in batch.vision.items() if key in known and key not in PER_TOKEN}
    found, _ = inner.get_rope_index(
        prefixes, mm_token_type_ids=token_types(model, prefixes), attention_mask=mask, **grids
    )  # [3, G, longest]
    pieces = []
    for group, (length, responses) in enumerate(zip(layout.prefix_len, layout.response_len, strict=True)):
        pieces.append(found[:, group, :length])
        after = int(found[0, group, length])
        pieces.extend(torch.arange(after, after + response).expand(3, -1) for response in responses)
    return torch.cat(pieces, dim=1).to(batch.input_ids.device)


@dataclass(frozen=True)
class SelfCheck:
    """What `self_check` found. Errors are relative: |difference| / |separate rows|, the worst response."""

    max_error: float
    head_error: float  # of lm_head(model) against the model's own logits
    tolerance: float
    responses: int
    shared: bool
    reason: str


def self_check(
    model: nn.Module, batch: GroupBatch, *, vision: VisionFeatures | None = None, tolerance: float | None = None
) -> SelfCheck:
    """Compare the packed path with ordinary rows on the first two groups of a batch, and the head with the model's.

    Runs without gradients and dropout, and leaves the model as it was. Raises RuntimeError with both figures if they
    differ by more than `tolerance` (relative; default by dtype: 1e-3 in float32, 6e-2 in bfloat16), and for a model
    that is not finite itself.
    """
    layout = layout_of(batch)
    shared, reason = can_share(model)
    with torch.no_grad(), _quiet(model):
        features = encode(model, batch) if vision is None else vision
        positions = position_ids(model, batch, layout) if batch.position_ids is None else batch.position_ids
        groups = list(range(min(2, batch.num_groups)))
        small, part, features, positions = _subset(model, batch, layout, features, positions, groups)
        want = _padded(model, small, part, features, positions)
        got = _packed(model, small.input_ids, part, features, positions) if shared else want
        head_error = _head_error(model, batch)
    if not bool(want.isfinite().all()):
        raise RuntimeError(
            f"{type(base_model(model)).__name__} gives hidden states that are not finite on ordinary rows of groups "
            f"{', '.join(batch.ids[: len(groups)]) or '(no ids)'}: its weights are not, or its dtype ({want.dtype}) "
            "overflows"
        )
    allowed = _TOLERANCE.get(want.dtype, 1e-3) if tolerance is None else tolerance
    lengths = [length for responses in part.response_len for length in responses]
    pairs = zip(got.double().split(lengths), want.double().split(lengths), strict=True)
    errors = [((a - b).norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny)).item() for a, b in pairs]
    errors = [one if one == one else float("inf") for one in errors]  # NaN is the worst of errors
    error = max(errors)
    at = errors.index(error)
    if not error <= allowed:
        norms = [side.double().split(lengths)[at].norm().item() for side in (got, want)]
        raise RuntimeError(
            f"shared-prefix hidden states differ from separate rows: relative error {error:.3g}, allowed {allowed:.3g} "
            f"(response {at}: norm {norms[0]:.6g} shared, {norms[1]:.6g} separate). Set share_prefix=false to train "
            f"{type(base_model(model)).__name__} without sharing, and please report it"
        )
    if not head_error <= allowed:
        raise RuntimeError(
            f"the lm_head taken from {type(base_model(model)).__name__} does not give its logits: relative error "
            f"{head_error:.3g}, allowed {allowed:.3g}. Its forward scales or caps logits in a way mmrlhf does not know"
        )
    return SelfCheck(error, head_error, allowed, len(lengths), shared, reason)


def _packed(
    model: nn.Module,
    input_ids: Tensor,  # [T]
    layout: Layout,
    vision: VisionFeatures,
    positions: Tensor,  # [1 or 3, T]
) -> Tensor:
    """[N, H] from one row."""
    module, inputs = decoder_inputs(model, input_ids[None], vision)
    inputs |= packed_inputs(model, input_ids, layout, positions, scored_only=True)
    hidden = module(**inputs, use_cache=False).last_hidden_state[0]  # [T, H]
    return hidden[on_device(score_rows(layout), hidden.device)]


def packed_inputs(
    model: nn.Module,
    input_ids: Tensor,  # [T]
    layout: Layout,
    positions: Tensor | None = None,  # [1 or 3, T]; plain ones where there are none
    *,
    scored_only: bool = False,
) -> dict[str, Any]:
    """What a packed row's forward takes besides ids or embeddings: positions, layout, and a mask nobody reads.

    With `scored_only`, rows that predict no response token miss the last layer's MLP, and must not be read.

    A 4-D mask is passed on untouched: without one, transformers would build a T x T mask, and would take positions that
    restart for packed documents, cutting responses off from their prefix.
    """
    _use_packed_attention(model)
    adapters.install(model)
    if positions is None:
        positions = text_positions(layout).to(input_ids.device)
        positions = positions.expand(3, -1) if hasattr(inner_model(model), "get_rope_index") else positions
    untouched = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    blocks = image_blocks(model, input_ids)
    # Where there are blocks the model would make masks by layer type; a dict says that they are made already.
    types = ("full_attention", "sliding_attention")
    packing = attention.Packing(layout, blocks=blocks)
    if scored_only and last_layer.install(model):
        packing.rows = last_layer.read_rows(layout, input_ids.device)
    return {
        "attention_mask": untouched if blocks is None else dict.fromkeys(types, untouched),
        "position_ids": positions[:, None] if positions.shape[0] == 3 else positions,
        attention.KEYWORD: packing,
    }


def _apart(
    model: nn.Module, batch: GroupBatch, layout: Layout, vision: VisionFeatures, positions: Tensor
) -> tuple[Tensor, Layout, VisionFeatures, Tensor]:
    """The same batch with a prefix of its own for each response; features are repeated, not recomputed."""
    rows, group_of = [], []
    for group, (start, prefix, responses) in enumerate(
        zip(layout.group_start, layout.prefix_len, layout.response_len, strict=True)
    ):
        at = start + prefix
        for length in responses:
            rows.append(torch.cat((torch.arange(start, start + prefix), torch.arange(at, at + length))))
            group_of.append(group)
            at += length
    index = on_device(torch.cat(rows), batch.input_ids.device)
    new = Layout(
        tuple(layout.prefix_len[group] for group in group_of),
        tuple((length,) for responses in layout.response_len for length in responses),
    )
    return batch.input_ids[index], new, _features_of(model, batch, layout, vision, group_of), positions[:, index]


def _padded(model: nn.Module, batch: GroupBatch, layout: Layout, vision: VisionFeatures, positions: Tensor) -> Tensor:
    """[N, H] from ordinary rows [K, L] a group, padded on the right, under the model's own attention."""
    inner = inner_model(model)
    known = inspect.signature(inner.forward).parameters
    device = batch.input_ids.device
    out = []
    for group, (start, prefix, responses) in enumerate(
        zip(layout.group_start, layout.prefix_len, layout.response_len, strict=True)
    ):
        longest = prefix + max(responses)
        index = torch.full((len(responses), longest), start)  # any row: the mask hides what lies behind a response
        mask = torch.zeros(len(responses), longest, dtype=torch.int64)
        at = start + prefix
        for row, length in enumerate(responses):
            index[row, :prefix] = torch.arange(start, start + prefix)
            index[row, prefix : prefix + length] = torch.arange(at, at + length)
            mask[row, : prefix + length] = 1
            at += length
        index, mask = index.to(device), mask.to(device)
        ids = torch.where(mask.bool(), batch.input_ids[index], batch.input_ids[start + prefix])
        module, inputs = decoder_inputs(
            model, ids, _features_of(model, batch, layout, vision, [group] * len(responses))
        )
        types = token_types(model, ids)
        inputs |= {name: types for name in ("token_type_ids", "mm_token_type_ids") if name in known}
        own = positions[:, index]  # [1 or 3, K, L]
        inputs["position_ids"] = own if own.shape[0] == 3 else own[0]
        hidden = module(**inputs, attention_mask=mask, use_cache=False).last_hidden_state  # [K, L, H]
        out += [hidden[row, prefix - 1 : prefix + length - 1] for row, length in enumerate(responses)]
    return torch.cat(out)


def _features_of(
    model: nn.Module, batch: GroupBatch, layout: Layout, vision: VisionFeatures, groups: list[int]
) -> VisionFeatures:
    """Features of some groups, in the order given, repeats allowed."""
    if not vision.items() or groups == list(range(len(layout.prefix_len))):
        return vision
    ids = image_token_ids(inner_model(model).config)
    found: dict[str, Any] = {}
    for kind, encoded in vision.items():
        is_placeholder = (batch.input_ids == ids[kind]).cpu()
        counts = [
            int(is_placeholder[start : start + length].sum())
            for start, length in zip(layout.group_start, layout.prefix_len, strict=True)
        ]
        first = cumulative(counts).tolist()
        index = torch.cat([torch.arange(first[group], first[group + 1]) for group in groups])
        found[kind] = encoded.select(index.to(encoded.tokens.device)) if index.numel() else None
    return VisionFeatures(**found)


def _subset(
    model: nn.Module,
    batch: GroupBatch,
    layout: Layout,
    vision: VisionFeatures,
    positions: Tensor,
    groups: list[int],
) -> tuple[GroupBatch, Layout, VisionFeatures, Tensor]:
    """The first groups of a batch, with what `_padded` and `_packed` read."""
    features = _features_of(model, batch, layout, vision, groups)
    part = Layout(
        tuple(layout.prefix_len[group] for group in groups), tuple(layout.response_len[group] for group in groups)
    )
    tokens = sum(part.group_len)
    kept = batch.replace(input_ids=batch.input_ids[:tokens], vision=batch.vision if features.items() else {})
    return kept, part, features, positions[:, :tokens]


def token_types(model: nn.Module, ids: Tensor) -> Tensor:
    """0 for text, 1 for image and 2 for video tokens; the shape of `ids`, int64."""
    markers = image_token_ids(inner_model(model).config)
    types = torch.zeros_like(ids)
    for value, kind in enumerate(("image", "video"), start=1):
        if kind in markers:
            types[ids == markers[kind]] = value
    return types


def text_token(model: nn.Module) -> int:
    """A token id that is no placeholder."""
    return next(token for token in range(3) if token not in image_token_ids(inner_model(model).config).values())


def _use_packed_attention(model: nn.Module) -> None:
    """Set the decoder's attention, once; the vision tower keeps its own."""
    if text_config(model)._attn_implementation == attention.NAME:
        return
    attention.register()
    whole = base_model(model)
    nested = text_config(model) is not whole.config
    whole.set_attn_implementation({"text_config": attention.NAME} if nested else attention.NAME)
    if text_config(model)._attn_implementation != attention.NAME:
        raise RuntimeError(f"{type(whole).__name__} did not accept the attention function {attention.NAME!r}")


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside, each as it was after; the cached rope_deltas too."""
    modes = [(module, module.training) for module in model.modules()]
    inner = inner_model(model)
    deltas = getattr(inner, "rope_deltas", None)
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = deltas


def _head_error(model: nn.Module, batch: GroupBatch) -> float:
    """Relative error of `lm_head` against the model's own logits on a few text tokens."""
    whole = base_model(model)
    head = lm_head(model)
    ids = batch.targets[None, :8]
    hidden = inner_model(model)(input_ids=ids, use_cache=False).last_hidden_state
    want = whole(input_ids=ids, use_cache=False).logits.float()
    return ((head.logits(hidden) - want).norm() / want.norm()).item()


def _tell(model: nn.Module, shared: bool, wanted: bool, reason: str) -> None:
    """One log line a model about how it runs."""
    whole = base_model(model)
    if whole in _told:
        return
    _told.add(whole)
    name = type(whole).__name__
    if not shared:
        logger.warning("%s cannot share a prompt between its responses: %s. Running separate rows.", name, reason)
    elif not wanted:
        logger.info("%s: separate rows, as asked (share_prefix=false)", name)
    else:
        logger.info("%s: one pass over each prompt for all its responses (%s)", name, reason)
