"""T09 exact resume after SIGKILL, T03 SIGTERM, T10 changed settings, T13 two runs in a folder, T05-T07 bad folders."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.train import checkpoint, resume, run, setup, state
from mmrlhf.train.checkpoint import CheckpointError
from mmrlhf.train.files import FileSystem
from mmrlhf.train.loop import train
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.run import RunFolder
from tiny import tiny_model
from tinyrun import facts_of, make_data, metrics_of, settings_for

REPOSITORY = Path(__file__).resolve().parents[2]
WORDS = ["recipe=mm_dpo", "epochs=3", "save_every=2", "optim.warmup=0.3", "keep_last=9", "data.pairs=all"]
CHILD = """
import os, subprocess, sys, time
import torch
from tinyrun import settings_for
from mmrlhf.train import loop
from mmrlhf.train.optim import Optimizer
from pathlib import Path

torch.set_num_threads(1)
output, data, model, kill_at, signum, *words = sys.argv[1:]
group = "group" in words
words = [word for word in words if word != "group"]
count, step = 0, Optimizer.step

def counted(self, **options):
    global count
    step(self, **options)
    count += 1
    if count == int(kill_at):
        if group:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
            print("workers", *children, file=sys.stderr)
            subprocess.run(["kill", "-s", signum, "--", f"-{os.getpid()}"])  # torch forgives a parent its own
            time.sleep(0.5)  # time to hear of a worker's death
        else:
            os.kill(os.getpid(), int(signum))

Optimizer.step = counted
loop.train(settings_for(Path(output), Path(data), *words, model=Path(model)))
"""


def child(output: Path, data: Path, model: Path, *words: str, kill_at: int, signum: int) -> subprocess.Popen:
    """A training in a process of its own that sends itself a signal after its `kill_at`-th optimiser step.

    With the word "group" it leads a process group, says which workers it has, and all of the group get the signal.
    """
    command = [sys.executable, "-c", CHILD, str(output), str(data), str(model), str(kill_at), str(signum), *words]
    path = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, start_new_session="group" in words
    )


def content(folder: Path) -> dict[str, dict]:
    """Everything of a run that must be equal to the last bit."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    state = json.loads((newest / "state.json").read_bytes())
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics_of(folder)]
    return {
        "model": load_file(newest / "model.safetensors"),
        "optimizer": load_file(newest / "optimizer.safetensors"),
        "state": {"rng": state["rng"], "progress": state["progress"]},
        "lines": lines,
    }


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = content(one), content(other)
    for part in ("model", "optimizer"):
        assert set(mine[part]) == set(theirs[part])
        for name, tensor in theirs[part].items():
            assert torch.equal(mine[part][name], tensor), (part, name)
    assert mine["lines"] == theirs["lines"]
    assert mine["state"] == theirs["state"]


@pytest.mark.parametrize(
    ("words", "kill_at"),
    [
        ([], 5),  # in the middle of the second epoch, one step past a checkpoint
        (["lora.enabled=true", "lora.dropout=0.2", "lora.r=2", "groups_per_step=4", "tokens_per_batch=150"], 4),
    ],
    ids=["full", "lora with dropout and micro-batches"],
)
def test_t09_killed_and_resumed_is_bitwise_the_uninterrupted_run(words, kill_at, tmp_path, model_folder, data_file):
    words = [*WORDS, *words]
    straight = train(settings_for(tmp_path / "straight", data_file, *words, model=model_folder))
    process = child(tmp_path / "cut", data_file, model_folder, *words, kill_at=kill_at, signum=signal.SIGKILL)
    assert process.wait(120) == -signal.SIGKILL
    assert facts_of(tmp_path / "cut")["status"] == "running"
    assert len(metrics_of(tmp_path / "cut")) == kill_at - 1, "killed after the step, before its line"
    resumed = train(settings_for(tmp_path / "cut", data_file, *words, model=model_folder))
    facts = facts_of(resumed)
    assert (facts["status"], facts["steps"]) == ("finished", len(metrics_of(straight)))
    assert facts["resumed_from"] == ("step-00000004" if kill_at == 5 else "step-00000002")
    assert facts["reference"]["shards_computed"] == 0
    steps = [line["step"] for line in metrics_of(resumed)]
    assert steps == sorted(set(steps)) == list(range(1, len(steps) + 1))
    assert_same(resumed, straight)


@pytest.mark.parametrize("words", [["model.dtype=bfloat16"], ["data.workers=1", "loss.beta_mode=implicit"]])
def test_t09_masters_workers_and_drawn_betas_resume_bitwise(words, tmp_path, model_folder, data_file, monkeypatch):
    words = [*WORDS, *words]
    straight = train(settings_for(tmp_path / "straight", data_file, *words, model=model_folder))
    step, count = Optimizer.step, 0

    def failing(self, **options):
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("the machine is gone")
        step(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Optimizer, "step", failing)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(settings_for(tmp_path / "cut", data_file, *words, model=model_folder))
    assert facts_of(tmp_path / "cut")["status"] == "failed"
    assert_same(train(settings_for(tmp_path / "cut", data_file, *words, model=model_folder)), straight)


