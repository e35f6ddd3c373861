"""From the rows that other trainers' data sets hold to one flat batch, as a collator those trainers can call.

A row is TRL's vision preference row (images, prompt, chosen, rejected), a row of any other published format that
`mmrlhf.data.formats` reads, or our ranked one (responses with scores or ranks). Beside those it may hold:

    margin                              reward(chosen) - reward(rejected), for a beta a pair
    chosen_segments, rejected_segments  [[start, end], ...] characters that were corrected; they go before the diff
    reference_logp                      cached reference log-probabilities, a number a response token
    group                               a PreferenceGroup, instead of all other columns

Pictures are processed once a row, not once a response. Not covered: tools, streaming data sets on several processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrlhf.batch import GroupBatch, Layout, layout_of
from mmrlhf.data.collate import EncodedGroup, Encoder, collate
from mmrlhf.data.formats import COLUMNS
from mmrlhf.data.images import MAX_PIXELS, container_of
from mmrlhf.data.readers import read_groups
from mmrlhf.data.schema import BadRow, PairMode, PreferenceGroup

BATCH, REFERENCE = "mmrlhf_batch", "reference_logp"
SEGMENT_COLUMNS = ("chosen_segments", "rejected_segments")
COLUMNS_READ = tuple(sorted({*SEGMENT_COLUMNS, REFERENCE, "group"}.union(*COLUMNS.values())))


@dataclass(eq=False)
class PackedRows:
    """A batch on its way through a host trainer, which takes it for one opaque value and leaves it on the CPU.

    The forward fills in the rest: the batch moved to the model's device, and the features of a frozen vision tower,
    which serve the policy and the reference alike.
    """

    batch: GroupBatch
    layout: Layout  # read on the CPU, so that no device is waited for
    without_margin: str | None = None  # the first pair that has no reward margin, likewise
    share: float = 1.0  # of this micro-batch in its optimiser step, on top of a plain mean over micro-batches
    ready: bool = False  # whether `batch` has positions and lies on the model's device
    tower: int = 0  # id() of the model whose frozen tower made `features`
    features: Any = None


class PreferenceCollator:
    """Rows -> {"prefix_len": [G], "input_ids": [1, T], "mmrlhf_batch": PackedRows}, for any trainer's data loader.

    Args:
        processor: a transformers processor with a chat template (a tokenizer will do for text).
        segments, gamma, pairs: those of `data.collate.Encoder`.
        max_length: tokens of a prompt with one response. A longer response is cut at its end, as TRL does; a prompt,
            and so a picture, is never cut: a row whose prompt leaves no room raises BadRow. None: no limit.
        root: folder that pictures given as paths are relative to.
    Raises BadRow, naming the row, for one that cannot be used.
    """

    def __init__(
        self,
        processor: Any,
        *,
        segments: str | None = None,
        gamma: float = 1.0,
        pairs: PairMode = "all",
        max_length: int | None = None,
        root: str | Path = ".",
        max_image_pixels: int = MAX_PIXELS,
        video_frames: int = 8,
    ):
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be None or at least 1, got {max_length}")
        self.max_length = max_length
        self.encoder = Encoder(
            processor,
            root=root,
            pairs=pairs,
            segments=segments,
            gamma=gamma,
            max_group_tokens=1 << 31,
            max_image_pixels=max_image_pixels,
            video_frames=video_frames,
        )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        encoded = [self.encode(row) for row in rows]
        batch = collate(encoded)
        given = [row.get(REFERENCE) for row in rows]
        if any(value is not None for value in given):
            batch = batch.replace(reference_logp=_reference(encoded, given))
        # prefix_len first: trainers take the first tensor's first dimension for the number of rows.
        return {
            "prefix_len": batch.prefix_len,
            "input_ids": batch.input_ids[None],
            BATCH: PackedRows(batch, layout_of(batch), _without_margin(batch)),
        }

    def encode(self, row: Mapping[str, Any]) -> EncodedGroup:
        """One row as CPU tensors, responses cut to `max_length`."""
        group = to_group(row)
        encoded = self.encoder.encode(group)
        if self.max_length is None:
            return encoded
        room = self.max_length - encoded.prefix_ids.numel()
        if room < 1:
            raise BadRow(
                group.source or group.id,
                f"the prompt alone has {encoded.prefix_ids.numel()} tokens, max_length is {self.max_length}; a picture "
                "is never cut: raise max_length, set it to None, or give smaller pictures",
            )
        return dataclasses.replace(
            encoded,
            response_ids=tuple(ids[:room] for ids in encoded.response_ids),
            weights=tuple(weights[:room] for weights in encoded.weights),
        )


def to_group(row: Mapping[str, Any]) -> PreferenceGroup:
    """The PreferenceGroup of one row of any format. Raises BadRow."""
    if isinstance(row.get("group"), PreferenceGroup):
        return row["group"]
    source = f"row {row['id']}" if row.get("id") else "a row"
    try:
        found = read_groups([{k: v for k, v in row.items() if v is not None and k not in SEGMENT_COLUMNS}])
    except BadRow as error:
        raise BadRow(source, error.reason) from error
    if not found.groups:
        raise BadRow(source, "no preference pair: all responses are tied")
    (group,) = found.groups
    spans = [row.get(name) for name in SEGMENT_COLUMNS]
    responses = list(group.responses)
    for index, (name, span) in enumerate(zip(SEGMENT_COLUMNS, spans, strict=True)):
        if span is not None:
            if "responses" in row:
                raise BadRow(source, f"{name} is for chosen and rejected; give each of responses its own segments")
            responses[index] = dataclasses.replace(
                responses[index], segments=_spans(span, len(responses[index].text), name, source)
            )
    return dataclasses.replace(group, responses=tuple(responses), source=source)


def undecoded(dataset: Any) -> Any:
    """A `datasets.Dataset` whose pictures come as the bytes they are stored in, for the collator to decode once.

    `datasets` would decode them, and the collator then has to write each one down again to know equal pictures by
    their bytes: 25 ms a megapixel against 2. A column stays as it was where it cannot be taken so: pictures stored as
    paths, a colour mode of its own, a format that is not one of `data.images.FORMATS` in the first 64 rows. What is no
    `datasets.Dataset`, or has a transform of the user's own, comes back unchanged.
    """
    try:
        from datasets import Dataset, Image, List
    except ImportError:
        return dataset
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    features = dataset.features.copy()
    for name in ("image", "images"):
        kind = features.get(name)
        inner = kind.feature if isinstance(kind, List) else kind
        if not isinstance(inner, Image) or not inner.decode or inner.mode is not None:
            continue
        if _bytes_only(dataset.data.column(name), nested=kind is not inner):
            features[name] = List(Image(decode=False)) if kind is not inner else Image(decode=False)
    if features == dataset.features:
        return dataset
    info = dataset.info.copy()
    info.features = features
    made = Dataset(dataset.data, info=info, split=dataset.split, indices_table=dataset._indices)
    given = dataset.format
    return made.with_format(given["type"], columns=given["columns"], **given["format_kwargs"])


def _bytes_only(column: Any, *, nested: bool) -> bool:
    """Whether every picture of a stored column is there as bytes, the first 64 rows' in a format that is opened."""
    import pyarrow.compute as compute

    flat = compute.list_flatten(column) if nested else column
    stored = compute.struct_field(flat, "bytes")
    if stored.null_count > flat.null_count:
        return False
    return all(container_of(data) is not None for data in stored[:64].to_pylist() if data is not None)


