"""Two processes (gloo, CPU) through the drop-ins match one: DDP in TRL's loop, and a model under `fully_shard`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", "1.15", reason="TRL 1.15 or later is not installed")
pytest.importorskip("datasets", reason="datasets is not installed")

WORKER = Path(__file__).with_name("worker.py")
pytestmark = [
    pytest.mark.hosts,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


def launch(what: str, out: Path, processes: int) -> None:
    command = [sys.executable, str(WORKER), what, str(out)]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]


def test_ddp_matches_one_process(tmp_path):
    launch("ddp", tmp_path, 1)
    launch("ddp", tmp_path, 2)
    for name in ("live", "cached", "lora", "accumulated"):
        one, two = (torch.load(tmp_path / f"{name}-{world}.pt") for world in (1, 2))
        for key, values in one["log"].items():
            assert len(values) == 4  # steps
            assert two["log"][key] == pytest.approx(values, rel=1e-3, abs=1e-5), (name, key)
        assert set(one["weights"]) == set(two["weights"])
        for key, value in one["weights"].items():
            torch.testing.assert_close(two["weights"][key], value, rtol=1e-3, atol=2e-4, msg=f"{name}: {key}")


def test_a_sharded_model_matches_one_process(tmp_path):
    launch("fsdp", tmp_path, 2)
    done = ["llava_onevision-unit.ok", "llava_onevision.ok", "qwen2_5_vl.ok"]
    assert sorted(path.name for path in tmp_path.glob("*.ok")) == done
