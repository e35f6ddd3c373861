"""PreferenceDataset: tokens of every group made once and kept, pixels made when they are asked for.

Making it measures every group (`Encoder.measure`): that gives each length (packing needs them) and finds every bad
group before the first step rather than in the middle of a run. Threads look at the pictures meanwhile: all their bytes
are read and decoded, but no processor meets them. Where the encoder has a folder, tokens are read from it, or go there
(`data.kept`). Token ids and weights stay in memory (compact); the processors' outputs, which are hundreds of times
larger, are made in the order of training and stay in a cache of `cache_bytes`. Their tokens are then compared with
those that were measured. Under a DataLoader every worker has a cache of its own.
"""

from __future__ import annotations

import logging
import os
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from mmrlhf.data.encode import EncodedGroup, Encoder, TooLong
from mmrlhf.data.kept import BLOCK, Kept, open_kept
from mmrlhf.data.looks import Look
from mmrlhf.data.readers import check_cap, summary
from mmrlhf.data.schema import BadRow, ImageRef, PreferenceGroup

logger = logging.getLogger(__name__)


class PreferenceDataset:
    """Groups as a map-style dataset of EncodedGroups.

    Args:
        groups: what `read_groups` returned; ids must differ.
        encoder: how to encode them.
        on_bad_row: "raise" stops at the first group that cannot be encoded; "skip" leaves it out. A group longer than
            the encoder's `max_group_tokens` is always left out, whole. Both are in `dropped`, each with its reason.
        max_bad_rows: share of the groups that may be left out; above it TooManyBadRows lists the reasons.
        cache_bytes: for the processors' outputs.
    """

    def __init__(
        self,
        groups: Iterable[PreferenceGroup],
        encoder: Encoder,
        *,
        on_bad_row: str = "raise",
        max_bad_rows: float = 0.05,
        cache_bytes: int = 1 << 30,
    ):
        if on_bad_row not in ("raise", "skip"):
            raise ValueError(f"on_bad_row must be raise or skip, got {on_bad_row!r}")
        if cache_bytes < 0:
            raise ValueError(f"cache_bytes must be 0 or more, got {cache_bytes}")
        self.encoder, self.cache_bytes = encoder, cache_bytes
        self.groups: list[PreferenceGroup] = []
        self.dropped: list[BadRow] = []
        self._text: list[EncodedGroup] = []  # without vision, ids as int32
        self._vision: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self._vision_bytes = 0
        self._hashes: dict[int, str] = {}
        self._vision_hashes: dict[int, str] = {}
        seen: set[str] = set()
        total = 0
        for group, encoded in _measured(groups, encoder):
            total += 1
            if group.id in seen:
                raise ValueError(f"two groups have the id {group.id!r}; ids name cache entries and must differ")
            seen.add(group.id)
            if isinstance(encoded, BadRow):
                if on_bad_row == "raise" and not isinstance(encoded, TooLong):
                    raise encoded
                self.dropped.append(encoded)
                continue
            self._keep_vision(len(self.groups), encoded.vision)
            self.groups.append(group)
            self._text.append(_compact(encoded))
        encoder.looks.save()
        check_cap(self.dropped, total, max_bad_rows, what="groups", where="encoding")
        if self.dropped:
            logger.warning("%d of %d groups left out:\n%s", len(self.dropped), total, summary(self.dropped))
        if any(group.videos for group in self.groups):
            logger.info("videos are encoded as %s", encoder.video_mode)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> EncodedGroup:
        """Group `index`, its pixels from the cache or made again. Raises IndexError."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        index %= len(self)
        vision = self._vision.get(index)
        if vision is None:
            text = self._text[index]
            vision = self.encoder.vision(self.groups[index], text.prefix_ids) if text.images else {}
            self._keep_vision(index, vision)
        else:
            self._vision.move_to_end(index)
        return replace(self.text(index), vision=vision)

    def text(self, index: int) -> EncodedGroup:
        """Group `index` without its pixels: opens no file and runs no processor."""
        text = self._text[index]
        return replace(text, prefix_ids=text.prefix_ids.long(), response_ids=tuple(r.long() for r in text.response_ids))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each group: prefix and all its responses."""
        return [text.num_tokens for text in self._text]

    @property
    def contradicting_margins(self) -> int:
        """Pairs whose reward margin is negative: the worse response scores higher. They train as they are ordered."""
        return sum(int((text.margin < 0).sum()) for text in self._text)  # NaN, no margin, is not below 0

    def num_pairs(self, index: int) -> int:
        return self._text[index].num_pairs

    def num_sft_tokens(self, index: int) -> int:
        """Tokens of the better response, summed over the group's pairs."""
        return self._text[index].num_sft_tokens

    def row_hash(self, index: int) -> str:
        """Changes when the group's texts, preferences or image bytes change, or any setting that encodes them."""
        if index not in self._hashes:
            self._hashes[index] = self.encoder.row_hash(self.groups[index])
        return self._hashes[index]

    def vision_hash(self, index: int) -> str:
        """Changes when the group's pictures change, or any setting that turns them into pixels; not with its texts."""
        if index not in self._vision_hashes:
            self._vision_hashes[index] = self.encoder.vision_hash(self.groups[index])
        return self._vision_hashes[index]

    def _keep_vision(self, index: int, vision: dict[str, Tensor]) -> None:
        size = _bytes(vision)
        if not size or size > self.cache_bytes:
            return
        self._vision[index] = vision
        self._vision_bytes += size
        while self._vision_bytes > self.cache_bytes:
            _, oldest = self._vision.popitem(last=False)
            self._vision_bytes -= _bytes(oldest)


