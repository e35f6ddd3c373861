"""The cached reference as a column of a data set, kept on disk: a number a response token, whatever the rows hold.

    <folder>/<key>/<shard key>.safetensors      up to SHARD_GROUPS rows, those of `train.reference`: whole or absent
    <folder>/<key>/<data set key>.arrow         the column, mapped into memory and not held in it

A shard is scored by all processes together, equally many batches each, and written before the next one begins: a run
that is killed keeps the shards it has, and the next one of the same model, rows and settings reads them. Not covered:
streamed data sets, which have no length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrlhf.integrations.rows import BATCH, REFERENCE, PackedRows, PreferenceCollator, per_row, to_group
from mmrlhf.train.files import write_atomic
from mmrlhf.train.reference import SHARD_GROUPS, read_shard, write_shard
from mmrlhf.train.state import text_fingerprint

_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class Alone:
    """One process. `integrations.trl` gives an accelerator's answers in its place."""

    rank, world, writes = 0, 1, True

    def gather(self, items: list) -> list:
        """The items of all processes."""
        return items


def with_reference(
    dataset: Any,  # datasets.Dataset
    collator: PreferenceCollator,
    score: Callable[[PackedRows], Tensor],  # -> [N] log-probabilities, nats
    folder: str | Path,
    *,
    key: str,
    batch_size: int,
    processes: Any = None,
) -> Any:
    """`dataset` with the column `reference_logp`, read from `folder` where it is there and written there where not.

    `key` stands for the model (`train.reference.reference_key`); the rows, the collator's settings and the batches are
    added here. Every process calls this with the same arguments. Raises ValueError naming the row for a
    log-probability that is not finite, BadRow for a row that cannot be used.
    """
    from datasets import Dataset, concatenate_datasets

    processes = processes or Alone()
    place = Path(folder) / key[:16]
    place.mkdir(parents=True, exist_ok=True)
    plain = dataset.remove_columns([name for name in dataset.column_names if name == REFERENCE])
    rows = _Rows(plain)
    settings = (key, f"max_length={collator.max_length}", f"batch={batch_size}", f"processes={processes.world}")
    shards: list[tuple[Path, str, int]] = []
    for at in range(0, len(rows), SHARD_GROUPS):
        indices = range(at, min(at + SHARD_GROUPS, len(rows)))
        hashes = _split(indices, processes, lambda mine: [collator.encoder.row_hash(to_group(rows[i])) for i in mine])
        shard_key = text_fingerprint(*settings, *hashes)
        path = place / f"{shard_key[:32]}.safetensors"
        # All or none: a process that reads while another one scores would leave it waiting.
        if not all(processes.gather([read_shard(path, shard_key, len(indices)) is not None])):
            found = _split(indices, processes, lambda mine: score_rows(rows, mine, collator, score, batch_size))
            if processes.writes:
                write_shard(path, shard_key, found)
        shards.append((path, shard_key, len(indices)))
    column = place / f"{text_fingerprint(*(shard_key for _, shard_key, _ in shards))[:32]}.arrow"
    if processes.writes:
        write_atomic(column, _stream(shards))
    processes.gather([True])  # nobody reads before it is written
    joined = concatenate_datasets([plain.with_format(None), Dataset.from_file(str(column))], axis=1)
    return _with_format_of(plain, joined)


class _Rows:
    """A data set's rows with pictures as the bytes they are stored in, where they are: decoded ones cost much more."""

    def __init__(self, dataset: Any):
        self.dataset = dataset
        self.stored = None if dataset.format["type"] == "custom" else dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.stored is not None:
            (row,) = self.stored[index : index + 1].to_pylist()
            pictures = [row.get("image"), *(row.get("images") or ())]
            if not any(isinstance(value, Mapping) and value.get("bytes") is None for value in pictures):
                return row
        return self.dataset[index]


def _split(indices: range, processes: Any, work: Callable[[list[int]], list]) -> list:
    """`work` on a share of the indices in each process, equally large; all results in the order of the indices."""
    each = math.ceil(len(indices) / processes.world)
    mine = [indices[(processes.rank + processes.world * i) % len(indices)] for i in range(each)]
    found = dict(processes.gather(list(zip(mine, work(mine), strict=True))))
    return [found[index] for index in indices]


def score_rows(
    rows: Any, mine: Sequence[int], collator: PreferenceCollator, score: Callable, batch_size: int
) -> list[Tensor]:
    """One [n] float32 tensor for each of the rows `mine`. ValueError naming the row for a number that is not finite."""
    found: list[Tensor] = []
    for start in range(0, len(mine), batch_size):
        packed = collator([rows[index] for index in mine[start : start + batch_size]])[BATCH]
        ids = packed.batch.ids
        for name, values in zip(ids, per_row(score(packed).detach().float(), packed.batch), strict=True):
            if not all(map(math.isfinite, values)):
                raise ValueError(f"row {name}: the starting model gives log-probabilities that are not finite")
            found.append(torch.tensor(values, dtype=torch.float32))
    return found


def _stream(shards: Iterable[tuple[Path, str, int]]) -> Iterator[bytes | memoryview]:
    """The column as an Arrow stream, a batch a shard; one shard is in memory at a time."""
    import pyarrow as pa
    from datasets import Features, List, Value

    schema = Features({REFERENCE: List(Value("float32"))}).arrow_schema
    yield memoryview(schema.serialize())
    for path, shard_key, count in shards:
        rows = read_shard(path, shard_key, count)
        if rows is None:
            raise FileNotFoundError(f"{path}: this shard of the cached reference has gone or changed during the run")
        offsets = np.cumsum([0, *(row.numel() for row in rows)], dtype=np.int32)
        values = pa.ListArray.from_arrays(pa.array(offsets), pa.array(torch.cat(rows).numpy()))
        yield memoryview(pa.record_batch([values.cast(schema.field(0).type)], schema=schema).serialize())
    yield _END_OF_STREAM


def _with_format_of(dataset: Any, joined: Any) -> Any:
    """`joined` with the format, or the transform, of `dataset`, and the new column visible."""
    how = dataset.format
    columns = None if set(how["columns"]) == set(dataset.column_names) else [*how["columns"], REFERENCE]
    return joined.with_format(
        how["type"], columns=columns, output_all_columns=how["output_all_columns"], **how["format_kwargs"]
    )