def test_t03_sigterm_finishes_the_step_saves_and_exits_143(tmp_path, model_folder, data_file):
    process = child(tmp_path / "cut", data_file, model_folder, *WORDS, kill_at=3, signum=signal.SIGTERM)
    assert process.wait(120) == 143
    assert facts_of(tmp_path / "cut")["status"] == "interrupted"
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints")[0].name == "step-00000003"
    assert [line["step"] for line in metrics_of(tmp_path / "cut")] == [1, 2, 3]
    straight = train(settings_for(tmp_path / "straight", data_file, *WORDS, model=model_folder))
    assert_same(train(settings_for(tmp_path / "cut", data_file, *WORDS, model=model_folder)), straight)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_t03_a_signal_to_the_whole_group_saves_although_there_are_workers(signum, tmp_path, model_folder, data_file):
    """SLURM, timeout, systemd and Ctrl-C signal every process of the group, the loader's workers too."""
    words = [*WORDS, "data.workers=2"]
    process = child(tmp_path / "cut", data_file, model_folder, *words, "group", kill_at=3, signum=signum)
    told = process.communicate(timeout=400)[1].decode()
    assert process.returncode == 128 + signum, told
    workers = next(line for line in told.splitlines() if line.startswith("workers")).split()[1:]
    assert len(workers) == 2
    assert not any(Path("/proc", worker).exists() for worker in workers), "no process is left behind"
    assert facts_of(tmp_path / "cut")["status"] == "interrupted"
    assert facts_of(tmp_path / "cut")["error"].endswith("after saving")
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints")[0].name == "step-00000003"


def test_finished_run_resumes_to_the_same_model(tmp_path, model_folder, data_file):
    settings = settings_for(tmp_path / "run", data_file, "samples=1", model=model_folder)
    first = train(settings)
    model, lines = (first / "model" / "model.safetensors").read_bytes(), metrics_of(first)
    train(settings)
    assert (first / "model" / "model.safetensors").read_bytes() == model
    assert metrics_of(first) == lines


@pytest.fixture
def stopped(tmp_path, model_folder, data_file) -> Path:
    """A run of 3 steps with checkpoints at 1, 2 and 3."""
    return train(settings_for(tmp_path / "run", data_file, "save_every=1", "keep_last=9", model=model_folder))


def test_t10_changed_settings_and_data_are_listed_and_refused(stopped, model_folder, data_file, tmp_path):
    words = ["save_every=1", "keep_last=9", "optim.lr=2e-3", "groups_per_step=3", "loss.kind=hinge"]
    other = make_data(tmp_path / "other", 6, seed=5)
    before = facts_of(stopped)
    with pytest.raises(ValueError, match="belongs to a run with other settings") as caught:
        train(settings_for(stopped, other, *words, model=model_folder))
    message = str(caught.value)
    assert facts_of(stopped) == before, "a refused resume leaves the earlier run's files alone"
    for part in (
        "optim.lr: 0.001 -> 0.002",
        "groups_per_step: 2 -> 3",
        "loss.kind: 'sigmoid' -> 'hinge'",
        "the data or the processor: hash",
        "resume_changed=true",
    ):
        assert part in message
    assert "save_every" not in message
    run_folder = train(settings_for(stopped, data_file, "optim.lr=2e-3", "resume_changed=true", model=model_folder))
    assert any("resumed with a change: optim.lr: 0.001 -> 0.002" in note for note in facts_of(run_folder)["notes"])


def test_t10_another_starting_model_is_refused(stopped, data_file, model_folder):
    """The same settings, but the reference would be a model that has been trained already."""
    model, processor = tiny_model("llava_onevision", seed=1)
    settings = settings_for(stopped, data_file, "save_every=1", "keep_last=9", model=model_folder)
    with pytest.raises(ValueError, match="the starting model, the libraries, the backend or the device: hash"):
        train(settings, model=model, processor=processor)


def test_generators_go_to_a_machine_with_another_number_of_gpus(monkeypatch):
    """A run draws from one device's; a node with fewer of them, or none, must not stop it."""
    kept = {0: torch.zeros(16, dtype=torch.uint8), 1: torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept[device.index].clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda value, device: kept.update({device.index: value}))
    stored = json.loads(json.dumps(state.rng_state(torch.device("cuda", 1))))
    expected = torch.rand(3)
    for device in (torch.device("cuda", 0), torch.device("cpu")):
        torch.manual_seed(5)
        state.restore_rng(stored, device)
        assert torch.equal(torch.rand(3), expected)
    assert torch.equal(kept[0], kept[1])
    assert state.rng_state(torch.device("cpu"))["cuda"] == []


