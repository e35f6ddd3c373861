"""The whole step under pytest-benchmark; `python -m benchmarks.train_step` prints ratios.

The timer reads the seconds that the steps themselves took, so that building a trainer does not count.
"""

from __future__ import annotations

import pytest

from benchmarks.step_models import build_model, build_processor, build_records
from benchmarks.train_step import LOSS_TOLERANCE, sides

SPENT = {"seconds": 0.0}
CASES = {"pair": 2, "five_ranked": 5}


@pytest.fixture(scope="module", params=list(CASES))
def contestants(request):
    pytest.importorskip("trl", minversion="1.15")
    processor = build_processor()
    model = build_model("small", processor)
    records = build_records(1, image_tokens=290, response_tokens=100, k=CASES[request.param])
    return sides(model, processor, records)


@pytest.fixture(scope="module")
def expected(contestants):
    """TRL's losses of two steps: what every side must give before it is timed."""
    return contestants["trl"]().run(2)[1]


@pytest.mark.benchmark(timer=lambda: SPENT["seconds"])
@pytest.mark.parametrize("side", ["trl", "live reference", "cached reference", "separate rows"])
def test_train_step(benchmark, contestants, expected, side):
    contestant = contestants[side]()
    assert contestant.run(2)[1] == pytest.approx(expected, abs=LOSS_TOLERANCE)

    def step():
        SPENT["seconds"] += sum(contestant.run(2)[0][1:])

    benchmark.pedantic(step, rounds=3)
