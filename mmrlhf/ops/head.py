"""The head as the engines take it, and what a pass over the vocabulary knows of each row. No pass is here.

    z = softcap * tanh((logit_scale * (h W^T + u B^T) + bias) / softcap)      u B^T: a LoRA's part, or none

u [N, r] comes with the rows, B [V, r] with the head: the adapter is one more GEMM of depth r on every tile, and no
merged weight is made. With a `shard`, W, B and bias are this rank's rows of the vocabulary; a target that another rank
has is -1 here, and adds nothing. Then z_y, S' and dlogp/dh are summed over the ranks, everything else is local.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops.sharded import VocabShard

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


def exp2_(
    logits: Tensor,  # [n, c] float32
    offset: Tensor,  # [n, 1] float32, integers
) -> Tensor:
    """logits <- 2^(logits * log2(e) - offset), in place.

    The offset is taken off first: a product is rounded in proportion to its size, small near the target.
    (exp_ would save the product, and takes 2.8x as long as exp2_ here.)
    """
    return logits.sub_(offset * LN2).mul_(LOG2E).exp2_()


def exp2_rowsum_(
    tile: Tensor,  # [n, c] float32, logits of the columns from `start` on
    offset: Tensor,  # [n]
    rest: Tensor | None = None,  # [n] float32
    targets: Tensor | None = None,  # [n] int64
    start: int = 0,
    value: Tensor | None = None,  # [n] float32
) -> Tensor:
    """tile <- 2^(tile * log2(e) - offset), in place; returns row sums [n]. All that a compiled epilogue does.

    With `rest` and `targets`, for a block of a head: the target's column, where the block has it, is left out of the
    sum and becomes `value`, or 0; and the sums are added to `rest`, which is returned.
    """
    if rest is None or targets is None:
        return exp2_(tile, offset[:, None]).sum(1)
    place_(tile, targets, start, -math.inf)
    rest += exp2_(tile, offset[:, None]).sum(1)
    if value is not None:
        place_(tile, targets, start, value)
    return rest


def place_(tile: Tensor, targets: Tensor, start: int, value: float | Tensor) -> None:
    """Write `value` into each row's target column, where the block from `start` on has it, without waiting for the
    device. tile [n, c], targets [n]."""
    local = targets - start
    inside = (local >= 0) & (local < tile.shape[1])
    index = local.clamp(0, tile.shape[1] - 1)[:, None]
    tile.scatter_(1, index, torch.where(inside, value, tile.gather(1, index)[:, 0])[:, None])


Epilogue = Callable[..., Tensor]  # as exp2_rowsum_


def offset_of(logit: Tensor) -> Tensor:
    """k: a logit in nats as an exponent of 2, made an integer so that 2^-k scales without rounding. [n] to [n]"""
    return (logit * LOG2E).round()


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Row by row <left, right> of [n, k] in float64. [n]

    A sum of products rounded one by one is 4 to 6 times further off than a GEMM's (2e-4 against 3e-5 nats at z = 586):
    every other logit would be measured from a worse one. A few rows at a time: the copies stay below 6 MiB on a CPU.
    """
    step = max(1, (1 << 18 if left.device.type == "cpu" else 1 << 25) // max(1, left.shape[1]))
    parts = [(a.double() * b.double()).sum(1) for a, b in zip(left.split(step), right.split(step), strict=True)]
    return torch.cat(parts) if parts else left.new_zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class Head:
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    logit_scale: float
    softcap: float | None  # nats
    up: Tensor | None = None  # [V, r], B
    shard: VocabShard | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What is no tensor."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap, "shard": self.shard}

    @property
    def wide(self) -> bool:
        """Whether the GEMM takes half precision and gives float32 by itself."""
        return self.weight.device.type == "cuda" and self.weight.dtype != torch.float32

    @property
    def most_rows(self) -> int:
        """Rows of the vocabulary held here; with a shard, by the rank that holds most: every rank says the same."""
        return self.weight.shape[0] if self.shard is None else self.shard.largest

    def block(self, start: int, stop: int) -> Tensor:
        """Rows of the weight in the dtype the GEMMs take. [stop - start, H]

        Contiguous, as hidden is, so that a strided input gives bitwise what its copy gives.
        """
        block = self.weight[start:stop].contiguous()
        return block if self.wide or block.dtype == torch.float32 else block.float()

    def up_block(self, start: int, stop: int) -> Tensor:
        """Rows of B in float32. [stop - start, r]"""
        assert self.up is not None
        return self.up[start:stop].float().contiguous()

    def rows(self, hidden: Tensor) -> Tensor:
        """Hidden rows in the dtype the GEMMs take. [n, H]"""
        return hidden if self.wide else hidden.float()

    def project_(
        self,
        rows: Tensor,  # [n, H], of `rows`
        block: Tensor,  # [c, H], of `block` from `start` on
        start: int,
        tile: Tensor,  # [n, c] float32 out
        low: Tensor | None = None,  # [n, r] float32
    ) -> Tensor | None:
        """tile [n, c] <- logits z; returns their slope dz / d(uncapped z) [n, c] where there is a cap."""
        if self.wide:
            torch.mm(rows, block.T, out_dtype=torch.float32, out=tile)
        else:
            torch.mm(rows, block.T, out=tile)
        stop = start + block.shape[0]
        if low is not None:
            tile.addmm_(low, self.up_block(start, stop).T)
        return self._cap_(self._affine_(tile, None if self.bias is None else self.bias[start:stop]))

    def local(self, targets: Tensor) -> Tensor:
        """Targets as rows of the weight held here, int64; -1 for another rank's."""
        return targets.long() if self.shard is None else self.shard.local(targets.long())

    def at(self, matrix: Tensor, targets: Tensor) -> Tensor:
        """The targets' rows of `matrix` [V, any] in float32; zeros where another rank has them. [n, any]"""
        if self.shard is None:
            return matrix[targets].float()
        if matrix.shape[0] == 0:
            return matrix.new_zeros(targets.shape[0], matrix.shape[1], dtype=torch.float32)
        return torch.where((targets >= 0)[:, None], matrix[targets.clamp(min=0)].float(), 0)

    def target(self, rows: Tensor, targets: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The targets' logits z_y [n] by gather-dot, and their slope [n] where there is a cap. `targets`: `local`."""
        z = _dots(rows, self.at(self.weight, targets))
        if low is not None and self.up is not None:
            z += _dots(low, self.at(self.up, targets))
        z = z.float()
        self._affine_(z, None if self.bias is None else self.at(self.bias[:, None], targets)[:, 0])
        self.sum_(z)
        return z, self._cap_(z)

    def sum_(self, tensor: Tensor) -> None:
        """`tensor` <- its sum over the ranks that share the vocabulary."""
        if self.shard is not None:
            self.shard.sum_(tensor)

    def _affine_(self, z: Tensor, bias: Tensor | None) -> Tensor:
        if self.logit_scale != 1.0:
            z.mul_(self.logit_scale)
        return z if bias is None else z.add_(bias.float())

    def _cap_(self, z: Tensor) -> Tensor | None:
        if self.softcap is None:
            return None
        # 1 - tanh(a)^2 as 4 sigmoid(2a) sigmoid(-2a): by subtraction a saturated logit would keep no digit of it.
        twice = z.mul_(1 / self.softcap) * 2
        slope = torch.sigmoid(twice).mul_(torch.sigmoid(-twice)).mul_(4)
        z.tanh_().mul_(self.softcap)
        return slope


@dataclass
class Rows:
    """What a pass over the vocabulary knows of n rows."""

    targets: Tensor  # [n] int64, `Head.local`
    z_y: Tensor  # [n] target logit, nats
    slope_y: Tensor | None  # [n] slope of the cap at the target
    offset: Tensor  # [n] k, an integer
    rest: Tensor  # [n] S'
    redone: Tensor | None = None  # indices of the rows whose offset is their true maximum
    epilogue: Epilogue = exp2_rowsum_  # makes every exponential, E_y too: what it rounds alike cancels in S' / E_y

    def of(self, index: Tensor, *, offset: Tensor | None = None) -> Rows:
        """Some of the rows, as copies."""
        slope_y = None if self.slope_y is None else self.slope_y[index]
        offset = self.offset[index] if offset is None else offset
        return Rows(self.targets[index], self.z_y[index], slope_y, offset, self.rest[index], epilogue=self.epilogue)

    @property
    def e_y(self) -> Tensor:
        """E_y, the target's exponential. [n]"""
        return self.epilogue(self.z_y.clone()[:, None], self.offset)

    @property
    def total(self) -> Tensor:
        """S = S' + E_y. [n]"""
        return self.rest + self.e_y

    def logp(self) -> Tensor:
        """Log-probabilities of the targets, nats. [n]"""
        # Where k is the row's maximum (a row done again) E_y may be 0; a difference of logarithms is exact enough.
        far = self.z_y - self.offset * LN2 - torch.log(self.total)
        return torch.where(self.offset == offset_of(self.z_y), -torch.log1p(self.rest / self.e_y), far)

    def target_fix(self) -> Tensor:
        """What the target's column of E has to be for E / S to be p - onehot: -S', times its slope. [n]"""
        return -self.rest if self.slope_y is None else -self.rest * self.slope_y
