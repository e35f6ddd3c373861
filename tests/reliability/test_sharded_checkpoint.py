"""A checkpoint that several processes write is whole or absent too: any call of any of them may fail, any part be lost.

Threads stand for processes here: `World` is all that they know of each other. What two real ones write is tested in
tests/train/test_shard.py.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrlhf.config import OptimConfig, TrainConfig
from mmrlhf.train import checkpoint, resume
from mmrlhf.train.checkpoint import CheckpointError, Rows
from mmrlhf.train.distributed import World
from mmrlhf.train.files import FileSystem
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.resume import Progress
from mmrlhf.train.shard import Shards

WHOLE = {
    "even": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "uneven": torch.arange(10, dtype=torch.bfloat16).reshape(5, 2),
    "short": torch.arange(3, dtype=torch.float32).reshape(1, 3),  # the last of three processes have none
    "vector": torch.arange(7, dtype=torch.float32),
}
EVERYWHERE = {"step": torch.tensor(3.0), "buffer": torch.ones(2, 2, dtype=torch.int64)}


class Together:
    """A meeting place of so many threads."""

    def __init__(self, size: int):
        self.size, self.values = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Thread(World):
    """One of them, as `World` shows it."""

    def __init__(self, rank: int, place: Together):
        super().__init__(rank, place.size)
        object.__setattr__(self, "place", place)

    def gather(self, value: Any) -> list[Any]:
        return self.place.gather(self.rank, value)  # type: ignore[attr-defined]


class Failing(FileSystem):
    """Raises at the n-th call: that the disk is full, or another error."""

    def __init__(self, at: int, error: Exception | None = None):
        self.at, self.calls = at, 0
        self.error = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _tick(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error

    def write(self, path, chunks):
        self._tick()
        return super().write(path, chunks)

    def fsync(self, path):
        self._tick()
        super().fsync(path)

    def rename(self, source, target):
        self._tick()
        super().rename(source, target)

    def remove(self, path):
        if ".tmp-" not in path.name or path.exists():
            self._tick()
        super().remove(path)


def save(folder: Path, step: int, size: int, *, fs: dict[int, FileSystem] | None = None, folders=None) -> list[Any]:
    """All save their rows of WHOLE; what each got: the path, or the error."""
    place, found = Together(size), [None] * size

    def rows(rank: int) -> dict[str, Any]:
        cut: dict[str, Any] = dict(EVERYWHERE)
        for name, tensor in WHOLE.items():
            share = -(-tensor.shape[0] // size)
            start = min(rank * share, tensor.shape[0])
            cut[name] = Rows(tensor[start : start + share] + step - 1, start, tensor.shape[0])
        return cut

    def work(rank: int) -> None:
        try:
            found[rank] = checkpoint.save(
                (folders or {}).get(rank, folder),
                step,
                model=rows(rank),
                optimizer={f"{name}/exp_avg": value for name, value in rows(rank).items()},
                state={"note": "ä"},
                fs=(fs or {}).get(rank),
                world=Thread(rank, place),
            )
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_whole(path: Path, step: int) -> None:
    found = checkpoint.load(path)
    for name, tensor in WHOLE.items():
        assert found.model.shape(name) == tuple(tensor.shape)
        assert torch.equal(found.model[name], tensor + step - 1)
        assert found.model[name].dtype == tensor.dtype
        assert torch.equal(found.optimizer[f"{name}/exp_avg"], tensor + step - 1)
    for name, tensor in EVERYWHERE.items():
        assert torch.equal(found.model[name], tensor)
        assert found.model.shape(name) == tuple(tensor.shape)
    assert set(found.model) == {*WHOLE, *EVERYWHERE}


@pytest.mark.parametrize("size", [2, 3])
def test_rows_of_all_come_back_whole_and_in_any_cut(size, tmp_path):
    """Also rows across the borders of what was written, as another number of processes asks for them."""
    paths = save(tmp_path, 1, size)
    assert paths == [tmp_path / "step-00000001"] * size
    assert_whole(paths[0], 1)
    stored = checkpoint.load(paths[0], verified=True).model
    for name, tensor in WHOLE.items():
        for start in range(tensor.shape[0] + 1):
            for stop in range(start, tensor.shape[0] + 1):
                assert torch.equal(stored.rows(name, start, stop), tensor[start:stop]), (name, start, stop)
    assert torch.equal(stored.rows("buffer", 1, 2), EVERYWHERE["buffer"][1:2]), "one that was not cut"
    assert save(tmp_path, 1, size) == paths, "a whole one stays"


@pytest.mark.parametrize(("rank", "calls"), [(0, 10), (1, 4)])  # then the folder has its name
def test_t05_a_call_that_fails_in_one_process_fails_all_and_leaves_nothing(rank, calls, tmp_path):
    save(tmp_path, 1, 2)
    for at in range(calls):
        fs = Failing(at)
        found = save(tmp_path, 2, 2, fs={rank: fs})
        assert fs.calls > at, "the call was reached"
        assert all(isinstance(each, OSError) and each.errno == errno.ENOSPC for each in found), at
        assert f"process {rank}: " in str(found[1 - rank])
        path, skipped = checkpoint.latest(tmp_path)
        assert path is not None
        assert_whole(path, 1)
        assert skipped == []
        assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"], at
    assert all(isinstance(each, Path) for each in save(tmp_path, 2, 2))
    assert_whole(tmp_path / "step-00000002", 2)


@pytest.mark.parametrize(("rank", "calls"), [(0, 10), (1, 4)])
@pytest.mark.parametrize("error", [MemoryError("no room for a copy"), TypeError("int8 is no dtype of it")])
def test_any_error_in_one_process_is_raised_in_all(rank, calls, error, tmp_path):
    """Where nothing else fails: the others are told which process it was, and are not left waiting for it."""
    save(tmp_path, 1, 2)
    for at in range(calls):
        found = save(tmp_path, 2, 2, fs={rank: Failing(at, error)})
        assert found[rank] is error, at
        assert type(found[1 - rank]) is RuntimeError, at
        assert str(found[1 - rank]) == f"process {rank}: {type(error).__name__}: {error}"
        assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"], at
    assert all(isinstance(each, Path) for each in save(tmp_path, 2, 2))


def test_a_full_disk_beside_another_error_is_no_reason_to_go_on(tmp_path):
    """After an OSError a run goes on, and would wait for the process that does not."""
    error = MemoryError("no room for a copy")
    found = save(tmp_path, 1, 3, fs={0: Failing(1), 2: Failing(0, error)})
    assert found[2] is error
    assert [str(each) for each in found[:2]] == ["process 2: MemoryError: no room for a copy"] * 2
    assert not any(isinstance(each, OSError) for each in found)
    assert isinstance(found[0].__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_processes_without_one_storage_are_told(tmp_path):
    """The second machine's folder is its own: what it wrote is not in the first's."""
    (tmp_path / "other").mkdir()

    class Elsewhere(FileSystem):
        def write(self, path, chunks):
            return super().write(tmp_path / "other" / path.name, chunks)

        def fsync(self, path):
            pass

    found = save(tmp_path / "one", 1, 2, fs={1: Elsewhere()})
    assert all("they need one storage" in str(each) for each in found)
    assert list((tmp_path / "one").iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "cut", "flip", "unlisted", "moved", "doubled"])
def test_t08_a_part_that_is_damaged_or_not_there_is_found(damage, tmp_path):
    save(tmp_path, 1, 2)
    save(tmp_path, 2, 2)
    path = tmp_path / "step-00000002"
    victim, manifest = path / "model-00002-of-00002.safetensors", path / "MANIFEST.json"
    raw, listed = bytearray(victim.read_bytes()), json.loads(manifest.read_bytes())
    if damage == "missing":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(raw[:-1])
    elif damage == "flip":
        raw[-1] ^= 1
        victim.write_bytes(raw)
    elif damage == "unlisted":
        del listed["files"][victim.name]
        manifest.write_text(json.dumps(listed))
    else:  # bytes as they should be, but rows that leave a gap or overlap: nothing that was written by `save`
        listed["files"][victim.name]["rows"]["even"][0] = 4 if damage == "moved" else 2
        manifest.write_text(json.dumps(listed))
        with pytest.raises(CheckpointError, match="the pieces of even do not make a whole"):
            checkpoint.load(path)
        return
    newest, skipped = checkpoint.latest(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert [each.name for each, _ in skipped] == ["step-00000002"]
    assert victim.name in skipped[0][1]


class Process:
    """One of several with the whole model: what `resume.save` asks of a run and of what is ready for its next step."""

    def __init__(self, rank: int, folder: Path, place: Together):
        self.fs, self.facts, self.checkpoints = FileSystem(), dict[str, Any](), folder
        self.notes: list[str] = []
        self.note = self.notes.append
        model = torch.nn.Linear(2, 2)
        self.ready: Any = SimpleNamespace(
            model=model,
            optimizer=Optimizer(model.named_parameters(), OptimConfig()),
            progress=Progress(step=1),
            world=Thread(rank, place),
            shards=Shards(),
            hashes={},
        )

    def write(self) -> None:
        pass


def together(processes: list[Process], work: Callable[[Process], object]) -> list[BaseException | None]:
    """`work(process)` in a thread each; what each raised."""
    raised: list[BaseException | None] = [None] * len(processes)

    def run(rank: int) -> None:
        try:
            work(processes[rank])
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture
def processes(tmp_path) -> list[Process]:
    place = Together(2)
    place.barrier = threading.Barrier(2, timeout=60)
    return [Process(rank, tmp_path, place) for rank in range(2)]


def test_a_failed_save_in_the_middle_is_made_up_for_by_the_next_one(processes):
    """The last step's periodic save fails, and the save at the end comes at the same step: all have to meet again."""
    processes[0].fs = Failing(1)
    assert together(processes, lambda each: resume.save_or_warn(each, each.ready, TrainConfig())) == [None, None]
    assert all(any("step 1 is not saved" in note for note in each.notes) for each in processes)
    processes[0].fs = FileSystem()
    assert together(processes, lambda each: resume.save(each, each.ready, TrainConfig())) == [None, None]
    path, _ = checkpoint.latest(processes[0].checkpoints)
    assert path is not None
    assert len(checkpoint.load(path).state["rng"]) == 2


