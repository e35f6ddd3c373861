"""The CUDA kernels, their launchers and bindings as a module of host code (emulate.h), and the cuda engine over it."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mmrlhf.ops import backend

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    *(f"kernels/cuda/{name}.cu" for name in ("exp2_rowsum", "linear_logp", "preference", "redo", "token_statistics")),
    "kernels/cuda/exp2_gemm.cpp",
    "tests/csrc/emulated.cpp",
]


def cuda_headers() -> Path | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    found = (Path(home) / "include" for home in homes if home)
    return next((each for each in found if (each / "cuda_runtime_api.h").is_file()), None)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The module, compiled."""
    nanobind = pytest.importorskip("nanobind")
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or headers is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ and CUDA's headers")
    built = tmp_path_factory.mktemp("emulated") / "_emulated.abi3.so"
    definitions = ["NB_BACKEND_MODULE=nanobind_backend", "NB_BACKEND_PYPI=nanobind-backend", "Py_LIMITED_API=0x30a0000"]
    definitions.append('MMRLHF_CUDA_ARCHS="emulated"')
    includes = [sysconfig.get_paths()["include"], nanobind.include_dir(), str(headers)]
    command = [compiler, "-O1", "-std=gnu++17", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-attributes"]
    command += [f"-D{each}" for each in definitions] + [f"-I{each}" for each in includes]
    command += ["-include", str(ROOT / "tests/csrc/emulate.h"), "-x", "c++", *SOURCES, "-o", str(built)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    spec = importlib.util.spec_from_file_location("_emulated", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def engine(emulated, monkeypatch):
    """The cuda engine over the emulated kernels, with a workspace that takes two tiles of a few rows."""
    from mmrlhf.ops import _cuda, _cuda_passes, _cuda_redo, _gemm

    for module in (_cuda, _cuda_passes, _cuda_redo):
        monkeypatch.setattr(module, "device", emulated)
    monkeypatch.setattr(_cuda_redo, "ROW_STEP", 4)
    monkeypatch.setattr(_gemm, "WORKSPACE_BYTES", 100_000)
    return _cuda


@pytest.fixture
def public(engine, monkeypatch):
    """backend="cuda" for tensors on the CPU."""
    rows = (dataclasses.replace(row, refuse=lambda _: None) if row.name == "cuda" else row for row in backend.BACKENDS)
    monkeypatch.setattr(backend, "BACKENDS", tuple(rows))
