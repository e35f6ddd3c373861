"""A model cut over two processes trains as one process does, saves and resumes to the last bit, and with another number
of processes. One launch of two gloo processes trains all runs of this file; what they left is compared here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrlhf import config
from mmrlhf.models import load
from mmrlhf.train import checkpoint, shard
from mmrlhf.train.distributed import World
from mmrlhf.train.loop import train
from mmrlhf.train.optim import Optimizer
from mmrlhf.train.plan import plan
from mmrlhf.train.setup import Plan
from tiny import tiny_folder, tiny_model
from tinyrun import facts_of, metrics_of

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]
COMMON = (
    *("device=cpu", "epochs=4", "max_steps=3", "groups_per_step=3", "tokens_per_batch=400", "samples=0"),
    *("sample_tokens=3", "report=false", "optim.lr=1e-3", "optim.warmup=0", "loss.sft_weight=0.25"),
    "optim.eps=1e-3",  # with 1e-8, AdamW's first step is the sign of a gradient, noise included
)
FULL = ("tokens_per_batch=100", "save_every=1", "keep_last=9")  # two micro-batches on one process, one on the other
# What is trained (family, settings), each by one process and by two.
PAIRS = {
    "full": ("llava_onevision", (*FULL, "samples=1")),
    # one of the two has a filler alone in every step
    "lora": ("llava_onevision", ("lora.enabled=true", "lora.r=3", "groups_per_step=1", "samples=1")),
    # gradients are summed after each of several micro-batches
    "tied": ("gemma3", ("tokens_per_batch=100", "groups_per_step=5")),
    # every fifth prompt has no picture, and the tower's blocks are gathered for those that have one
    "tower": ("qwen2_5_vl", ("model.freeze_vision=false", "model.gradient_checkpointing=true", "groups_per_step=2")),
    # one of six steps has no picture: the projector's gradient is zeros here, and none on one process, which skips it
    "text": ("llava_onevision", ("groups_per_step=1", "max_steps=6", "optim.weight_decay=0.1")),
    "bfloat16": ("llava_onevision", ("model.dtype=bfloat16", "model.freeze_lm_head=true", "max_steps=2")),
}
WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}


class Runs:
    """The folders of all runs: PLACE/two/NAME by two processes, PLACE/one/NAME by one."""

    def __init__(self, place: Path, data: Path):
        self.place, self.data = place, data
        self.jobs: list[dict] = []

    def words(self, name: str, where: str, family: str, *more: str) -> list[str]:
        folder = self.place / f"model-{family}"
        if not folder.exists():
            tiny_folder(family, folder)
        return [*COMMON, f"model.path={folder}", f"data.path={self.data}", f"output={self.place / where / name}", *more]

    def two(self, name: str, family: str, *more: str, **job) -> None:
        self.jobs.append({"words": [*self.words(name, "two", family, "shard=full", *more)], **job})

    def one(self, name: str, family: str, *more: str) -> Path:
        """Trains where it has not been done."""
        folder = self.folder(name, "one")
        return (
            folder if (folder / "model").exists() else train(config.load(None, self.words(name, "one", family, *more)))
        )

    def both(self, name: str) -> tuple[Path, Path]:
        """The folders (one, two) of a pair."""
        family, words = PAIRS[name]
        return self.one(name, family, *words), self.folder(name, "two")

    def folder(self, name: str, where: str) -> Path:
        return self.place / where / name

    def launch(self) -> None:
        path = self.place / "jobs.json"
        path.write_text(json.dumps(self.jobs))
        worker = REPOSITORY / "tests/train/shard_worker.py"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker), str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *launcher], env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_file) -> Runs:
    found = Runs(tmp_path_factory.mktemp("shard"), data_file)
    for name, (family, words) in PAIRS.items():
        more = ("sync_each_batch=true",) if name == "tied" else ()
        found.two(name, family, *words, *more, held=str(found.place / f"{name}.held"))
    found.two("cut", "llava_onevision", *FULL, "samples=1", gone_after=2)
    found.two("cut", "llava_onevision", *FULL, "samples=1")
    found.two("cut", "llava_onevision", *FULL, "samples=1")  # done already: only the model and answers are made again
    found.two("left", "llava_onevision", *FULL, gone_after=2)
    found.two("poisoned", "llava_onevision", "max_steps=2", poisoned=1)
    with pytest.MonkeyPatch.context() as patch:  # begun by one process, gone after two steps
        patch.setattr(Optimizer, "step", _gone_after(2))
        with pytest.raises(RuntimeError, match="gone"):
            found.one("begun", "llava_onevision", *FULL)
    shutil.copytree(found.folder("begun", "one"), found.folder("begun", "two"))
    found.two("begun", "llava_onevision", *FULL, "resume_changed=true")
    found.launch()
    return found


def _gone_after(steps: int):
    step, done = Optimizer.step, 0

    def stepped(self, **options):
        nonlocal done
        if done == steps:
            raise RuntimeError("gone")
        done += 1
        step(self, **options)

    return stepped


def newest(folder: Path) -> checkpoint.Checkpoint:
    path, skipped = checkpoint.latest(folder / "checkpoints")
    assert path is not None
    assert not skipped
    return checkpoint.load(path)


def assert_alike(two: Path, one: Path, *, rel: float = 2e-4, abs_: float = 2e-6) -> None:
    """The same numbers within rounding, step by step."""
    mine, theirs = metrics_of(two), metrics_of(one)
    assert [line["step"] for line in mine] == [line["step"] for line in theirs]
    for ours, alone in zip(mine, theirs, strict=True):
        for key in ("tokens", "scored_tokens", "images", "skipped_steps"):
            assert ours[key] == alone[key], key
        for key in set(alone) - {"seconds", "utilization"}:
            assert ours[key] == pytest.approx(alone[key], rel=rel, abs=abs_), key


def assert_close(two: checkpoint.Checkpoint, one: checkpoint.Checkpoint) -> None:
    """Weights and moments of the same names, shapes and dtypes; float32 rounding of sums in another order apart."""
    for part in ("model", "optimizer"):
        mine, theirs = getattr(two, part), getattr(one, part)
        assert set(mine) == set(theirs)
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [name for name in PAIRS if name != "bfloat16"])
def test_two_processes_with_a_cut_model_train_as_one(name, runs):
    one, two = runs.both(name)
    assert (facts_of(two)["processes"], facts_of(two)["status"]) == (2, "finished")
    assert_alike(two, one)
    assert_close(newest(two), newest(one))
    files = sorted(file.name for file in newest(two).path.iterdir())
    assert files == [
        "MANIFEST.json",
        *(f"model-{rank:05d}-of-00002.safetensors" for rank in (1, 2)),
        *(f"optimizer-{rank:05d}-of-00002.safetensors" for rank in (1, 2)),
        "state.json",
    ]
    if name == "lora":
        return  # rank 3 is cut 2 to 1
    sizes = [(newest(two).path / f"optimizer-{rank:05d}-of-00002.safetensors").stat().st_size for rank in (1, 2)]
    assert 0.8 < sizes[1] / sizes[0] < 1.05, "each process has its half"


@pytest.mark.parametrize("name", ["full", "lora", "tied"])
def test_the_model_that_is_left_is_an_ordinary_folder(name, runs):
    """The same files as one process writes; a tied head once; it loads, and holds the checkpoint's weights."""
    one, two = (folder / "model" for folder in runs.both(name))
    assert sorted(file.name for file in two.iterdir()) == sorted(file.name for file in one.iterdir())
    for file in two.glob("*.safetensors"):
        mine, theirs = load_file(file), load_file(one / file.name)
        assert set(mine) == set(theirs)
        for key, tensor in theirs.items():
            torch.testing.assert_close(mine[key], tensor, rtol=1e-3, atol=1e-6, msg=key)
    if name == "full":
        assert (two / "config.json").read_text() == (one / "config.json").read_text()
    model = load.load_model(two)
    stored = newest(runs.folder(name, "two")).model
    for key, parameter in model.named_parameters():
        if key in stored:
            assert torch.equal(parameter, stored[key]), key


