"""Batches in order, errors where their batch would have been, and dead or hanging workers named (D18)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import closing

import pytest
import torch

from mmrlhf.train import feed as module
from mmrlhf.train.feed import feed


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_and_only_as_far_ahead_as_said(workers):
    taken = []

    def jobs():
        for job in range(20):
            taken.append(job)
            yield [job, job]

    with closing(feed(jobs(), lambda job: torch.tensor(job), workers=workers)) as batches:
        assert next(batches).tolist() == [0, 0]
        assert len(taken) <= 1 + 2 * workers + 1
        assert [batch.tolist() for batch in batches] == [[job, job] for job in range(1, 20)]


def test_workers_outlive_a_signal_to_their_group_and_end_with_the_feed():
    def make(job):
        if job == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return job, os.getpid()

    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with closing(feed(range(4), make, workers=1)) as batches:
        found = list(batches)
    assert [job for job, _ in found] == [0, 1, 2, 3]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before, "this process gets its signals"
    with pytest.raises(ProcessLookupError):
        os.kill(found[0][1], 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_out_in_its_place(workers):
    def make(job):
        if job == 3:
            raise ValueError("group g3 has no picture")
        return job

    with closing(feed(range(6), make, workers=workers)) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="group g3 has no picture"):
            next(batches)


def test_a_killed_worker_is_named_and_does_not_hang():
    def make(job):
        if job == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return job

    started = time.monotonic()
    with (
        closing(feed(range(9), make, workers=2)) as batches,
        pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed by signal|exited unexpectedly)"),
    ):
        list(batches)
    assert time.monotonic() - started < 60


def test_a_hanging_worker_runs_into_the_timeout(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.5)

    def make(job):
        time.sleep(30 if job == 1 else 0)
        return job

    with closing(feed(range(3), make, workers=1)) as batches:
        assert next(batches) == 0
        with pytest.raises(RuntimeError, match=r"timed out after 0\.5 seconds"):
            next(batches)
    assert multiprocessing.active_children() == [], "it holds off SIGTERM, so it is killed"


def test_workers_leave_the_saved_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with closing(feed(range(4), lambda job: job, workers=2)) as batches:
        assert list(batches) == [0, 1, 2, 3]
    assert torch.equal(torch.get_rng_state(), before)
