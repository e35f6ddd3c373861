"""Ordinary rows: the model's own forward, one full row a response, and the comparison of another path with it."""

from __future__ import annotations

import copy
import inspect

import torch

from mmrlhf.models.parts import inner_model
from tiny import TinyGroup, tiny_model


def ordinary_hidden(model, groups: list[TinyGroup]) -> torch.Tensor:
    """[N, H]: each response as a full row of its own, with its own pixels, through the model's own forward."""
    inner = inner_model(model)
    pieces = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([group.prefix + response])
            types = torch.tensor([group.token_types + [0] * len(response)])
            extra = {"token_type_ids": types, "mm_token_type_ids": types}
            extra = {
                name: value for name, value in extra.items() if name in inspect.signature(inner.forward).parameters
            }
            pixels = {
                name: value.to(inner.dtype) if value.is_floating_point() else value
                for name, value in group.vision.items()
            }
            out = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **pixels, **extra)
            first = len(group.prefix) - 1
            pieces.append(out.last_hidden_state[0, first : first + len(response)])
    return torch.cat(pieces)


def gradients(model, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of a fixed random linear functional of the hidden states, for every parameter that trains."""
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden.dtype)
    model.zero_grad()
    (hidden * direction).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, other, hidden, want, *, tolerance: float):
    """Values and every gradient within a relative tolerance (L2, a tensor)."""
    assert hidden.shape == want.shape
    assert relative(hidden, want) <= tolerance
    got, expected = gradients(model, hidden), gradients(other, want)
    assert got.keys() == expected.keys()
    assert got
    largest = torch.stack([g.norm() for g in expected.values()]).max()
    for name, want_grad in expected.items():
        # A tower's key bias shifts all scores of a query alike: its gradient is zero, and rounding is all there is.
        if want_grad.norm() <= 1e-7 * largest:
            assert got[name].norm() <= 1e-7 * largest, name
        else:
            assert relative(got[name], want_grad) <= tolerance, name


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def pair(family: str, **text):
    """Two models with the same weights, the second never touched by the packed path, and a processor."""
    model, processor = tiny_model(family, **text)
    other = copy.deepcopy(model)
    return model, other, processor
