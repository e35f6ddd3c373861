"""What the `finish` kernels write of each row besides its log-probability, and how they are asked for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmrlhf.kernels.triton import configs

STATISTICS = 5  # rows of `partial` with statistics; 1 without


@dataclass(frozen=True)
class Statistics:
    """What a pass over the vocabulary gives for nothing, each [N]; the target's own token is counted in."""

    entropy: Tensor  # float32, nats
    sum_p2: Tensor  # float32, sum of squared probabilities
    is_top1: Tensor  # int8, 1 where no other token has a larger logit
    mean_logit: Tensor  # float32, nats
    maximum: Tensor  # float32, the largest logit, nats

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Statistics:
        def one() -> Tensor:
            return torch.empty(rows, dtype=torch.float32, device=device)

        return cls(one(), one(), torch.empty(rows, dtype=torch.int8, device=device), one(), one())

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """As the `finish` kernels take them."""
        return self.entropy, self.sum_p2, self.is_top1, self.mean_logit, self.maximum


def finish_arguments(
    partial: Tensor, statistics: Statistics | None
) -> tuple[tuple[Tensor | None, ...], dict[str, int]]:
    """What every `finish` kernel is given: the statistics that it writes, or None for each, and the constants."""
    assert (partial.shape[0] == STATISTICS) == (statistics is not None), "5 rows of partial sums are the statistics"
    config = configs.FINISH
    constants = {
        "STATS": statistics is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_T": config.block_other,
        "num_warps": config.num_warps,
    }
    return (None,) * STATISTICS if statistics is None else statistics.outputs, constants