def _measured(
    groups: Iterable[PreferenceGroup], encoder: Encoder
) -> Iterator[tuple[PreferenceGroup, EncodedGroup | BadRow]]:
    """The groups in order, each as tokens or as what is wrong with it; tokens that are kept on the disk are read."""
    kept = open_kept(encoder)
    if kept is None:
        for group, look in _ahead(groups, encoder):
            yield group, _tokens(encoder, group, look)
        return
    everything = list(groups)
    blocks = [everything[at : at + BLOCK] for at in range(0, len(everything), BLOCK)]
    rank, processes = _place()
    if processes == 1:
        for block in blocks:
            yield from zip(block, _measure_block(block, encoder, kept), strict=True)
        return
    # Every process makes its own blocks while the others make theirs, then reads what is there by now. Blocks that
    # nobody has (the folder may be this machine's alone) come in an order of its own, so that they are shared too.
    own = range(rank, len(blocks), processes)
    rest = [number for number in range(len(blocks)) if number % processes != rank]
    random.Random(rank).shuffle(rest)
    made = {}
    for number in own:
        made[number] = list(map(_light, _measure_block(blocks[number], encoder, kept)))
    encoder.looks.save()
    for number in rest:
        encoder.looks.refresh()
        made[number] = list(map(_light, _measure_block(blocks[number], encoder, kept)))
    for number, block in enumerate(blocks):
        yield from zip(block, made.pop(number), strict=True)


def _light(made: EncodedGroup | BadRow) -> EncodedGroup | BadRow:
    """Without pixels: all groups are held at once."""
    return made if isinstance(made, BadRow) else _compact(made)


def _measure_block(block: list[PreferenceGroup], encoder: Encoder, kept: Kept) -> Iterator[EncodedGroup | BadRow]:
    """The groups of a block, read where they are kept; once all are taken the block is kept, if any of it is new."""
    looks: list[dict[ImageRef, Look]] = []
    for group, look in _ahead(block, encoder):
        seen: dict[ImageRef, Look] = {}
        with suppress(BadRow):  # a group with a bad picture is not kept, and says so when it is measured
            seen = {ref: look(ref) for ref in encoder.pictures(group) or ()}
        looks.append(seen)
    rows = [kept.row(group, seen) for group, seen in zip(block, looks, strict=True)]
    name = kept.name(rows)
    found = kept.read(name, block)
    sound: dict[int, EncodedGroup] = {}
    new = False
    for position, (group, row, seen) in enumerate(zip(block, rows, looks, strict=True)):
        read = found.get(position)
        if read is not None and not kept.unproven:
            sound[position] = read
            yield _within(encoder, group, read)
            continue
        made = _tokens(encoder, group, seen.__getitem__ if seen else None)
        if isinstance(made, EncodedGroup) and row is not None:
            sound[position] = _compact(made)
            if read is None:
                new = True
            elif not kept.confirm(read, sound[position]):
                found, new = {}, True
        yield made
    if new and encoder.measures:
        kept.write(name, sound)


def _tokens(encoder: Encoder, group: PreferenceGroup, look: Callable[[ImageRef], Look] | None) -> EncodedGroup | BadRow:
    try:
        return encoder.measure(group, look)
    except BadRow as error:
        return error


def _within(encoder: Encoder, group: PreferenceGroup, read: EncodedGroup) -> EncodedGroup | BadRow:
    """A group that was read, unless it is longer than this run allows."""
    try:
        encoder._check_length(read, group.source or group.id)
    except TooLong as error:
        return error
    return read


def _place() -> tuple[int, int]:
    """This process's number and how many there are, by torchrun's variables; (0, 1) alone."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        return 0, 1
    return int(rank), int(size)


def _ahead(
    groups: Iterable[PreferenceGroup], encoder: Encoder
) -> Iterator[tuple[PreferenceGroup, Callable[[ImageRef], Look]]]:
    """The groups, each with what gives the looks at its pictures; threads look at those of the next groups."""
    threads = _threads()
    with ThreadPoolExecutor(threads, thread_name_prefix="mmrlhf-looks") as pool:
        waiting: deque[tuple[PreferenceGroup, dict[ImageRef, Future[Look]]]] = deque()
        try:
            for group in groups:
                refs = dict.fromkeys(encoder.pictures(group) or ())
                name = group.source or group.id
                waiting.append((group, {ref: pool.submit(encoder.looks, ref, name) for ref in refs}))
                if len(waiting) > 4 * threads:
                    yield _ready(*waiting.popleft())
            while waiting:
                yield _ready(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _ready(
    group: PreferenceGroup, futures: dict[ImageRef, Future[Look]]
) -> tuple[PreferenceGroup, Callable[[ImageRef], Look]]:
    return group, lambda ref: futures[ref].result()


def _threads() -> int:
    """At most 8, and no more than this process's share of the cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")  # torchrun's
    return max(1, min(8, cores // max(1, int(processes) if processes.isdecimal() else 1)))


def _bytes(vision: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in vision.values())


def _compact(encoded: EncodedGroup) -> EncodedGroup:
    """Without vision, token ids in 4 bytes."""
    return replace(
        encoded,
        prefix_ids=encoded.prefix_ids.to(torch.int32),
        response_ids=tuple(r.to(torch.int32) for r in encoded.response_ids),
        vision={},
    )
