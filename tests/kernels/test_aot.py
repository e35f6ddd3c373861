"""The check that runs without a GPU: what it calls a fault, and (slow) that the sm_90 configurations have none."""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys

import pytest

from benchmarks import aot, aot_cases
from mmrlhf.kernels.triton import configs


def clean(case):
    return aot.Result(registers=200, shared=1000, counts=dict.fromkeys(aot.COUNTED, 0) | dict.fromkeys(case.needs, 1))


def test_every_fault_is_named():
    case = next(case for case in aot_cases.gemm_cases(90, quick=True) if case.config.programs == 1)
    result = clean(case)
    assert aot.faults(case, result, 90) == []
    spilled = dataclasses.replace(result, stack=8, counts=result.counts | {"STL": 2, "LDL": 1})
    assert aot.faults(case, spilled, 90) == ["spills: 8 bytes of stack, 3 local loads and stores"]
    assert aot.faults(dataclasses.replace(case, hot=False), spilled, 90) == []
    large = dataclasses.replace(result, shared=232449)
    assert aot.faults(case, large, 90) == ["shared memory 232449 B is over the 232448 B of sm_90"]
    paired = dataclasses.replace(case, config=dataclasses.replace(case.config, num_warps=4, programs=2))
    assert aot.faults(paired, dataclasses.replace(result, registers=255, shared=115712), 90) == []
    assert aot.faults(paired, dataclasses.replace(result, shared=115713), 90) == [
        "shared memory 115713 B is over the 115712 B of sm_90"
    ]
    wide = dataclasses.replace(case, config=dataclasses.replace(case.config, num_warps=8, programs=2))
    assert aot.faults(wide, result, 90) == ["200 registers are over the 128 that 2 programs leave each thread"]
    without = dataclasses.replace(result, counts=result.counts | {"UTMALDG": 0, "HGMMA": 0})
    assert aot.faults(case, without, 90) == ["no HGMMA in the SASS", "no UTMALDG in the SASS"]
    assert aot.faults(case, aot.Result(error="PTXASError: x"), 90) == ["PTXASError: x"]


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_row_of_the_table_is_compiled(arch):
    cases = aot_cases.cases(arch)
    compiled = [case.config for case in cases]
    for rule in (*configs.TUNED, *configs.GEMM_RULES, *configs.CANDIDATES):
        if rule.arch[0] <= arch < rule.arch[1]:
            assert rule.config in compiled
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_everything_pick_returns_is_compiled_with_its_epilogue(arch, bias, softcap, statistics):
    """Not only the row of the table: a configuration that holds the plain epilogue may spill with a heavier one."""
    flags = {"bias": bias, "softcap": softcap, "statistics": statistics}
    compiled = {
        (case.config, case.constants["SOFTCAP"], case.constants["STATS"], "bias" not in case.constants)
        for case in aot_cases.gemm_cases(arch, quick=False)
    }
    for rows in (1, 2, 63, 64, 65, 127, 128, 255, 256, 257, 1024, 1025, 4096, 100_000):
        config = configs.pick(configs.Problem(arch, rows, 3584, 152064, **flags))
        assert (config, softcap, statistics, bias) in compiled


def test_rows_of_the_tuned_table_are_compiled(monkeypatch):
    """A tuner may write any configuration for any range of rows."""
    tuned = configs.GemmConfig(4, 5, 64, 256, 64, loads="descriptor")
    monkeypatch.setattr(configs, "TUNED", (configs.Rule(tuned, (90, 91), max_rows=300, heavy=0),))
    assert tuned in [case.config for case in aot_cases.cases(90)]
    assert {300, 301} <= set(aot_cases.row_counts())


def test_every_kernel_is_compiled(repository):
    """A kernel that is not in the list would never meet the compiler before a GPU does."""
    written = {
        node.name
        for path in (repository / "kernels/triton").glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    assert {case.kernel.__name__ for case in aot_cases.cases(90)} == written
    for case in aot_cases.cases(90):
        assert set(case.constants) | set(case.types) >= {name for name in case.kernel.arg_names if name.isupper()}, (
            f"{case.name} lacks a compile-time argument"
        )


def test_no_kernel_is_compiled_for_a_number_of_rows():
    """What changes from step to step is not specialised on: 1, a multiple of 16 and the rest would be three kernels,
    and a slice that begins off a 16-byte boundary another, each seconds of compilation in the middle of a run."""
    changing = {"rows", "first", "capacity", "responses", "tiles", "stat_stride", "partial_stride", "group_m"}
    slices = {"target", "z_y", "slope_y", "offset", "rest", "logp"}
    for kernel in {case.kernel for case in aot_cases.cases(90)}:
        given = kernel.kwargs if hasattr(kernel, "kwargs") else vars(kernel)
        names = set(kernel.arg_names)
        assert set(given["do_not_specialize"]) >= changing & names, kernel.__name__
        assert set(given["do_not_specialize_on_alignment"]) >= slices & names, kernel.__name__


@pytest.mark.slow
def test_launches_are_bound_and_compiled_once(repository):
    """The engine in bfloat16 up to the launch itself: every argument is bound, and another N compiles nothing."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot_launch"]
    result = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " 0 at fault" in result.stdout


@pytest.mark.slow
def test_sm90_compiles_without_a_fault(repository):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "90", "--quick"]
    result = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "0 at fault" in result.stdout
    assert "wgmma TMA" in result.stdout