def test_t08_damaged_newest_is_told_and_the_one_before_is_taken(stopped, model_folder, data_file):
    before = content(stopped)
    (stopped / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"x")
    train(settings_for(stopped, data_file, "save_every=1", "keep_last=9", model=model_folder))
    facts = facts_of(stopped)
    assert facts["resumed_from"] == "step-00000002"
    assert any("step-00000003 is skipped: model.safetensors has 1 bytes" in note for note in facts["notes"])
    assert content(stopped)["lines"] == before["lines"]
    for path in (stopped / "checkpoints").iterdir():
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        train(settings_for(stopped, data_file, "save_every=1", "keep_last=9", model=model_folder))


def test_resume_off_never_mixes_two_runs(stopped, model_folder, data_file):
    with pytest.raises(ValueError, match=r"resume is false, but .* already has checkpoints"):
        train(settings_for(stopped, data_file, "resume=false", model=model_folder))


def test_t13_second_run_in_a_folder_is_refused_and_a_dead_ones_lock_is_not(tmp_path, data_file):
    settings = settings_for(tmp_path / "run", data_file)
    with (
        RunFolder(settings),
        pytest.raises(ValueError, match=rf"in use by another run \(process {os.getpid()} on "),
        RunFolder(settings),
    ):
        pass
    (tmp_path / "run" / ".lock").write_text("process 1 on elsewhere\n")  # what a killed run leaves
    with RunFolder(settings) as again:
        again.begin()
        assert facts_of(tmp_path / "run")["status"] == "running"
    assert facts_of(tmp_path / "run")["status"] == "finished"


def test_a_refused_checkpoint_leaves_no_hooks_on_the_callers_model(tmp_path, data_file, monkeypatch):
    """bfloat16 weights hand their gradients to masters: a second try would find them handed over already."""
    model, processor = tiny_model("llava_onevision")
    model = model.bfloat16()

    def refuse(*_):
        raise ValueError("does not fit the model")

    settings = settings_for(tmp_path / "run", data_file, "max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(resume, "restore", refuse)
        with pytest.raises(ValueError, match="does not fit"):
            train(settings, model=model, processor=processor)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    train(settings, model=model, processor=processor)


def test_t06_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path, data_file, monkeypatch):
    monkeypatch.setattr(setup, "load_model", None)
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="output: cannot write to"):
            train(settings_for(output, data_file, model=tmp_path))


def test_t07_rename_that_fails_is_found_before_the_first_step(tmp_path, data_file):
    class OtherDevice(FileSystem):
        def rename(self, source, target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with pytest.raises(ValueError, match=r"output: cannot write to .*checkpoints: Invalid cross-device link"):
        RunFolder(settings_for(tmp_path / "run", data_file), fs=OtherDevice()).__enter__()
    with RunFolder(settings_for(tmp_path / "run", data_file)):
        assert (tmp_path / "run" / "run.json").exists(), "the lock of the failed attempt is gone"


def test_a_disk_that_is_full_at_the_start_leaves_no_lock(tmp_path, data_file):
    """In a notebook the process goes on, and so would the lock: the folder would be in use by itself."""

    class Full(FileSystem):
        def write(self, path, chunks):
            if path.name.startswith("config.yaml"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(path, chunks)

    with pytest.raises(OSError, match="No space left"):
        RunFolder(settings_for(tmp_path / "run", data_file), fs=Full()).__enter__()
    with RunFolder(settings_for(tmp_path / "run", data_file)):
        pass


class FullDisk(FileSystem):
    """Checkpoints of some steps do not fit."""

    steps: tuple[str, ...] = ()

    def write(self, path, chunks):
        if any(step in str(path) for step in self.steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(path, chunks)


def test_t05_full_disk_in_the_middle_is_told_and_survived_at_the_end_it_fails(
    tmp_path, model_folder, data_file, monkeypatch
):
    monkeypatch.setattr(run, "FileSystem", FullDisk)
    monkeypatch.setattr(FullDisk, "steps", ("step-00000002",))
    done = train(settings_for(tmp_path / "middle", data_file, "save_every=1", "keep_last=9", model=model_folder))
    facts = facts_of(done)
    assert facts["failed_saves"] == 1
    assert any("step 2 is not saved: [Errno 28] No space" in note for note in facts["notes"])
    assert sorted(p.name for p in (done / "checkpoints").iterdir()) == ["step-00000001", "step-00000003"]
    monkeypatch.setattr(FullDisk, "steps", ("step-00000003",))
    with pytest.raises(OSError, match="No space left"):
        train(settings_for(tmp_path / "end", data_file, "save_every=2", model=model_folder))
    assert facts_of(tmp_path / "end")["status"] == "failed"
    assert checkpoint.latest(tmp_path / "end" / "checkpoints")[0].name == "step-00000002"


def test_t23_steps_leak_no_descriptors_or_threads(tmp_path, model_folder, data_file):
    import threading

    train(settings_for(tmp_path / "warm", data_file, "max_steps=1", model=model_folder))
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for index in range(3):
        train(settings_for(tmp_path / str(index), data_file, "max_steps=1", model=model_folder))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # a thread that has been told to end may not have run since
        if len(os.listdir("/proc/self/fd")) <= descriptors and threading.active_count() <= threads:
            break
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert threading.active_count() <= threads
