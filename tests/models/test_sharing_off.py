"""`model.share_prefix=false` trains the same: 50 steps of the whole loop, a prefix of its own for every response."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmrlhf.train.loop import train
from tiny import tiny_model
from tinyrun import facts_of, make_data, metrics_of, settings_for


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), 10, k=3)


@pytest.mark.parametrize(
    ("family", "words"),
    [("qwen2_5_vl", ()), ("gemma3", ("lora.enabled=true", "lora.r=4"))],
    ids=["full", "lora"],
)
def test_fifty_steps_without_sharing_have_the_same_losses(family, words, tmp_path, data):
    """Rounding is all that may differ: each loss within 1e-4, and the run has learned something by then."""
    lines = []
    for share in ("true", "false"):
        model, processor = tiny_model(family)
        out = tmp_path / share
        settings = settings_for(out, data, f"model.share_prefix={share}", "epochs=10", "max_steps=50", *words)
        train(settings, model=model, processor=processor)
        assert facts_of(out)["share_prefix"]["used"] is (share == "true")
        lines.append(metrics_of(out))
    shared, apart = lines
    assert len(shared) == len(apart) == 50
    for one, other in zip(shared, apart, strict=True):
        assert one["tokens"] < other["tokens"]  # a prompt a group, and a prompt a response
        assert abs(one["loss"] - other["loss"]) <= 1e-4, one["step"]
    assert sum(line["loss"] for line in shared[-5:]) < 0.9 * sum(line["loss"] for line in shared[:5])