@pytest.mark.parametrize("name", ["full", "lora"])
def test_answers_after_training_are_given_together(name, runs):
    theirs, mine = (folder / "samples.jsonl" for folder in runs.both(name))
    assert mine.read_text() == theirs.read_text()
    assert json.loads(mine.read_text())["after"] is not None


def test_bfloat16_rows_are_the_masters(runs):
    """Float32 rows are stepped, the weights are those rounded, and frozen ones stay as they are."""
    one, two = runs.both("bfloat16")
    assert_alike(two, one, rel=3e-2, abs_=3e-2)  # a bfloat16 weight or activation has 3 digits
    mine, theirs = newest(two), newest(one)
    assert set(mine.optimizer) == set(theirs.optimizer)
    masters = [key.removesuffix("/master") for key in mine.optimizer if key.endswith("/master")]
    assert sum(mine.model[name].numel() for name in masters) == facts_of(two)["model"]["trained"]
    for name in masters:
        assert mine.optimizer[f"{name}/master"].dtype == torch.float32
        assert torch.equal(mine.model[name], mine.optimizer[f"{name}/master"].bfloat16()), name
    assert {tensor.dtype for tensor in load_file(two / "model/model.safetensors").values()} == {torch.bfloat16}
    start = load_file(runs.place / "model-llava_onevision/model.safetensors")
    head = next(name for name in start if name.endswith("lm_head.weight"))
    saved = load_file(two / "model/model.safetensors")
    assert torch.equal(saved[head], start[head].bfloat16())


