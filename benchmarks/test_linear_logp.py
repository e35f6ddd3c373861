"""linear_logp, and the mean NLL made of it, against full logits and the peers: see gated.py."""

from __future__ import annotations

import pytest

from benchmarks.gated import grid, run


@pytest.mark.parametrize(("case", "side"), [*grid("linear_logp"), *grid("mean_nll")])
def test_linear_logp(benchmark, case, side):
    run(benchmark, case, side)
