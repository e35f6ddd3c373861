"""EncodedGroups -> GroupBatch: flat and unpadded. The names a data loader needs are all here.

Tokens of the groups follow one another. What the processor returned for them is joined along its first dimension;
where groups differ in another dimension (tiles an image, for instance), it is filled with zeros up to the largest.
Token types are laid out like input_ids, responses being text (0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrlhf.batch import GroupBatch, Layout, cumulative, score_rows
from mmrlhf.data.dataset import PreferenceDataset
from mmrlhf.data.encode import EncodedGroup, Encoder, TooLong

__all__ = ["EncodedGroup", "Encoder", "PreferenceDataset", "TooLong", "collate"]


def collate(encoded: Sequence[EncodedGroup]) -> GroupBatch:
    """G encoded groups as one flat batch. Raises ValueError if there is none."""
    if not encoded:
        raise ValueError("collate needs at least one group, got none")
    layout = Layout(
        tuple(g.prefix_ids.numel() for g in encoded),
        tuple(tuple(r.numel() for r in g.response_ids) for g in encoded),
    )
    per_group = [len(g.response_ids) for g in encoded]
    lengths = [n for group in layout.response_len for n in group]
    first = cumulative(per_group)  # [G + 1]
    return GroupBatch(
        input_ids=torch.cat([t for g in encoded for t in (g.prefix_ids, *g.response_ids)]),
        prefix_len=torch.tensor(layout.prefix_len, dtype=torch.int64),
        response_len=torch.tensor(lengths, dtype=torch.int64),
        response_group=torch.repeat_interleave(torch.arange(len(encoded)), torch.tensor(per_group)),
        rows=score_rows(layout),
        targets=torch.cat([t for g in encoded for t in g.response_ids]),
        token_weight=torch.cat([t for g in encoded for t in g.weights]),
        cu_seqlens=cumulative(lengths),
        pairs=torch.cat([g.pairs + first[i] for i, g in enumerate(encoded)]),
        margin=torch.cat([g.margin for g in encoded]),
        vision={**_merge_vision([g.vision for g in encoded]), **_merge_aligned(encoded)},
        images_per_group=tuple(g.images for g in encoded),
        ids=tuple(g.id for g in encoded),
        response_keys=tuple(f"{g.id}#{index}" for g in encoded for index in g.responses),
    )


def _merge_vision(outputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each output joined along dim 0 over the groups that have it; other dims filled with zeros up to the largest."""
    merged = {}
    for key in dict.fromkeys(key for output in outputs for key in output):
        parts = [output[key] for output in outputs if key in output]
        if len({p.dim() for p in parts}) > 1:
            raise ValueError(f"processor output {key!r} has {[tuple(p.shape) for p in parts]}: dims differ in number")
        size = [max(p.shape[d] for p in parts) for d in range(1, parts[0].dim())]
        merged[key] = torch.cat([_pad_to(p, size) for p in parts])
    return merged


def _pad_to(tensor: Tensor, size: Sequence[int]) -> Tensor:
    if list(tensor.shape[1:]) == list(size):
        return tensor
    padded = tensor.new_zeros(tensor.shape[0], *size)
    padded[tuple(slice(n) for n in tensor.shape)] = tensor
    return padded


def _merge_aligned(encoded: Sequence[EncodedGroup]) -> dict[str, Tensor]:
    """Token types [T] in the layout of input_ids; responses are text, type 0."""
    merged = {}
    for key in dict.fromkeys(key for g in encoded for key in g.aligned):
        parts = []
        for group in encoded:
            tail = sum(r.numel() for r in group.response_ids)
            head = group.aligned.get(key, torch.zeros_like(group.prefix_ids))
            parts += [head, head.new_zeros(tail)]
        merged[key] = torch.cat(parts)
    return merged
