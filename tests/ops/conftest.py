"""Fixtures of the ops' tests."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import backend


@pytest.fixture(params=["torch", "cpu"])
def head_backend(request):
    """The backend that every op of the test runs on, unless the test asks for another."""
    row = next(row for row in backend.BACKENDS if row.name == request.param)
    refusal = row.refuse((torch.zeros(1, 1),))
    if refusal is not None:
        pytest.skip(refusal)
    with backend.use_backend(request.param):
        yield request.param
