"""What of the cuda backend needs no device: when it is refused and why, and how a problem is cut into blocks."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import backend

_C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
from mmrlhf.ops import _cuda, _cuda_passes, _gemm  # noqa: E402  (import the extension)


def test_it_is_never_chosen_unasked_and_says_why_it_cannot_run(monkeypatch):
    """Not measured against triton yet: to be asked for by name."""
    row = next(each for each in backend.BACKENDS if each.name == "cuda")
    assert row.automatic == ()
    with pytest.raises(RuntimeError, match=r"'cuda' was asked for .*its tensors must be on a CUDA device, not cpu"):
        backend.choose("linear_logp", torch.zeros(2, 3), requested="cuda")
    monkeypatch.setattr(_cuda.device, "build_info", lambda: {"cuda": False})
    assert _cuda.refuse((torch.zeros(1),)) == "the compiled extension was built without CUDA"


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("80-real 80-virtual 90a-real", (80, 86, 89, 90, 100, 120), (75,)),
        ("80-real", (80, 86, 89), (75, 90)),
        ("86", (86, 89, 90, 120), (80,)),
        ("90a-real", (90,), (80, 100)),
        ("90a", (90,), (100,)),
        ("80-real 90a-real", (80, 86, 90), (100,)),
        ("native", (80, 90), ()),
    ],
)
def test_which_devices_a_build_is_for(architectures, runs, does_not):
    assert all(_cuda.runs_on(architectures, capability) for capability in runs)
    assert not any(_cuda.runs_on(architectures, capability) for capability in does_not)


def test_blocks_are_whole_tiles_within_the_workspace():
    for rows in (1, 7, 512, 2048, 16_384):
        for vocab in (17, 32_001, 151_646):
            columns = _gemm.column_block(rows, vocab, 6, _cuda_passes.TILE_COLUMNS)
            assert columns == vocab or columns % _cuda_passes.TILE_COLUMNS == 0
            small = columns <= _cuda_passes.TILE_COLUMNS
            assert small or rows * columns * 6 <= _gemm.WORKSPACE_BYTES
            chunk = _gemm.row_chunk(rows, vocab, 2, 256)
            assert chunk == rows or chunk % 256 == 0
            assert chunk <= 256 or chunk * _gemm.padded(vocab) * 2 <= _gemm.WORKSPACE_BYTES
            assert -(-rows // chunk) * chunk - rows < 256 * -(-rows // chunk)


def test_kept_lies_over_bytes_with_aligned_rows():
    from mmrlhf.ops.streaming import Head

    head = Head(torch.zeros(33, 4, dtype=torch.bfloat16), None, 1.0, None)
    assert _cuda.row_bytes(head) == 48 * 2
    kept = _cuda.Kept.over(torch.empty(10 * 96, dtype=torch.uint8), 7, head)
    assert kept.matrix.shape == (7, 33)
    assert kept.matrix.stride() == (48, 1)
    assert kept.matrix.dtype == torch.bfloat16
    assert _cuda.Kept.empty(7, head).matrix.shape == (7, 33)


def test_both_engines_cut_and_multiply_alike():
    """One set of functions: what one engine learns of a GEMM or a buffer the other has."""
    from mmrlhf.ops import _cuda_passes, _triton

    for name in ("Kept", "row_bytes"):
        assert getattr(_cuda, name) is getattr(_triton, name) is getattr(_gemm, name)
    for name in ("multiply", "multiply_exact"):
        assert getattr(_cuda_passes, name) is getattr(_triton, name) is getattr(_gemm, name)
    assert _cuda.sum_gradients is _triton.sum_gradients


def test_it_takes_every_kind_of_head():
    row = next(each for each in backend.BACKENDS if each.name == "cuda")
    assert row.takes == backend.HEAD_KINDS
    assert backend.STATISTICS in row.ops
    assert hasattr(_cuda, "statistics")
