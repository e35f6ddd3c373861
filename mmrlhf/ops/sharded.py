"""A head whose vocabulary lies on several ranks, and DTensor heads.

`VocabShard`: each rank of a group holds consecutive rows of the weight (of bias and an adapter's b too), and all of
them call the op with the same hidden rows and targets (tensor parallelism). z_y, S' and dlogp/dh [N, H] are all-reduced
in the forward, and a flag a row for those done again; the backward communicates nothing. Loss and the gradient of
hidden are whole, and the same, on every rank; the gradients of weight, bias and b are those of the rank's own rows.

A DTensor weight, bias, a or b is made plain first. On a mesh dimension called "tp" rows stay where they are: that is a
`VocabShard`. Over every other dimension (FSDP2) ranks have rows of their own, so the weight is gathered, and its
gradient reduced to the shards by the mean, as FSDP2 does with its own.
Not covered: torch.compile; hidden as a DTensor; rows that differ between the ranks of a `VocabShard`.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmrlhf.ops import checks

TENSOR_PARALLEL = "tp"  # the mesh dimension that says: the vocabulary stays sharded


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary each rank of `group` holds: rank i those from bounds[i] to bounds[i + 1].

    Cuts may be uneven, and a rank may hold none. The same on every rank. Raises ValueError for bounds that do not run
    from 0 up with one entry a rank and one more, RuntimeError without an initialised process group.
    """

    bounds: tuple[int, ...]
    group: Any = None  # torch.distributed.ProcessGroup; None: all ranks

    def __post_init__(self) -> None:
        wanted = _world(self.group) + 1
        numbers = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in self.bounds)
        rising = numbers and all(low <= high for low, high in itertools.pairwise(self.bounds))
        if not rising or len(self.bounds) != wanted or self.bounds[0] != 0 or self.bounds[-1] == 0:
            raise ValueError(
                f"bounds must be {wanted} whole numbers for the {wanted - 1} ranks of the group, from 0 up to the size "
                f"of the vocabulary, never falling; got {self.bounds}"
            )

    @classmethod
    def even(cls, total: int, group: Any = None) -> VocabShard:
        """`total` rows cut as torch.chunk and DTensor's Shard(0) cut them: the last ranks may have fewer, or none."""
        checks.positive("total", total)
        world = _world(group)
        size = -(-total // world)
        return cls(tuple(min(rank * size, total) for rank in range(world + 1)), group)

    @property
    def start(self) -> int:
        return self.bounds[dist.get_rank(self.group)]

    @property
    def stop(self) -> int:
        return self.bounds[dist.get_rank(self.group) + 1]

    @property
    def total(self) -> int:
        """Rows of the whole vocabulary."""
        return self.bounds[-1]

    @property
    def largest(self) -> int:
        """Rows of the rank that holds most."""
        return max(high - low for low, high in itertools.pairwise(self.bounds))

    def local(self, targets: Tensor) -> Tensor:
        """Global token ids as rows of this rank's weight, -1 where another rank has them."""
        mine = (targets >= self.start) & (targets < self.stop)
        return torch.where(mine, targets - self.start, -1)

    def sum_(self, tensor: Tensor) -> None:
        if tensor.numel():
            dist.all_reduce(tensor, group=self.group)

    def max_(self, tensor: Tensor) -> None:
        if tensor.numel():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def any(self, flags: Tensor) -> Tensor:
        """Where any rank says True: what all ranks do next must not hang on a rounding."""
        shared = flags.int()
        self.max_(shared)
        return shared.bool()

    def gather(self, rows: Tensor) -> Tensor:
        """All ranks' rows [V, ...] from this rank's; the gradient is that of this rank's rows. For the reference."""
        return _Gathered.apply(rows, self)

    def check(self, weight: Tensor, targets: Tensor) -> None:
        """ValueError where the weight's rows are not those the bounds say, or (if values may be looked at) the ranks
        came with different rows to score, or cuts of the vocabulary."""
        if weight.shape[0] != self.stop - self.start:
            raise ValueError(
                f"weight must have the {self.stop - self.start} rows [{self.start}, {self.stop}) that shard.bounds "
                f"gives this rank, got {list(weight.shape)}"
            )
        if not checks.visible(targets):
            return
        flat = targets.reshape(-1).long()
        # Weighted by their places, so that the same targets in another order differ. A tuple of integers has one hash
        # in every process, unlike a string.
        order = torch.arange(1, flat.numel() + 1, device=flat.device) % 65521
        cut = hash(self.bounds) % (1 << 40)
        facts = torch.tensor([flat.numel(), weight.shape[1], cut], device=flat.device)
        facts = torch.cat([facts, (flat * order).sum()[None]])
        extremes = torch.cat([facts, -facts])
        self.max_(extremes)
        if not torch.equal(extremes[:4], -extremes[4:]):
            raise ValueError(
                "with a shard, every rank of the group must call with the same hidden rows, targets and bounds; they "
                f"differ in {_differing(extremes)} (under data parallelism, gather the weight instead)"
            )


def _differing(extremes: Tensor) -> str:
    """What the ranks disagree on; `extremes` [8]: the largest of each of the four facts, then of their negatives."""
    names = ("the number of rows", "the width H", "bounds", "targets")
    return " and ".join(n for n, high, low in zip(names, extremes[:4], -extremes[4:], strict=True) if high != low)


def _world(group: Any) -> int:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("a VocabShard needs torch.distributed.init_process_group (gloo on the CPU, nccl on CUDA)")
    return dist.get_world_size(group)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, shard):
        ctx.shard = shard
        padded = rows.new_zeros(shard.largest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        ranks = [torch.empty_like(padded) for _ in shard.bounds[1:]]
        dist.all_gather(ranks, padded, group=shard.group)
        sizes = (high - low for low, high in itertools.pairwise(shard.bounds))
        return torch.cat([rank[:size] for rank, size in zip(ranks, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.shard.start : ctx.shard.stop], None


def is_dtensor(value: object) -> bool:
    """Without importing what nobody here may use: a DTensor cannot exist before its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_rows(tensor: Any) -> Tensor:
    """What this rank has of a DTensor: the same storage, outside autograd."""
    return tensor.detach().to_local()


def shard_of(weight: Any, shard: VocabShard | None) -> tuple[int | None, VocabShard | None]:
    """(the mesh dimension over which the DTensor `weight` stays cut, its `VocabShard`), or (None, None): gather it.

    Raises ValueError where an explicit `shard` does not describe the DTensor.
    """
    mesh, names = weight.device_mesh, weight.device_mesh.mesh_dim_names or ()
    cut = names.index(TENSOR_PARALLEL) if TENSOR_PARALLEL in names else None
    if shard is not None and cut is None:
        cut = 0 if mesh.ndim == 1 else None
    if cut is None or not weight.placements[cut].is_shard(0):
        if shard is not None:
            raise ValueError(
                f"shard was given, but weight is a DTensor with placements {list(weight.placements)} on mesh "
                f"dimensions {list(names) or mesh.ndim}: it must be Shard(0) on one called {TENSOR_PARALLEL!r}, or on "
                "the only one; or pass weight.to_local()"
            )
        return None, None
    found = VocabShard.even(weight.shape[0], mesh.get_group(cut))
    if shard is not None and shard.bounds != found.bounds:
        raise ValueError(f"shard.bounds is {shard.bounds}, but the DTensor weight is cut at {found.bounds}")
    return cut, found


def plain(tensor: Tensor | None, cut: int | None = None) -> Any:
    """A DTensor as a plain tensor, gathered over every mesh dimension but `cut`; what is none comes back as it is.

    The gradient goes back as a DTensor of the same placements: over the gathered dimensions the mean of the ranks'.
    """
    return _Plain.apply(tensor, cut) if is_dtensor(tensor) else tensor


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, cut):
        from torch.distributed.tensor import Partial, Replicate, Shard

        def over(each):
            return [Shard(0) if dim == cut else each for dim in range(tensor.device_mesh.ndim)]

        ctx.mesh, ctx.to, ctx.shape, ctx.stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        ctx.come, ctx.ranks = over(Partial()), math.prod(s for d, s in enumerate(ctx.mesh.shape) if d != cut)
        return tensor.redistribute(placements=over(Replicate())).to_local()

    @staticmethod
    def backward(ctx, grad):
        from torch.distributed.tensor import DTensor

        partial = DTensor.from_local(
            grad / ctx.ranks, ctx.mesh, ctx.come, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return partial.redistribute(placements=ctx.to), None
