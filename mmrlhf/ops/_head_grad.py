"""The gradients of a head's weight, bias and adapter from its exponentials, for the engines of a CUDA device.

Where E comes from (kept, or made again) is the engine's own; what is summed from it is not.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mmrlhf.ops._gemm import column_sums, multiply, multiply_exact
from mmrlhf.ops.streaming import Head


def sum_gradients(
    head: Head,
    hidden: Tensor,  # [N, H]
    coef: Tensor,  # [N] float32, c = -upstream / S
    tiles: Iterable[tuple[int, int, Tensor]],  # (start, stop, E [N, c] with its targets fixed), read once
    *,
    grad_weight: Tensor | None,  # [V, H] float32, or, if nothing is added to it, the weight's own dtype
    grad_bias: Tensor | None,  # [V] float32
    add: bool = False,
    low: Tensor | None = None,  # [N, r] float32
    grad_up: Tensor | None = None,  # [V, r] float32
) -> None:
    """dW = E^T (c h), db = E^T c and dB = E^T (c low), written or added: see `streaming.weight_grad`."""
    if hidden.shape[0] == 0:
        for grad in (grad_weight, grad_bias, grad_up):
            if grad is not None and not add:
                grad.zero_()
        return
    scaled = (coef * head.logit_scale)[:, None]
    weighted = None if grad_weight is None else (hidden.float() * scaled).to(head.weight.dtype)
    for start, stop, tile in tiles:
        if grad_weight is not None and weighted is not None:
            multiply(grad_weight[start:stop], tile.T, weighted, add=add)
        if grad_up is not None and low is not None:
            multiply_exact(grad_up[start:stop], tile.T, low * scaled, add=add)
        if grad_bias is not None:
            total = column_sums(tile, coef)
            grad_bias[start:stop] = grad_bias[start:stop] + total if add else total
