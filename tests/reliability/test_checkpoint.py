"""A checkpoint is whole or absent: every call to the disk may fail or be the last one, and any byte may be wrong.

Fault ids: T04 kill, T05 full disk, T08 damage, T12 schema, T14 prune, T15 pickle, T20 names and clocks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf.train import checkpoint
from mmrlhf.train.checkpoint import CheckpointError
from mmrlhf.train.files import FileSystem, safetensors_chunks, write_atomic, write_json

CALLS = 14  # of one save: 4 writes, 4 syncs of files, 2 of folders, 1 rename, and the removal before; the rest is slack


class Failing(FileSystem):
    """Raises at the n-th call, or kills the process there; `half` of a write reaches the disk first."""

    def __init__(self, at: int, *, kill: bool = False, code: int = errno.ENOSPC):
        self.at, self.kill, self.code, self.calls = at, kill, code, 0

    def _tick(self) -> None:
        self.calls += 1
        if self.calls - 1 == self.at:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.code, os.strerror(self.code))

    def write(self, path, chunks):
        data = b"".join(bytes(chunk) for chunk in chunks)
        if self.calls == self.at:
            Path(path).write_bytes(data[: len(data) // 2])
        self._tick()
        return super().write(path, [data])

    def fsync(self, path):
        self._tick()
        super().fsync(path)

    def rename(self, source, target):
        self._tick()
        super().rename(source, target)

    def remove(self, path):
        self._tick()
        super().remove(path)


def save(folder: Path, step: int, *, value: float | None = None, fs: FileSystem | None = None) -> Path:
    value = float(step) if value is None else value
    return checkpoint.save(
        folder,
        step,
        model={"a": torch.full((3, 2), value), "b": torch.tensor(value, dtype=torch.bfloat16)},
        optimizer={"a/exp_avg": torch.full((3, 2), -value), "a/step": torch.tensor(value)},
        state={"step": step, "note": "ä"},
        fs=fs,
    )


def assert_whole(path: Path, step: int) -> None:
    found = checkpoint.load(path)
    assert torch.equal(found.model["a"], torch.full((3, 2), float(step)))
    assert found.model["b"].dtype == torch.bfloat16
    assert torch.equal(found.optimizer["a/step"], torch.tensor(float(step)))
    assert found.state["step"] == step
    assert found.state["note"] == "ä"


def test_what_is_saved_comes_back(tmp_path):
    assert_whole(save(tmp_path, 7), 7)
    assert sorted(p.name for p in (tmp_path / "step-00000007").iterdir()) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert checkpoint.latest(tmp_path) == (tmp_path / "step-00000007", [])
    assert checkpoint.latest(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize("at", range(CALLS))
def test_t04_killed_at_every_call_leaves_the_old_or_the_new(at, tmp_path):
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        save(tmp_path, 2, fs=Failing(at, kill=True))
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert killed == (at < CALLS - 2), "every call of a save is covered, and nothing beyond"
    path, skipped = checkpoint.latest(tmp_path)
    assert skipped == []
    assert path is not None
    assert_whole(path, checkpoint.step_of(path))
    checkpoint.prune(tmp_path, keep_last=2)
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]
    assert_whole(save(tmp_path, 2), 2)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=["ENOSPC", "EDQUOT", "EIO"])
@pytest.mark.parametrize("at", range(CALLS - 2))
def test_t05_failing_call_keeps_the_old_and_leaves_nothing(at, code, tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        save(tmp_path, 2, fs=Failing(at, code=code))
    assert caught.value.errno == code
    assert [p.name for p in tmp_path.iterdir() if ".tmp-" in p.name] == []
    path, skipped = checkpoint.latest(tmp_path)
    assert skipped == []
    assert path is not None
    assert_whole(path, checkpoint.step_of(path))


def damage(path: Path, kind: str) -> None:
    victim = path / ("MANIFEST.json" if kind.startswith("manifest") else "optimizer.safetensors")
    raw = bytearray(victim.read_bytes())
    if kind == "flip":
        raw[-2] ^= 4
        victim.write_bytes(raw)
    elif kind == "cut":
        victim.write_bytes(raw[:-1])
    elif kind in ("missing", "manifest missing"):
        victim.unlink()
    elif kind == "manifest cut":
        victim.write_bytes(raw[: len(raw) // 2])
    elif kind == "manifest list":
        victim.write_bytes(b"[1, 2]")
    elif kind == "manifest outside":
        content = json.loads(raw)
        content["files"]["../../x"] = {"bytes": 1, "sha256": ""}
        victim.write_text(json.dumps(content))
    elif kind == "manifest future":
        victim.write_text(json.dumps(json.loads(raw) | {"schema": 99}))


REASONS = {
    "flip": "optimizer.safetensors does not have the sha256",
    "cut": "optimizer.safetensors has ",
    "missing": "optimizer.safetensors is missing",
    "manifest missing": "MANIFEST.json is missing",
    "manifest cut": "MANIFEST.json is damaged",
    "manifest list": "MANIFEST.json is damaged",
    "manifest outside": "names a file outside its folder: '../../x'",
    "manifest future": "its schema is 99; this version reads 1",
}


@pytest.mark.parametrize("kind", REASONS)
def test_t08_t12_damaged_newest_is_skipped_with_its_reason(kind, tmp_path):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest, kind)
    path, skipped = checkpoint.latest(tmp_path)
    assert path == tmp_path / "step-00000001"
    assert [each for each, _ in skipped] == [newest]
    assert REASONS[kind] in skipped[0][1]
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoint.load(newest)
    assert_whole(save(tmp_path, 2), 2)
    assert checkpoint.latest(tmp_path)[0] == newest


def test_t08_none_whole_is_an_error_and_never_a_new_start(tmp_path):
    for step in (1, 2):
        damage(save(tmp_path, step), "flip")
    with pytest.raises(CheckpointError, match=r"no checkpoint .* is whole \(step-00000002: .*step-00000001: "):
        checkpoint.latest(tmp_path)


def test_a_whole_checkpoint_is_not_replaced(tmp_path):
    first = save(tmp_path, 3)
    assert save(tmp_path, 3, value=9.0) == first
    assert_whole(first, 3)


def test_t14_prune_keeps_the_newest_and_never_the_last_whole(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    assert len(checkpoint.prune(tmp_path, keep_last=2)) == 3
    assert [checkpoint.step_of(p) for p in checkpoint.listed(tmp_path)] == [5, 4]
    damage(tmp_path / "step-00000005", "cut")
    checkpoint.prune(tmp_path, keep_last=1)
    assert (tmp_path / "step-00000004").exists(), "the damaged one must not count as kept"
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        checkpoint.prune(tmp_path, keep_last=0)


def test_t14_failing_removal_only_warns(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    with pytest.warns(UserWarning, match="cannot remove the old checkpoint .*step-0000000"):
        checkpoint.prune(tmp_path, keep_last=1, fs=Failing(0, code=errno.EACCES))
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "step-00000003"
    checkpoint.prune(tmp_path, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


class Canary:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_t15_pickle_in_a_state_file_is_not_executed(name, tmp_path):
    path = save(tmp_path, 1)
    payload = pickle.dumps(Canary(str(tmp_path / "canary")))
    (path / name).write_bytes(payload)
    if name != "MANIFEST.json":  # an attacker writes the manifest to match
        manifest = json.loads((path / "MANIFEST.json").read_bytes())
        digest = hashlib.sha256(payload).hexdigest()
        manifest["files"][name] = {"bytes": len(payload), "sha256": digest}
        (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="step-00000001"):
        checkpoint.load(path)
    assert not (tmp_path / "canary").exists()


def test_t20_names_and_order_do_not_depend_on_locale_clock_or_umask(tmp_path):
    folder = tmp_path / "Läufe und mehr"
    before = os.umask(0o077)
    try:
        for step in (9, 10, 123456789):
            os.utime(save(folder, step), (10**9 - step, 10**9 - step))
    finally:
        os.umask(before)
    assert [checkpoint.step_of(p) for p in checkpoint.listed(folder)] == [123456789, 10, 9]
    (folder / "step-notanumber").mkdir()
    (folder / "step-00000011.tmp-1").mkdir()
    assert checkpoint.latest(folder)[0] == folder / "step-123456789"
    with pytest.raises(ValueError, match="step-x is not the name of a checkpoint"):
        checkpoint.step_of(Path("step-x"))


def test_safetensors_are_those_of_the_library(tmp_path):
    """Every dtype, an empty tensor, a scalar and a view that is not contiguous, read back by safetensors itself."""
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    }
    tensors |= {str(dtype): torch.tensor([1, 0, 1]).to(dtype) for dtype in (torch.int16, torch.int8, torch.uint8)}
    tensors |= {"bool": torch.tensor([True, False]), "empty": torch.empty(0, 4), "scalar": torch.tensor(3.5)}
    tensors["view"] = torch.arange(12.0).reshape(3, 4).t()
    write_atomic(tmp_path / "t.safetensors", safetensors_chunks(tensors, metadata={"key": "value"}))
    back = load_file(tmp_path / "t.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name
    with pytest.raises(TypeError, match=r"z: torch\.complex64 cannot be saved"):
        b"".join(safetensors_chunks({"z": torch.zeros(1, dtype=torch.complex64)}))


def test_two_writers_of_one_file_do_not_take_each_others(tmp_path):
    """Two containers on one storage may have the same process number, and a cache's file has the same name in both."""
    both = threading.Barrier(2, timeout=60)

    class AtOnce(FileSystem):
        def write(self, path, chunks):
            written = super().write(path, chunks)
            both.wait()
            return written

    raised: list[Exception] = []

    def write() -> None:
        try:
            write_atomic(tmp_path / "file", [b"the same"], fs=AtOnce())
        except OSError as error:
            raised.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_write_atomic_keeps_the_old_file_when_the_disk_fails(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    for at in range(3):
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"a": 2}, fs=Failing(at))
        assert json.loads(path.read_text()) == {"a": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
