"""GroupBatch: the one word that data, models, ops and train share.

A batch is flat and unpadded. Each group is one prompt (its *prefix*, image tokens included) followed by its
responses, one after another, in `input_ids`; everything about attention masks and positions derives from
`prefix_len`, `response_len` and `response_group`, so no mask is ever stored.

    input_ids   | prefix 0 | r0 | r1 | prefix 1 | r2 | r3 | r4 |        T tokens, G = 2 groups, R = 5 responses
    targets                | r0 | r1 |          | r2 | r3 | r4 |        N scored tokens: every response token
    rows                   the row of the hidden states that predicts each target: for the first token of a
                           response that is the last row of its prefix, for the others the row before

Not covered: padding (there is none), shifting (`rows` says which hidden row scores which target).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, without waiting for it.

    From ordinary memory CUDA stages a copy first, for which the driver may wait until the stream is empty; from pinned
    memory, which PyTorch keeps and hands out again, the copy is only queued.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class GroupBatch:
    """G prompts with their R responses, N scored tokens and P preference pairs, flat.

    Built by `data.collate.collate`; `position_ids` is filled in by the model layer, `reference_logp` by training.
    """

    input_ids: Tensor  # [T] int64
    prefix_len: Tensor  # [G] int64, tokens, image tokens included
    response_len: Tensor  # [R] int64, tokens, at least 1
    response_group: Tensor  # [R] int64, ascending: the group each response belongs to
    rows: Tensor  # [N] int64, into the T rows of the hidden states
    targets: Tensor  # [N] int64, token ids
    token_weight: Tensor  # [N] float32, 1 or gamma in a corrected segment
    cu_seqlens: Tensor  # [R + 1] int64, where each response's tokens lie in [N]
    pairs: Tensor  # [P, 2] int64, (better, worse) as indices into R
    margin: Tensor | None = None  # [P] float32, reward(better) - reward(worse); NaN where a pair has none
    reference_logp: Tensor | None = None  # [N] float32, cached reference log-probabilities, nats
    position_ids: Tensor | None = None  # [1 or 3, T] int64
    vision: dict[str, Tensor] = field(default_factory=dict)  # processor outputs, each image once per group
    images_per_group: tuple[int, ...] = ()  # G counts, images and videos together
    ids: tuple[str, ...] = ()  # G group ids, for error messages and caches
    response_keys: tuple[str, ...] = ()  # R keys "<group id>#<response index>", stable across epochs

    @property
    def num_groups(self) -> int:
        return self.prefix_len.numel()

    @property
    def num_responses(self) -> int:
        return self.response_len.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens through the decoder, T."""
        return self.input_ids.numel()

    @property
    def num_scored(self) -> int:
        """Response tokens that meet the lm_head, N."""
        return self.targets.numel()

    def to(self, device: torch.device | str) -> GroupBatch:
        """The same batch with every tensor on `device`."""

        def move(value):
            if isinstance(value, Tensor):
                return on_device(value, device)
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value

        return dataclasses.replace(self, **{f.name: move(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def replace(self, **changes) -> GroupBatch:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Layout:
    """The integers that masks and positions derive from, on the host, once a batch (no device sync)."""

    prefix_len: tuple[int, ...]  # G
    response_len: tuple[tuple[int, ...], ...]  # G tuples of response lengths, in order

    @property
    def group_len(self) -> tuple[int, ...]:
        return tuple(p + sum(r) for p, r in zip(self.prefix_len, self.response_len, strict=True))

    @property
    def group_start(self) -> tuple[int, ...]:
        """First row of each group's prefix in [T]."""
        starts, at = [], 0
        for length in self.group_len:
            starts.append(at)
            at += length
        return tuple(starts)


def layout_of(batch: GroupBatch) -> Layout:
    """Read the layout of a batch (call it while the batch is still on the CPU)."""
    per_group: list[list[int]] = [[] for _ in range(batch.num_groups)]
    for length, group in zip(batch.response_len.tolist(), batch.response_group.tolist(), strict=True):
        per_group[group].append(length)
    return Layout(tuple(batch.prefix_len.tolist()), tuple(tuple(r) for r in per_group))


def score_rows(layout: Layout) -> Tensor:
    """`rows` of a layout: for each response token, the hidden row that predicts it.

    Returns [N] int64. The first token of every response is predicted by the last row of its prefix.
    """
    pieces: list[Tensor] = []
    for start, prefix, responses in zip(layout.group_start, layout.prefix_len, layout.response_len, strict=True):
        last_prefix_row = start + prefix - 1
        at = start + prefix
        for length in responses:
            pieces.append(torch.tensor([last_prefix_row]))
            pieces.append(torch.arange(at, at + length - 1))
            at += length
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def text_positions(layout: Layout) -> Tensor:
    """Plain positions: 0 .. P-1 on a prefix, and P, P+1, … on each of its responses. Returns [1, T] int64."""
    pieces: list[Tensor] = []
    for prefix, responses in zip(layout.prefix_len, layout.response_len, strict=True):
        pieces.append(torch.arange(prefix))
        pieces.extend(torch.arange(prefix, prefix + length) for length in responses)
    return torch.cat(pieces)[None] if pieces else torch.empty(1, 0, dtype=torch.int64)


def cumulative(lengths: Sequence[int]) -> Tensor:
    """[0, l0, l0 + l1, …] as int64."""
    out = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(list(lengths), dtype=torch.int64), 0, out=out[1:])
    return out