def _without_margin(batch: GroupBatch) -> str | None:
    """The first pair whose margin is not known, by its prompt's id."""
    unknown = batch.margin.isnan().nonzero() if batch.margin is not None else batch.pairs[:1, :1]
    if not unknown.numel():
        return None
    return batch.response_keys[int(batch.pairs[int(unknown[0, 0]), 0])]


def _spans(value: Any, length: int, name: str, source: str) -> tuple[tuple[int, int], ...]:
    spans = []
    for item in value:
        ok = isinstance(item, (list, tuple)) and len(item) == 2 and all(type(v) is int for v in item)
        if not ok or not 0 <= item[0] < item[1] <= length:
            raise BadRow(source, f"{name} must hold [start, end) within 0..{length}, got {item!r}")
        spans.append((item[0], item[1]))
    return tuple(spans)


def _reference(encoded: Sequence[EncodedGroup], given: Sequence[Any]) -> torch.Tensor:
    """Cached reference log-probabilities of a batch, [N] float32; every row must have as many as it has tokens."""
    for group, values in zip(encoded, given, strict=True):
        tokens = sum(ids.numel() for ids in group.response_ids)
        if values is None or len(values) != tokens:
            raise BadRow(
                group.id,
                f"{REFERENCE} has {'no' if values is None else len(values)} numbers for {tokens} response tokens: it "
                "was cached with other texts, another tokenizer or other settings",
            )
    return torch.cat([torch.as_tensor(values, dtype=torch.float32) for values in given])


def per_row(logp: torch.Tensor, batch: GroupBatch) -> list[list[float]]:
    """The numbers [N] of a batch's response tokens, a list for each of its rows: what `reference_logp` holds."""
    tokens = torch.zeros(batch.num_groups, dtype=torch.int64)
    tokens.index_add_(0, batch.response_group.cpu(), batch.response_len.cpu())
    return [part.tolist() for part in logp.cpu().split(tokens.tolist())]
