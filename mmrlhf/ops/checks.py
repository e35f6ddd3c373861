"""Checks at the public functions: TypeError or ValueError that name the argument, what came and what is allowed.

Shapes, dtypes and devices are always checked. Values (targets, pairs, cu_seqlens, weights) are checked on the CPU,
where looking is free; on another device looking would wait for it, so there only with MMRLHF_CHECK_VALUES=1.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCORE_DTYPES = (torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], hint: str = "") -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of {_names(dtypes)}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {str(value.dtype).removeprefix('torch.')}{hint}")
    return value


def shape(name: str, value: Tensor, wanted: tuple[int, ...], why: str) -> None:
    if tuple(value.shape) != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)} ({why}), got {list(value.shape)}")


def same_device(first: str, tensor_: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if isinstance(other, Tensor) and other.device != tensor_.device:
            raise ValueError(
                f"{name} is on {other.device} but {first} is on {tensor_.device}: they must be on one device"
            )


def positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value!r}")


def not_negative(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and 0 or more, got {value!r}")


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def traced(value: Tensor) -> bool:
    """Whether there are no values: the code is being compiled or exported, or the tensor is a meta or fake one."""
    if torch.compiler.is_compiling():
        return True
    return isinstance(value, Tensor) and (value.is_meta or type(value).__name__ == "FakeTensor")


def visible(value: Tensor) -> bool:
    """Whether looking at the values costs no wait for a device, or was asked for. Traced code has none to look at."""
    if traced(value):
        return False
    return value.device.type == "cpu" or os.environ.get("MMRLHF_CHECK_VALUES") == "1"


def values(name: str, value: Tensor, bad: Tensor, allowed: str) -> None:
    """Raise for the first entry of `value` where `bad`, if values may be looked at."""
    if visible(value) and bool(bad.any()):
        at = int(bad.flatten().nonzero()[0])
        raise ValueError(f"{name} must be {allowed}; entry {at} is {value.flatten()[at].item()}")


def head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    *,
    double: bool = False,
    empty: bool = False,
) -> None:
    """hidden [..., H], weight [V, H], bias [V]: one float dtype (float64 if `double`), one device; scale and cap.

    `empty`: V may be 0, as of a rank that holds no row of a sharded vocabulary.
    """
    dtypes = (*HEAD_DTYPES, torch.float64) if double else HEAD_DTYPES
    for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if value is not None or name != "bias":
            is_double = getattr(value, "dtype", None) == torch.float64
            hint = "; mmrlhf.ops.reference (backend='reference') is exact in float64" if is_double else ""
            tensor(name, value, dtypes, hint)
    if hidden.dim() < 1:
        raise ValueError(f"hidden must have shape [..., H], got {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape [V, H] with H = {hidden.shape[-1]} of hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if weight.shape[0] == 0 and not empty:
        raise ValueError(f"weight must have at least one row (a token of the vocabulary), got {list(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight is {str(weight.dtype).removeprefix('torch.')} but hidden is "
            f"{str(hidden.dtype).removeprefix('torch.')}: cast one of them, or run under torch.autocast"
        )
    if bias is not None:
        shape("bias", bias, (weight.shape[0],), "one entry a row of weight")
    same_device("hidden", hidden, weight=weight, bias=bias)
    positive("logit_scale", logit_scale)
    if softcap is not None:
        positive("softcap", softcap)


def targets(targets: Tensor, hidden: Tensor, vocab: int, ignore_index: int | None) -> None:
    """targets [...]: int32 or int64, the shape of hidden without H, in [0, V) or ignore_index."""
    tensor("targets", targets, INDEX_DTYPES)
    shape("targets", targets, tuple(hidden.shape[:-1]), f"one token a row of hidden {list(hidden.shape)}")
    same_device("hidden", hidden, targets=targets)
    if not visible(targets):
        return  # not even compared: that would be three launches for nothing
    bad, allowed = (targets < 0) | (targets >= vocab), f"token ids in [0, {vocab})"
    if ignore_index is not None:
        bad, allowed = bad & (targets != ignore_index), f"{allowed} or ignore_index {ignore_index}"
    values("targets", targets, bad, allowed)


def cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """cu_seqlens [R + 1]: int32 or int64, from 0 to N, never falling."""
    tensor("cu_seqlens", cu_seqlens, INDEX_DTYPES)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [R + 1], got {list(cu_seqlens.shape)}")
    if visible(cu_seqlens):
        if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens:
            raise ValueError(
                f"cu_seqlens must run from 0 to {tokens} (the number of tokens), "
                f"got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
            )
        values("cu_seqlens", cu_seqlens[1:], cu_seqlens.diff() < 0, "in ascending order")


def pairs(pairs: Tensor, responses: int) -> None:
    """pairs [P, 2]: int32 or int64, two different responses in [0, R)."""
    tensor("pairs", pairs, INDEX_DTYPES)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape [P, 2] (better, worse), got {list(pairs.shape)}")
    if not visible(pairs):
        return
    values("pairs", pairs, (pairs < 0) | (pairs >= responses), f"responses in [0, {responses})")
    values("pairs", pairs[:, 0], pairs[:, 0] == pairs[:, 1], "two different responses a pair")


def finite_weights(name: str, value: Tensor | None, count: int, why: str, like: Tensor) -> None:
    """An optional [count] tensor of weights: floating, finite, 0 or more, on the device of `like`."""
    if value is None:
        return
    tensor(name, value, (*HEAD_DTYPES, torch.float64))
    shape(name, value, (count,), why)
    same_device("the scores", like, **{name: value})
    if visible(value):
        values(name, value, ~(value.isfinite() & (value >= 0)), "finite and 0 or more")
