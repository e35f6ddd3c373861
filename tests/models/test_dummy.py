"""A batch of text touches the tower where other ranks wait for it: nothing changes but that gradients are zeros."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrlhf.models import dummy, shared_prefix, vision
from mmrlhf.models.parts import inner_model, vision_parameters
from ordinary import pair, relative
from tiny import FAMILIES, batch_of, tiny_groups, tiny_model

WORKER = Path(__file__).with_name("tower_worker.py")
VIDEO = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_smallest_picture(family):
    """Every tower parameter that a picture's gradient reaches gets zeros; hidden states and other gradients stay."""
    model, other, processor = pair(family)
    pictured = batch_of(tiny_groups(processor, (2,), seed=2, images=(2,), sizes=((28, 28), (56, 28))))
    shared_prefix.response_hidden(other, pictured).sum().backward()
    reached = {name for name, p in other.named_parameters() if p.grad is not None}
    other.zero_grad()
    text = batch_of(tiny_groups(processor, (2, 3), seed=3, images=(0, 0)))
    want = shared_prefix.response_hidden(other, text)
    want.sum().backward()
    touched = vision.encode(model, text, grad=True, touch=("image",))
    assert touched.image is None
    assert touched.touch is not None
    assert float(touched.touch.detach()) == 0.0
    hidden = shared_prefix.response_hidden(model, text, vision=touched)
    assert relative(hidden, want) <= 1e-6
    hidden.sum().backward()
    theirs = dict(other.named_parameters())
    tower = {id(p) for p in vision_parameters(model)}
    for name, parameter in model.named_parameters():
        if id(parameter) in tower:
            assert (parameter.grad is not None) == (name in reached), name
            assert parameter.grad is None or not parameter.grad.any(), name
        elif theirs[name].grad is not None:
            assert relative(parameter.grad, theirs[name].grad) <= 1e-5 or not theirs[name].grad.any(), name


@pytest.mark.parametrize("family", VIDEO)
def test_a_kind_that_is_missing_is_touched_beside_one_that_is_there(family):
    model, processor = tiny_model(family)
    batch = batch_of(tiny_groups(processor, (2,), seed=2, images=(1,)))
    features = vision.encode(model, batch, grad=True, touch=("image", "video"))
    assert features.image is not None
    assert features.touch is not None
    want = shared_prefix.response_hidden(model, batch)
    assert relative(shared_prefix.response_hidden(model, batch, vision=features), want) <= 1e-6


def test_a_tower_that_overflows_does_not_reach_the_loss():
    """0 * inf is NaN: a tower whose features are not finite must not spoil a batch that has no pictures."""
    model, processor = tiny_model("qwen2_5_vl")
    with torch.no_grad():
        model.model.visual.merger.mlp[-1].weight.fill_(torch.inf)
    text = batch_of(tiny_groups(processor, (2,), images=(0,)))
    touched = vision.encode(model, text, grad=True, touch=("image",))
    assert bool(torch.isfinite(shared_prefix.response_hidden(model, text, vision=touched)).all())


def test_one_process_runs_no_dummy_and_several_do(monkeypatch):
    model, processor = tiny_model("llava")
    text = batch_of(tiny_groups(processor, (2,), images=(0,)))
    assert not dummy.needed(model)
    assert vision.encode(model, text, grad=True).touch is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert vision.encode(model, text, grad=True).touch is not None
    assert vision.encode(model, text, grad=True, touch=()).touch is None
    with torch.no_grad():  # nothing is gathered for a whole tower, and no gradient is waited for
        assert vision.encode(model, text, grad=True).touch is None
    vision.freeze(model)
    assert not dummy.needed(model)
    next(iter(vision_parameters(model))).ds_id = 0  # ZeRO-3: running it gathers
    assert dummy.needed(model)
    with pytest.raises(ValueError, match="LlavaModel takes no videos"):
        dummy.inputs(inner_model(model), ("video",))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_rank_of_text_alone_does_not_hang_the_others(tmp_path):
    """Two processes, one of them without pictures: `fully_shard` (tower trained, tower frozen) and DDP."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(WORKER), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert sorted(path.stem for path in tmp_path.glob("*.ok")) == ["ddp-trained", "sharded-frozen", "sharded-trained"]
