"""The plan of an epoch: which groups make which optimiser step, and which of them share a micro-batch.

Pure: the same lengths, settings, seed and epoch give the same plan on every machine, so a resumed run needs only the
number of the step it stopped at. The order comes from hashing (seed, epoch, index), which no library version changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

Step = list[list[int]]  # micro-batches of dataset indices


def plan_epoch(
    lengths: Sequence[int], *, groups_per_step: int, tokens_per_batch: int, seed: int, epoch: int
) -> list[Step]:
    """Every index once, in as few steps of at most `groups_per_step` as there can be, as equal as they can be.

    Steps differ by at most one group, larger ones first, so that no epoch ends in an update from a handful of groups
    (of 100 in steps of 32: 25 each, not 32, 32, 32, 4). Where `groups_per_step` divides the groups, or there are more
    steps than it (of 100,001 in steps of 64: 1532 of 64, then 31 of 63), that moves the last steps only.

    Inside a step, groups go largest first into the first micro-batch with room, so that the step's largest memory need
    comes first. A micro-batch holds at most `tokens_per_batch` tokens; a group longer than that is alone in its own.
    Raises ValueError for a setting below 1 or an empty group.
    """
    for name, value in (("groups_per_step", groups_per_step), ("tokens_per_batch", tokens_per_batch)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    if any(length < 1 for length in lengths):
        raise ValueError("lengths must be positive")
    order = sorted(range(len(lengths)), key=lambda index: _ticket(seed, epoch, index))
    return [pack(step, lengths, tokens_per_batch) for step in _evenly(order, groups_per_step)]


def _evenly(order: Sequence[int], most: int) -> list[list[int]]:
    """`order` cut into as few pieces of at most `most` as possible, sizes falling by at most one."""
    count = -(-len(order) // most)
    steps, at = [], 0
    for left in range(count, 0, -1):
        size = -(-(len(order) - at) // left)
        steps.append(list(order[at : at + size]))
        at += size
    return steps


def _ticket(seed: int, epoch: int, index: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest()


def pack(indices: Sequence[int], lengths: Sequence[int], tokens_per_batch: int) -> Step:
    """First-fit decreasing: within 11/9 of the fewest micro-batches possible."""
    batches: Step = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: -lengths[i]):  # stable: equal lengths keep the shuffled order
        fit = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if fit is None:
            batches.append([index])
            room.append(tokens_per_batch - lengths[index])
        else:
            batches[fit].append(index)
            room[fit] -= lengths[index]
    return batches


def deal(indices: Sequence[int], lengths: Sequence[int], hands: int) -> list[list[int]]:
    """The groups of a step for each of `hands` processes, so that the longest hand is short: the longest group left
    goes to the process with the fewest tokens, which is within 4/3 of the best. A hand may be empty."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    tokens = [0] * hands
    for index in sorted(indices, key=lambda i: -lengths[i]):  # stable, so a pure function of its arguments
        lightest = tokens.index(min(tokens))
        dealt[lightest].append(index)
        tokens[lightest] += lengths[index]
    return dealt


def over_budget(lengths: Sequence[int], tokens_per_batch: int) -> list[int]:
    """Indices of the groups longer than a micro-batch's budget; `plan_epoch` lets each have a micro-batch alone.

    Raises ValueError for a budget below 1.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be positive, got {tokens_per_batch}")
    return [index for index, length in enumerate(lengths) if length > tokens_per_batch]
