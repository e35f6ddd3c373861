"""fused_preference_loss against full logits and the peers (DPO, pairs of equal length): see gated.py."""

from __future__ import annotations

import pytest

from benchmarks.gated import grid, run


@pytest.mark.parametrize(("case", "side"), grid("fused_preference_loss"))
def test_fused_preference_loss(benchmark, case, side):
    run(benchmark, case, side)
