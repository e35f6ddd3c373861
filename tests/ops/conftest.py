"""Fixtures of the ops' tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from mmrlhf.ops import backend, streaming
from triton_interpreter import patched_once, tiles


@pytest.fixture(params=["torch", "cpu"])
def head_backend(request):
    """The backend that every op of the test runs on, unless the test asks for another."""
    row = next(row for row in backend.BACKENDS if row.name == request.param)
    refusal = row.refuse((torch.zeros(1, 1),))
    if refusal is not None:
        pytest.skip(refusal)
    with backend.use_backend(request.param):
        yield request.param


@pytest.fixture
def one_tile(head_backend):
    """In Triton's interpreter as few programs as can be, for a test that is not about them."""
    with contextlib.ExitStack() as stack:
        if head_backend == "triton":
            stack.enter_context(patched_once())
            stack.enter_context(tiles("whole"))
        yield head_backend


@contextlib.contextmanager
def _cut(rows: int, columns: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as change:
        for of_device, most in ((streaming._ROWS, rows), (streaming._COLUMNS, columns)):
            change.setitem(of_device, "cpu", most)
        yield


@pytest.fixture
def cut_tiles():
    """`with cut_tiles(rows, columns)`: what a CPU takes at most at a time, where it is 1024 rows and 1536 columns."""
    return _cut


@pytest.fixture
def small_tiles(request, monkeypatch):
    """Tiles of at most 8 rows and 256 columns: a test's 47 rows of 1301 columns are 6 tiles by 6 blocks, the last of
    each ragged. That several of both came is asserted after the test.

    The triton backend gets what its interpreter calls cut: 16 rows and 64 columns, and patched a third cheaper.
    """
    if "head_backend" in request.fixturenames and request.getfixturevalue("head_backend") == "triton":
        with patched_once(), tiles("cut"):
            yield
        return
    real, cuts = streaming.pick, set()

    def pick(rows: int, vocab: int, device_type: str = "cpu") -> streaming.Tiles:
        found = real(rows, vocab, device_type)
        cuts.add((rows > found.rows, vocab > found.columns))
        return found

    monkeypatch.setattr(streaming, "pick", pick)
    with _cut(8, 256):
        yield
    assert (True, True) in cuts, "no pass had several tiles of rows and several blocks of columns"
