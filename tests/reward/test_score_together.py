"""`mmrlhf reward score` under torchrun: the file of one process, to the last byte, and an error is everybody's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrlhf.reward import score
from mmrlhf.reward.journal import Scored
from mmrlhf.reward.score import score_file
from mmrlhf.train.distributed import World
from rewarddata import critiqued_file

REPOSITORY = Path(__file__).resolve().parents[2]
# About three groups a batch: two rounds of two batches, the last of which has none for the second process.
WORDS = ["--max-new-tokens", "5", "--tokens-per-batch", "3000", "--device", "cpu", "--on-bad-row", "skip"]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_write_the_file_of_one(reward_model, tmp_path):
    """Critiques written, one picture missing, two groups done before: output, journal and what is said are the same."""
    data = critiqued_file(tmp_path, 24)
    (tmp_path / "pictures" / "7.png").unlink()
    options: dict[str, Any] = {"max_new_tokens": 5, "tokens_per_batch": 3000, "device": "cpu", "on_bad_row": "skip"}
    rows = data.read_text().splitlines(keepends=True)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.write_text("".join(rows[:2]))
        score_file(reward_model, data, tmp_path / name / "out.jsonl", **options)
    data.write_text("".join(rows))
    alone = score_file(reward_model, data, tmp_path / "one" / "out.jsonl", **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mmrlhf"]
    command += ["reward", "score", str(reward_model), str(data), "-o", str(tmp_path / "two" / "out.jsonl"), *WORDS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for file in ("out.jsonl", "out.jsonl.journal"):
        assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
    assert alone.computed == alone.groups - 2 > 16
    assert done.stdout.replace(str(tmp_path / "two"), str(tmp_path / "one")) == alone.text() + "\n"


class Thread(World):
    """One of several threads that stand for processes: all that `gather` needs of each other."""

    def __init__(self, rank: int, size: int, values: list[Any], barrier: threading.Barrier):
        super().__init__(rank, size)
        object.__setattr__(self, "place", (values, barrier))

    def gather(self, value: Any) -> list[Any]:
        values, barrier = self.place  # type: ignore[attr-defined]
        values[self.rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found


def shared(size: int, work: Any, batches: Any = lambda rank: range(7)) -> list[Any]:
    """What `_in_turn` gives, or raises, in each of so many."""
    values, barrier = [None] * size, threading.Barrier(size, timeout=60)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = list(score._in_turn(iter(batches(rank)), work(rank), Thread(rank, size, values, barrier)))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [2, 3, 7, 9])
def test_batches_are_scored_once_each_and_come_in_order(size):
    """Also where the last round has batches for some, or there are fewer batches than processes."""
    done: list[int] = []

    def work(rank: int):
        return lambda batch: done.append(batch) or [Scored(batch, f"of {rank}", (), ())] * 2

    found = shared(size, work)
    assert sorted(done) == list(range(7))
    assert all(each == found[0] for each in found)
    assert [one.index for one in found[0]] == [index for index in range(7) for _ in range(2)]
    assert [one.id for one in found[0][::2]] == [f"of {index % size}" for index in range(7)]


def test_what_one_cannot_score_ends_all():
    def work(rank: int):
        def fail(batch: int) -> list[Scored]:
            if batch == 4:
                raise ValueError("group g4: its scores are not finite")
            return []

        return fail

    one, two, three = shared(3, work)
    assert isinstance(two, ValueError)
    assert str(one) == str(three) == "process 1: ValueError: group g4: its scores are not finite"


def test_processes_that_read_other_data_are_told():
    """A storage of its own, a file that changed meanwhile: batches would be of others."""
    found = shared(2, lambda rank: lambda batch: [], lambda rank: range(5 + rank))
    assert all("the processes do not read the same data" in str(each) for each in found)
