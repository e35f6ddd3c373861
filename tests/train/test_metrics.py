"""metrics.jsonl survives kills and resumes; trackers cannot hurt a run."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
import types

import pytest

from mmrlhf.train import metrics
from mmrlhf.train.metrics import MetricsLog, cut_after, tracker_starters


class Recorder:
    def __init__(self):
        self.lines, self.closed = [], False

    def log(self, values, step):
        self.lines.append((step, dict(values)))

    def close(self):
        self.closed = True


def write_lines(path, trackers, steps, *, pause: float = 0.0) -> None:
    with MetricsLog(path, trackers=trackers, resume_step=steps[0]) as log:
        for step in steps:
            log.log({"step": step})
            time.sleep(pause)


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_are_there_at_once_and_null_stands_for_what_is_not_finite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "seconds": 0.5})
        assert lines_of(path) == [{"step": 1, "loss": None, "grad_norm": None, "seconds": 0.5}]


def test_resume_cuts_later_steps_and_half_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with MetricsLog(path, resume_step=2) as log:
        log.log({"step": 3, "loss": 0.5})
    assert lines_of(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
    cut_after(tmp_path / "absent.jsonl", 3)


def test_trackers_get_every_finite_number(tmp_path):
    recorder = Recorder()
    with MetricsLog(tmp_path / "m.jsonl", trackers={"recorder": lambda: recorder}) as log:
        for step in range(1, 51):
            log.log({"step": step, "loss": 1.0 / step, "bad": math.nan})
    assert recorder.lines == [(step, {"loss": 1.0 / step}) for step in range(1, 51)]
    assert recorder.closed


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_tracker_that_raises_is_named_and_left_alone(where, tmp_path):
    class Broken(Recorder):
        def log(self, values, step):
            if where == "log":
                raise ConnectionError("the network is down")

        def close(self):
            raise ConnectionError("the network is down")

    def start():
        if where == "start":
            raise ConnectionError("the network is down")
        return Broken()

    path = tmp_path / "m.jsonl"
    with pytest.warns(UserWarning, match="broken gets no more metrics .ConnectionError: the network is down"):
        write_lines(path, {"broken": start}, range(1, 4), pause=0.02)
    assert [line["step"] for line in lines_of(path)] == [1, 2, 3]


def test_tracker_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics._Outlet, "QUEUE", 4)
    monkeypatch.setattr(metrics._Outlet, "PATIENCE", 0.05)
    release = threading.Event()

    class Hanging(Recorder):
        def log(self, values, step):
            release.wait(10)

    path = tmp_path / "m.jsonl"
    try:
        with pytest.warns(UserWarning, match="hanging gets no more metrics .4 lines are waiting for it"):
            write_lines(path, {"hanging": Hanging}, range(1, 21))
        assert len(lines_of(path)) == 20
        with pytest.warns(UserWarning, match="did not finish"):
            write_lines(path, {"hanging": Hanging}, range(21, 22))
    finally:
        release.set()


def test_tracker_that_is_not_installed_is_an_error_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for name in ("wandb", "tensorboard"):
        with pytest.raises(ValueError, match=f"asks for {name}, which is not installed: pip install {name}"):
            tracker_starters([name], tmp_path, {})
    assert tracker_starters([], tmp_path, {}) == {}


def test_wandb_and_tensorboard_are_called_as_they_expect(tmp_path, monkeypatch):
    calls: list = []
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append(("wandb", values, step)), finish=lambda: calls.append("finish")
    )
    wandb.init = lambda **words: calls.append(words) or run  # type: ignore[attr-defined]
    board = types.ModuleType("torch.utils.tensorboard")

    class SummaryWriter:
        def __init__(self, folder):
            calls.append(folder)

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        def close(self):
            calls.append("close")

    board.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    starters = tracker_starters(["wandb"], tmp_path, {"optim.lr": 1.0})
    with MetricsLog(tmp_path / "m.jsonl", trackers=starters) as log:
        log.log({"step": 3, "loss": 0.5})
    assert calls[0]["config"] == {"optim.lr": 1.0}
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [("wandb", {"loss": 0.5}, 3), "finish"]
    del calls[:]
    with MetricsLog(tmp_path / "m.jsonl", trackers=tracker_starters(["tensorboard"], tmp_path, {})) as log:
        log.log({"step": 3, "loss": 0.5})
    assert calls == [str(tmp_path / "tensorboard"), ("loss", 0.5, 3), "close"]
