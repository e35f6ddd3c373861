"""Several processes: the step of two is the step of one, one of them writes, and a run stops and goes on as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.config import TrainConfig, dump
from mmrlhf.data import packing
from mmrlhf.train import distributed
from mmrlhf.train.distributed import World
from mmrlhf.train.loop import train
from mmrlhf.train.setup import Plan
from tinyrun import facts_of, metrics_of, settings_for

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
EPS = "optim.eps=1e-3"  # with 1e-8, AdamW's first step is the sign of a gradient, noise included


def command_for(folder: Path, settings: TrainConfig, processes: int) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(dump(settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *launcher, "-m", "mmrlhf", "train", str(recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def together(folder: Path, settings: TrainConfig, processes: int = 2) -> str:
    """Train in several processes; what the launcher and they said."""
    command = command_for(folder, settings, processes)
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / "model.safetensors")


def share_of_change(one: Path, other: Path, start: Path) -> float:
    """|one - other| / |other - start|, all weights together."""
    mine, theirs, before = weights(one), weights(other), load_file(start / "model.safetensors")
    apart = sum(float((mine[name].double() - theirs[name].double()).pow(2).sum()) for name in theirs)
    moved = sum(float((theirs[n].double() - before.get(n, torch.zeros(())).double()).pow(2).sum()) for n in theirs)
    return (apart / moved) ** 0.5


@pytest.mark.parametrize(
    "words",
    [
        ["groups_per_step=3", "loss.sft_weight=0.25"],
        ["groups_per_step=1", "lora.enabled=true", "lora.r=2"],  # one of the two has nothing to do in any step
        # One of the six has no picture: what lies before the decoder has no gradient in its step, and does not move.
        ["groups_per_step=1", "model.freeze_vision=false", "max_steps=6"],
    ],
    ids=["full, 2 + 1 groups", "lora, 1 + 0 groups", "tower trained, 1 + 0 groups"],
)
def test_two_processes_train_as_one(words, tmp_path, model_folder, data_file):
    words = [
        EPS,
        "max_steps=4",
        *words,
        "epochs=4",
        "samples=1",
        "save_every=0",
        "tokens_per_batch=200",
        "report=false",
    ]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = train(settings_for(tmp_path / "one/run", data_file, *words, model=model_folder))
    said = together(tmp_path / "two", settings_for(tmp_path / "two/run", data_file, *words, model=model_folder))
    two = tmp_path / "two/run"
    assert said.count("the model lies in") == 1
    assert (facts_of(two)["processes"], facts_of(two)["status"]) == (2, "finished")
    assert (two / "model").is_dir()
    assert json.loads((two / "samples.jsonl").read_text().splitlines()[0])["after"] is not None
    mine, theirs = metrics_of(two), metrics_of(one)
    assert [line["step"] for line in mine] == list(range(1, len(theirs) + 1))
    for ours, alone in zip(mine, theirs, strict=True):
        for key in ("tokens", "scored_tokens", "images"):
            assert ours[key] == alone[key]
        for key in set(alone) - {"seconds", "utilization"}:
            assert ours[key] == pytest.approx(alone[key], rel=2e-4, abs=2e-6), key
    if "lora.enabled=true" not in words:
        assert share_of_change(two, one, model_folder) < 1e-3
    else:
        for name, tensor in weights(one).items():
            torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_signal_stops_all_of_them_and_they_go_on_bitwise(tmp_path, model_folder, data_file):
    words = ["groups_per_step=2", "epochs=20", "save_every=0", "samples=0", "report=false", "lora.enabled=true"]
    words += ["lora.dropout=0.3", "lora.r=2"]
    folders = {name: tmp_path / name for name in ("cut", "straight")}
    settings = {}
    for name, folder in folders.items():
        folder.mkdir()
        settings[name] = settings_for(folder / "run", data_file, *words, model=model_folder)
    said = terminated_after(3, folders["cut"], settings["cut"])
    stopped = facts_of(folders["cut"] / "run")
    assert stopped["status"] == "interrupted", said[-3000:]
    assert 3 <= stopped["steps"] < stopped["total_steps"] == 60
    with pytest.raises(ValueError, match="processes: 2 -> 1"):
        train(settings["cut"])
    for name, folder in folders.items():
        together(folder, settings[name])
    resumed, straight = (folder / "run" for folder in folders.values())
    assert facts_of(resumed)["resumed_from"] == f"step-{stopped['steps']:08d}"
    for line, expected in zip(metrics_of(resumed), metrics_of(straight), strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(resumed)[name], tensor), name


# Trains as the command line does, told to stop in its second step or not, and says which of gloo's threads are left.
LEAVING = """
import os, signal, sys
from pathlib import Path
from mmrlhf.cli import main
from mmrlhf.train.optim import Optimizer