def test_the_last_save_fails_in_all_where_it_fails_in_the_one_that_writes(processes):
    """Or the others would say that the run is saved, and finish."""
    processes[0].fs = Failing(1)
    raised = together(processes, lambda each: resume.save(each, each.ready, TrainConfig()))
    assert all(isinstance(each, OSError) and "No space left" in str(each) for each in raised)


@pytest.mark.parametrize("where", ["optimizer", "generators", "run.json"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_beside_the_writing_is_raised_in_all(where, rank, processes, monkeypatch):
    """Before a byte is written, or after the folder has its name: the others are told then too."""

    def fail(*_: object) -> None:
        raise TypeError("what is this")

    victim = processes[rank]
    if where == "optimizer":
        victim.ready.optimizer.state = fail
    elif where == "generators":
        real = resume.rng_state
        ours = victim.ready.model
        monkeypatch.setattr(resume.parts, "parameter_device", lambda model: "broken" if model is ours else "cpu")
        monkeypatch.setattr(resume, "rng_state", lambda d: fail() if d == "broken" else real(torch.device(d)))
    else:
        victim.write = fail
    for attempt in (resume.save_or_warn, resume.save):
        raised = together(processes, lambda each, save=attempt: save(each, each.ready, TrainConfig()))
        if where == "run.json" and attempt is resume.save:
            assert raised == [None, None], "the step is saved"
        else:
            assert isinstance(raised[rank], TypeError)
            assert str(raised[1 - rank]) == f"process {rank}: TypeError: what is this"
