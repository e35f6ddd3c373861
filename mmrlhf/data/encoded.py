"""EncodedGroup: one group as CPU tensors, what `encode` makes and `collate` joins into a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from mmrlhf.data.schema import BadRow


class TooLong(BadRow):
    """A group with more than `max_group_tokens` tokens; dropped whole."""


@dataclass(frozen=True)
class EncodedGroup:
    """One group as CPU tensors. A slot is a response with its weights: S slots, p pairs of slots."""

    id: str
    prefix_ids: Tensor  # [L] int64, image tokens included
    response_ids: tuple[Tensor, ...]  # S of [n] int64, end of turn included
    weights: tuple[Tensor, ...]  # S of [n] float32
    responses: tuple[int, ...]  # S indices into the group's responses
    pairs: Tensor  # [p, 2] int64, (better, worse) as slots
    margin: Tensor  # [p] float32, NaN where there is none
    aligned: dict[str, Tensor] = field(default_factory=dict)  # name -> [L], token types of the prefix
    vision: dict[str, Tensor] = field(default_factory=dict)  # the processor's other outputs
    images: int = 0  # images and videos together

    flags: ClassVar[tuple[str, ...]] = ()  # a subclass's further fields, [p] bool each

    @property
    def num_tokens(self) -> int:
        """Tokens through the decoder: prefix and all slots."""
        return self.prefix_ids.numel() + sum(r.numel() for r in self.response_ids)

    @property
    def num_pairs(self) -> int:
        return self.pairs.shape[0]

    @property
    def num_sft_tokens(self) -> int:
        """Tokens of the better response, summed over the pairs."""
        return sum(self.response_ids[better].numel() for better in self.pairs[:, 0].tolist())


def same_tokens(a: EncodedGroup, b: EncodedGroup) -> bool:
    """Whether two encodings differ in nothing but vision outputs."""
    tensors = [
        (
            *(e.prefix_ids, *e.response_ids, *e.weights, e.pairs, e.margin.nan_to_num(nan=-1e30), *e.aligned.values()),
            *(getattr(e, name) for name in e.flags),
        )
        for e in (a, b)
    ]
    same = (a.id, a.responses, a.images, a.aligned.keys()) == (b.id, b.responses, b.images, b.aligned.keys())
    return type(a) is type(b) and same and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))