def step(self, *, taken=[], real=Optimizer.step, **options):
    taken.append(real(self, **options))
    if len(taken) == 2 and sys.argv[2] == "stopped":
        os.kill(os.getpid(), signal.SIGTERM)

Optimizer.step = step
try:
    code = main(["train", sys.argv[1]])
except SystemExit as stop:
    code = stop.code
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print("left", code, [name for name in names if "gloo" in name], flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to name the threads")
@pytest.mark.parametrize("how", ["finished", "stopped"])
def test_no_gloo_thread_is_left_to_abort_the_process_at_its_end(how, tmp_path, model_folder, data_file):
    words = ["groups_per_step=2", "max_steps=3", "samples=0", "save_every=0", "report=false"]
    command = command_for(tmp_path, settings_for(tmp_path / "run", data_file, *words, model=model_folder), 2)
    (tmp_path / "leaving.py").write_text(LEAVING)
    command[-4:] = [str(tmp_path / "leaving.py"), command[-1], how]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    code = {"finished": 0, "stopped": 143}[how]
    assert done.stdout.count(f"left {code} []") == 2, (done.stdout + done.stderr)[-4000:]


def terminated_after(lines: int, folder: Path, settings: TrainConfig) -> str:
    """Train in two processes and end the launcher with SIGTERM once so many steps are logged; what was said."""
    process = subprocess.Popen(
        command_for(folder, settings, 2),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    kill = threading.Timer(240, process.kill)
    kill.start()
    log = Path(settings.output) / "metrics.jsonl"
    try:
        while process.poll() is None and (not log.exists() or log.read_text().count("\n") < lines):
            threading.Event().wait(0.02)
        process.send_signal(signal.SIGTERM)
        return process.communicate()[0]
    finally:
        kill.cancel()


def test_shares_of_a_step():
    """Every group once, the longest hand short, and one process has what it always had."""
    lengths = [50, 40, 30, 30, 20, 10, 10, 10]
    dealt = packing.deal(range(8), lengths, 3)
    assert sorted(index for hand in dealt for index in hand) == list(range(8))
    assert [sum(lengths[i] for i in hand) for hand in dealt] == [70, 70, 60]
    assert packing.deal([4], lengths, 3) == [[4], [], []]
    settings = TrainConfig.__new__(TrainConfig)
    for name, value in {
        "groups_per_step": 3,
        "tokens_per_batch": 60,
        "seed": 0,
        "epochs": 1,
        "max_steps": None,
    }.items():
        object.__setattr__(settings, name, value)
    alone, pair = Plan(lengths, settings), [Plan(lengths, settings, World(rank, 2)) for rank in range(2)]
    for step in range(alone.total):
        assert alone[step] == alone.whole(step) == pair[0].whole(step)
        both = [index for plan in pair for part in plan[step] for index in part]
        assert sorted(both) == sorted(index for part in alone[step] for index in part)
        assert all(sum(lengths[i] for i in part) <= 60 for plan in pair for part in plan[step])


def test_buckets_hold_every_tensor_once():
    tensors = [torch.zeros(n) for n in (10, 10, 100, 1, 1)] + [torch.zeros(4, dtype=torch.float64)]
    found = list(distributed.buckets(tensors, 80))
    assert [[t.numel() for t in bucket] for bucket in found] == [[10, 10], [100], [1, 1], [4]]
    assert [t for bucket in found for t in bucket] == tensors or all(
        a is b for a, b in zip((t for bucket in found for t in bucket), tensors, strict=True)
    )
    assert list(distributed.buckets([], 80)) == []
