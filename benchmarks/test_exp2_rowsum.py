"""exp2_rowsum: the exponentials and row sums of one vocabulary block, in place, against the same in PyTorch.

    pytest benchmarks/test_exp2_rowsum.py

The floor is the bytes: 4 read and 4 written an element. Each round starts from a fresh copy of the logits, untimed;
no path is timed before it agrees with float64. Tiles: one that fits the CPU's cache, as streaming makes them, and one
that does not.
"""

from __future__ import annotations

import pytest
import torch

_C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")

LOG2E = 1.4426950408889634
BYTES = 8  # an element


def by_torch(tile, offset, sums):
    """The natural base, which torch is fastest in: exp(z - k / log2(e))."""
    tile.sub_((offset / LOG2E)[:, None]).exp_()
    torch.sum(tile, 1, out=sums)


def by_extension(isa):
    return lambda tile, offset, sums: _C.exp2_rowsum_(tile, offset, sums, threads=torch.get_num_threads(), isa=isa)


PATHS = {"torch": by_torch} | {isa: by_extension(isa) for isa in _C.build_info()["isas"]}


@pytest.mark.parametrize(("rows", "cols"), [(256, 2048), (2048, 4096)], ids=["256x2048", "2048x4096"])
@pytest.mark.parametrize("path", list(PATHS))
def test_exp2_rowsum(benchmark, path, rows, cols):
    logits = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)) * 5
    offset = (logits[:, 0] * LOG2E).round()
    tile, sums = logits.clone(), torch.empty(rows)

    PATHS[path](tile, offset, sums)
    truth = torch.exp2(logits.double() * LOG2E - offset.double()[:, None])
    torch.testing.assert_close(tile.double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.double(), truth.sum(1), rtol=1e-5, atol=0)

    def fresh():
        tile.copy_(logits)
        return (tile, offset, sums), {}

    benchmark.pedantic(PATHS[path], setup=fresh, rounds=20, warmup_rounds=2, iterations=1)
    seconds = benchmark.stats.stats.min
    benchmark.extra_info.update(threads=torch.get_num_threads(), gigabytes_a_second=rows * cols * BYTES / seconds / 1e9)
