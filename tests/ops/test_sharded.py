"""A vocabulary that lies on two ranks (gloo, CPU), and DTensor weights: values and every gradient against one process.

One launch runs all cases of `sharded_worker`, at most once a session; here each is a test.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrlhf.ops import VocabShard

WORKER = Path(__file__).with_name("sharded_worker.py")
CASES = re.findall(r"^def case_(\w+)", WORKER.read_text(), re.MULTILINE)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict[str, str | None]]:
    """What each rank says of each case: its traceback, or None."""
    out = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
    }  # on the CPU, with a GPU beside it too
    # A collective that only one rank makes would hang: the limit is what ends the test then.
    done = subprocess.run([*command, str(out)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case, results):
    failed = [f"rank {rank}:\n{found[f'case_{case}']}" for rank, found in enumerate(results) if found[f"case_{case}"]]
    assert not failed, "\n".join(failed)


def test_it_needs_a_process_group():
    with pytest.raises(RuntimeError, match=r"torch\.distributed\.init_process_group"):
        VocabShard((0, 10))


def test_importing_asks_for_nothing(subprocess_python):
    """torch.distributed.tensor, which takes long to import, is looked up only where a DTensor exists."""
    loaded = subprocess_python("import sys, mmrlhf.ops; print('torch.distributed.tensor' in sys.modules)")
    plain = subprocess_python("import sys, torch; print('torch.distributed.tensor' in sys.modules)")
    assert loaded == plain
