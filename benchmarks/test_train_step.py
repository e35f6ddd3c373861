"""The whole step under pytest-benchmark; `python -m benchmarks.train_step` prints ratios.

The timer reads the seconds that the steps themselves took, so that building a trainer does not count.
"""

from __future__ import annotations

import pytest

from benchmarks.step_case import DEFAULT_SIDES
from benchmarks.step_models import build_model, build_processor, build_records
from benchmarks.step_sides import builders
from benchmarks.train_step import LOSS_TOLERANCE

SPENT = {"seconds": 0.0}
CASES = {"pair": 2, "five_ranked": 5}


@pytest.fixture(scope="module", params=list(CASES))
def contestants(request):
    pytest.importorskip("trl", minversion="1.15")
    processor = build_processor()
    model = build_model("small", processor)
    records = build_records(1, image_tokens=290, response_tokens=100, k=CASES[request.param])
    return builders(model, processor, records, DEFAULT_SIDES)


@pytest.fixture(scope="module")
def expected(contestants):
    """TRL's losses of two steps: what every side must give before it is timed."""
    return contestants["trl"]().run(2).losses


@pytest.mark.benchmark(timer=lambda: SPENT["seconds"])
@pytest.mark.parametrize("side", DEFAULT_SIDES)
def test_train_step(benchmark, contestants, expected, side):
    contestant = contestants[side]()
    assert contestant.run(2).losses == pytest.approx(expected, abs=LOSS_TOLERANCE["float32"])

    def step():
        SPENT["seconds"] += sum(contestant.run(2).seconds[1:])

    benchmark.pedantic(step, rounds=3)
