"""A checkpoint that does not fit changes nothing: every part is looked at before the first weight is copied."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmrlhf.config import OptimConfig, TrainConfig
from mmrlhf.train import checkpoint, resume
from mmrlhf.train.checkpoint import Checkpoint
from mmrlhf.train.distributed import World
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.resume import Progress
from mmrlhf.train.state import restore_rng, rng_state

CPU = torch.device("cpu")


def network(seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Sequential, Optimizer]:
    """Two layers after one step, so that AdamW has its moments."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(dtype)
    optimizer = Optimizer(model.named_parameters(), OptimConfig())
    model(torch.ones(1, 3, dtype=dtype)).square().sum().backward()
    optimizer.step(lr=0.1, grad_norm=1.0)
    optimizer.zero_grad()
    return model, optimizer


def written(folder: Path, **changes: Any) -> Checkpoint:
    """A checkpoint of the network of seed 1. `changes`: functions of its model, optimizer or state that spoil it."""
    model, optimizer = network(1)
    parts: dict[str, Any] = {
        "model": resume.saved_tensors(model, adapters_only=False),
        "optimizer": optimizer.state(),
        "state": {"progress": dataclasses.asdict(Progress(step=1)), "rng": [rng_state(CPU)]},
    }
    for name, change in changes.items():
        parts[name] = change(parts[name])
    return checkpoint.load(checkpoint.save(folder, 1, **parts))


def everything(model: torch.nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a resume may change, as values of its own."""
    tensors = {**model.state_dict(), **{f"optimizer {key}": value for key, value in optimizer.state().items()}}
    return {name: tensor.tolist() for name, tensor in tensors.items()} | {"rng": json.dumps(rng_state(CPU))}


def replaced(name: str, change: Any) -> Any:
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(*names: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def generators(**change: Any) -> Any:
    return lambda state: {**state, "rng": [{**state["rng"][0], **change}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # The last of the model's tensors: those before it fit, and would have been copied.
        (
            {"model": replaced("1.weight", lambda t: t[:, :2])},
            r"fit the model: 1\.weight is \(2, 2\) there and \(2, 4\)",
        ),
        ({"model": without("1.bias")}, r"fit the model: 1 tensors differ, for example 1\.bias"),
        ({"optimizer": lambda t: {**t, "9.bias/step": torch.tensor(1.0)}}, "1 parameters are not trained here, .* 9"),
        ({"optimizer": replaced("1.weight/exp_avg_sq", lambda t: t[:1])}, r"exp_avg_sq is \(1, 4\) there and \(2, 4\)"),
        ({"optimizer": replaced("1.bias/step", lambda t: t.repeat(2))}, r"1\.bias/step is \(2,\) there and \(\) here"),
        ({"optimizer": without("1.bias/exp_avg")}, r"the optimiser: 1\.bias has exp_avg_sq, step"),
        ({"state": generators(numpy=["MT19937", [1, 2], 0, 0, 0.0])}, "not a state of the random generators"),
        ({"state": generators(torch="AAAA")}, "not a state of the random generators"),
        ({"state": lambda s: {**s, "progress": {"steps": 1}}}, "does not say how to go on: .*'steps'"),
        ({"state": lambda s: {**s, "progress": {"step": "1"}}}, "does not say how to go on: progress is"),
    ],
    ids=["shape", "name", "foreign", "moment", "count", "half a state", "numpy", "torch", "progress", "no number"],
)
def test_a_refused_checkpoint_leaves_all_as_it_was(changes, message, tmp_path):
    found = written(tmp_path, **changes)
    model, optimizer = network(2)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        resume.restore(found, model, optimizer, TrainConfig(), World())
    assert everything(model, optimizer) == before


def test_one_that_fits_is_put_back_whole(tmp_path):
    found = written(tmp_path)
    drawn = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
    model, optimizer = network(2)
    assert resume.restore(found, model, optimizer, TrainConfig(), World()) == Progress(step=1)
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == drawn  # noqa: NPY002
    expected = everything(*network(1))
    assert {**everything(model, optimizer), "rng": ""} == {**expected, "rng": ""}


def test_generators_are_put_back_all_or_none():
    before = json.dumps(rng_state(CPU))
    with pytest.raises(ValueError, match="not a state of the random generators"):
        restore_rng({**rng_state(CPU), "python": [3, [1] * 625, None], "torch": ""}, CPU)
    assert json.dumps(rng_state(CPU)) == before


def test_masters_that_were_not_saved_begin_as_the_saved_weights(tmp_path):
    """A float32 run that goes on in bfloat16: with the masters of the start, its first step would undo the training."""
    found = written(tmp_path)
    model, optimizer = network(2, torch.bfloat16)
    resume.restore(found, model, optimizer, TrainConfig(), World())
    for name, master in optimizer.stepped.items():
        assert torch.equal(master, found.model[name]), name
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step(lr=0.0, grad_norm=1.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found.model[name].bfloat16()), name
