"""Every example runs as its first line says, and its loss falls."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer", "trl_dpo"])
def test_the_example_runs_and_learns(name, tmp_path):
    for needed in {"trl_dpo": ("trl", "datasets")}.get(name, ()):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"\bloss'?:? '?(\d\.\d+)", result.stdout)]
    assert len(losses) == 12, result.stdout
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3])


def test_the_documentation_names_what_there_is():
    """Every import its diffs add works, and every option of PreferenceConfig it should mention it does."""
    text = (ROOT / "docs" / "drop-in.md").read_text()
    added = [line[1:] for line in text.splitlines() if line.startswith("+from mmrlhf")]
    assert len(added) >= 5
    has_trl = importlib.util.find_spec("trl") is not None
    for line in added:
        if has_trl or ".trl " not in line:
            exec(line, {})
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    if has_trl:
        from mmrlhf.integrations.trl import OPTIONS

        hidden = {"share_prefix", "image_root"}
        assert [name for name in OPTIONS if name not in hidden and name not in text] == []


@pytest.mark.parametrize("name", ["own_loop", "hf_trainer", "trl_dpo"])
def test_the_example_stays_short(name):
    lines = (ROOT / "examples" / f"{name}.py").read_text().splitlines()
    code = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", '"""', "import", "from"))]
    assert len(code) <= 33
