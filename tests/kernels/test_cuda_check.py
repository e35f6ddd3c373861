"""The check of the CUDA sources: what it reads from ptxas, what it calls a fault, what it does without a compiler or
CUTLASS's headers. The compilers themselves run in CI, not here."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import cuda_check

SAID = """\
ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function '_ZN6mmrlhf4cuda12_GLOBAL__N_118exp2_rowsum_kernelEPfPKfS1_' for 'sm_80'
ptxas info    : Function properties for _ZN6mmrlhf4cuda12_GLOBAL__N_118exp2_rowsum_kernelEPfPKfS1_
    {stack} bytes stack frame, {stores} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 32 bytes smem, 440 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN6mmrlhf4cuda12_GLOBAL__N_117preference_kernelILb1ELi4EEEvv' for 'sm_80'
ptxas info    : Function properties for _ZN6mmrlhf4cuda12_GLOBAL__N_117preference_kernelILb1ELi4EEEvv
    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""


def test_what_ptxas_says_is_read():
    first, second = cuda_check.kernels_of(SAID.format(stack=0, stores=0), "file")
    assert first == cuda_check.Kernel("exp2_rowsum_kernel", registers=30, stack=0, spills=0, shared=32)
    assert second == cuda_check.Kernel("preference_kernel<1, 4>", registers=255, stack=16, spills=16, shared=0)
    assert first.hot
    assert not second.hot
    said = "Compiling entry function '_ZN7cutlass13device_kernelINS_4gemm6kernelE' for 'sm_90a'"
    assert cuda_check.kernels_of(said, "exp2_gemm_sm90_64x256")[0].hot, "CUTLASS's kernels bear their file's name"


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (SAID.format(stack=0, stores=0), []),
        (SAID.format(stack=8, stores=0), ["exp2_rowsum_kernel spills 0 bytes, 8 bytes of stack"]),
        (SAID.format(stack=0, stores=4), ["exp2_rowsum_kernel spills 4 bytes, 0 bytes of stack"]),
        (
            SAID.format(stack=0, stores=0) + "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async ...",
            ["ptxas C7510: wgmma is serialized"],
        ),
        ("nothing of use", ["ptxas named no kernel"]),
    ],
)
def test_faults(said, wanted):
    unit = cuda_check.Unit(Path("file.cu"), "80")
    unit.kernels = cuda_check.kernels_of(said, "file")
    assert cuda_check.faults(unit, said) == wanted


def test_every_kernel_is_called_hot_or_cold(repository):
    """A new kernel has to be put in one of the two lists, and a renamed one taken out."""
    written = {
        match[1]
        for path in (repository / "kernels/cuda").glob("*.cu")
        for match in re.finditer(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", path.read_text())
    }
    names = {*cuda_check.HOT, *cuda_check.COLD} - {"exp2_gemm_sm90"}
    assert written == names
    assert not set(cuda_check.HOT) & set(cuda_check.COLD)


def test_every_source_is_compiled(repository, tmp_path):
    everything = {path.name for path in (repository / "kernels/cuda").glob("*.cu")}
    with_headers = {(unit.source.name, unit.arch) for unit in cuda_check.units(tmp_path)}
    assert {name for name, _ in with_headers} == everything
    without = {unit.source.name for unit in cuda_check.units(None)}
    assert everything - without == {name for name in everything if name.startswith("exp2_gemm_sm90_")} != set()
    assert {arch for name, arch in with_headers if name == "exp2_rowsum.cu"} == {"80", "90a"}
    assert {arch for name, arch in with_headers if name.startswith("exp2_gemm")} == {"90a"}


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_check.shutil, "which", lambda name: None)
    assert cuda_check.main([]) == cuda_check.CANNOT
    assert "SKIPPED: nvcc is not on the PATH" in capsys.readouterr().out


PRETENDER = """#!/bin/sh
# Stands in for nvcc: says what ptxas would, or fails as nvcc does.
case "$*" in *preference.cu*) echo 'preference.cu(3): error: expected a ";"' >&2; exit 2;; esac
echo "ptxas info    : Compiling entry function '_ZN1a20exp2_epilogue_kernelEv' for 'sm_80'" >&2
echo "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" >&2
echo "ptxas info    : Used 30 registers" >&2
"""


@pytest.mark.parametrize("require", [False, True])
def test_without_cutlass(monkeypatch, tmp_path, capsys, require):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(PRETENDER)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_check, "cutlass_headers", lambda: None)
    sources = [source for source in cuda_check.SOURCES.glob("*.cu") if source.name == "exp2_rowsum.cu"]
    monkeypatch.setattr(cuda_check, "units", lambda cutlass: [cuda_check.Unit(source, "80") for source in sources])
    assert cuda_check.main(["--require-cutlass"] if require else []) == int(require)
    out = capsys.readouterr().out
    assert "SKIPPED: the Hopper GEMM: no CUTLASS headers" in out
    assert ("FAILED: no CUTLASS headers" in out) == require
    assert "exp2_epilogue_kernel" in out


def test_a_source_that_does_not_compile_is_a_fault(monkeypatch, tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(PRETENDER)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(cuda_check, "cutlass_headers", lambda: None)
    assert cuda_check.main([]) == 1
    out = capsys.readouterr().out
    assert 'FAULT nvcc: preference.cu(3): error: expected a ";"' in out
    assert "FAILED: preference.cu sm_80" in out
    assert "FAILED: exp2_rowsum.cu" not in out


def test_cutlass_folder_is_checked(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cuda_check.shutil, "which", lambda name: "/bin/true")
    with pytest.raises(SystemExit):
        cuda_check.main(["--cutlass", str(tmp_path)])
    assert "--cutlass must be CUTLASS's include folder" in capsys.readouterr().err


def test_headers_of_the_installed_package(monkeypatch, tmp_path):
    package = tmp_path / "cutlass_library"
    headers = package / "source/include"
    (headers / "cutlass").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cuda_check.cutlass_headers() is None
    version = headers / "cutlass/version.h"
    version.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0 \n")
    assert cuda_check.cutlass_headers() == headers
    assert cuda_check.version_of(headers) == "4.2.0"


def test_host_program_builds(repository, tmp_path):
    """Without the kernels it has nothing to link, so it is compiled only; cuda_check links and runs it."""
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, repository / "benchmarks/exp2_gemm_facts.cpp"], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_ci_is_a_clean_script_that_runs_both_checks(repository):
    script = repository / ".ci/run"
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    steps = re.findall(r'^step "[^"]+" (\w+)$', script.read_text(), re.MULTILINE)
    assert steps.index("aot") < steps.index("cuda_sources") < steps.index("build_wheels")
