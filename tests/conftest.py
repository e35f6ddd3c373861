"""Fixtures that every room shares. Nothing here touches the network, and no test may: the hub is switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Tests side by side share the processors, and so do the programs they start: before torch is imported, which reads it.
_side_by_side = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _side_by_side > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _side_by_side)))

import torch  # noqa: E402

# Without a GPU the kernels run in Triton's interpreter, which has to be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture
def subprocess_python(tmp_path):
    """Runs Python code in a fresh interpreter and returns what it printed; fails with its stderr if it fails.

    `repository_first=True` starts in the checkout with its root on sys.path, as `python -m` there would.
    """

    def run(
        code: str, *, repository_first: bool = True, env: dict[str, str] | None = None, timeout: float = 120
    ) -> str:
        where = REPOSITORY if repository_first else tmp_path
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=where,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    return run