def test_cut_run_goes_on_bitwise(runs):
    straight, resumed = runs.folder("full", "two"), runs.folder("cut", "two")
    assert facts_of(resumed)["resumed_from"] == "step-00000003"
    assert any("resuming from step-00000003" in note for note in facts_of(resumed)["notes"])
    for line, expected in zip(metrics_of(resumed), metrics_of(straight), strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    mine, theirs = newest(resumed), newest(straight)
    for part in ("model", "optimizer"):
        for name, tensor in getattr(theirs, part).items():
            assert torch.equal(getattr(mine, part)[name], tensor), (part, name)
    assert mine.state["rng"] == theirs.state["rng"]
    assert (resumed / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_two_processes_began_and_one_goes_on_and_the_other_way_round(runs):
    """Refused without `resume_changed`, as every number of processes that is not the checkpoint's."""
    straight, _ = runs.both("full")
    shutil.copytree(runs.folder("left", "two"), runs.folder("left", "one"))
    with pytest.raises(ValueError, match=r"(?s)shard: 'full' -> 'none'.*processes: 2 -> 1"):
        runs.one("left", "llava_onevision", *FULL)
    left = runs.one("left", "llava_onevision", *FULL, "resume_changed=true")
    begun = runs.folder("begun", "two")
    for folder in (left, begun):
        assert facts_of(folder)["resumed_from"] == "step-00000002"
        assert_alike(folder, straight)
        assert_close(newest(folder), newest(straight))


def test_all_processes_skip_a_step_that_is_not_finite_on_one(runs):
    folder = runs.folder("poisoned", "two")
    lines = metrics_of(folder)
    assert [line["skipped_steps"] for line in lines] == [1, 1]
    assert lines[0]["grad_norm"] is None
    assert all(torch.isfinite(tensor).all() for tensor in newest(folder).model.values())


@pytest.mark.parametrize("name", list(PAIRS))
def test_plan_counts_what_one_of_the_processes_keeps(name, runs, monkeypatch):
    """The first process; it has the larger part of an odd number of rows (adapters: two of three)."""
    family, words = PAIRS[name]
    settings = config.load(None, runs.words(name, "two", family, "shard=full", *words))
    monkeypatch.setenv("WORLD_SIZE", "2")
    memory = plan(settings).memory
    for what, size in json.loads((runs.place / f"{name}.held").read_text()).items():
        assert getattr(memory, what) == pytest.approx(size, rel=0.2 if name == "lora" else 0.02), what


def test_plan_of_more_processes_is_smaller(tmp_path, data_file, monkeypatch):
    """A wide model, where weights matter beside activations; gradients wait whole unless they are synced."""
    load.save_pretrained(*tiny_model("llava_onevision", **WIDE), tmp_path / "model")
    words = [
        *COMMON,
        "tokens_per_batch=80",
        "max_steps=1",
        f"model.path={tmp_path / 'model'}",
        f"data.path={data_file}",
    ]
    peaks = {1: plan(config.load(None, words)).peak}
    for size in (8, 2):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        found = plan(config.load(None, [*words, "shard=full"]))
        assert f"weights, 1/{size}" in found.text()
        assert found.memory.cut is not None
        assert found.memory.moments == pytest.approx(8 * found.trained / size, abs=1)
        peaks[size] = found.peak
    synced = plan(config.load(None, [*words, "shard=full", "sync_each_batch=true"]))
    assert synced.memory.cut is not None
    assert synced.memory.cut.waiting == pytest.approx(found.memory.cut.waiting / 2, abs=1)
    assert synced.batches == found.batches
    assert peaks[8] < peaks[2] < peaks[1]


def test_one_process_is_refused(tmp_path, data_file, model_folder, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = [
        *COMMON,
        "shard=full",
        f"model.path={model_folder}",
        f"data.path={data_file}",
        f"output={tmp_path / 'run'}",
    ]
    with pytest.raises(ValueError, match="shard is full, but this is one process"):
        train(config.load(None, words))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="sync_each_batch must be false where shard is none"):
        config.load(None, ["sync_each_batch=true"])
    with pytest.raises(ValueError, match="shard must be one of none, full"):
        config.load(None, ["shard=zero"])


def test_every_process_has_as_many_micro_batches_as_the_others():
    """Those that are missing are the step's smallest group; what counts is dealt as without shards."""
    lengths = [50, 40, 30, 30, 20, 10, 10, 10]
    words = ["groups_per_step=3", "tokens_per_batch=60"]
    alone = [Plan(lengths, config.load(None, words), World(rank, 3)) for rank in range(3)]
    cut = [Plan(lengths, config.load(None, [*words, "shard=full"]), World(rank, 3)) for rank in range(3)]
    fillers = 0
    for step in range(alone[0].total):
        assert len({len(each[step]) for each in cut}) == 1
        smallest = min(lengths[index] for part in cut[0].whole(step) for index in part)
        for mine, ordinary in zip(cut, alone, strict=True):
            own = mine.own(step)
            assert mine[step][:own] == ordinary[step]
            assert [[lengths[index] for index in part] for part in mine[step][own:]] == [[smallest]] * (
                len(mine[step]) - own
            )
            fillers += len(mine[step]) - own
    assert fillers > 0


def test_dtypes_that_fsdp_would_round_silently_are_refused_by_name():
    """One block is gathered in one dtype: a float32 norm among bfloat16 weights would lose its digits."""
    norm, weight = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    for own in ({"norm": norm, "weight": weight}, {"norm": norm.detach(), "weight": weight}):
        with pytest.raises(ValueError, match=r"norm is float32, weight is bfloat16: set model\.dtype"):
            shard._policy(own)
    frozen = torch.nn.Parameter(weight.detach(), requires_grad=False)
    assert shard._policy({"norm": norm, "weight": frozen}).param_dtype is None, "adapters beside a bfloat16 model"
