"""The check that runs without a GPU: what it calls a fault, and (slow) that the sm_90 configurations have none."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys

import pytest

from mmrlhf.kernels.triton import configs


@pytest.fixture(scope="module")
def aot(repository):
    spec = importlib.util.spec_from_file_location("aot", repository / "benchmarks" / "aot.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    return module


def clean(aot, case):
    return aot.Result(registers=200, shared=1000, counts=dict.fromkeys(aot.COUNTED, 0) | dict.fromkeys(case.needs, 1))


def test_every_fault_is_named(aot):
    case = next(iter(aot.gemm_cases(90, quick=True)))
    result = clean(aot, case)
    assert aot.faults(case, result, 90) == []
    spilled = dataclasses.replace(result, stack=8, counts=result.counts | {"STL": 2, "LDL": 1})
    assert aot.faults(case, spilled, 90) == ["spills: 8 bytes of stack, 3 local loads and stores"]
    assert aot.faults(dataclasses.replace(case, hot=False), spilled, 90) == []
    large = dataclasses.replace(result, shared=232449)
    assert aot.faults(case, large, 90) == ["shared memory 232449 B is over the 232448 B of sm_90"]
    without = dataclasses.replace(result, counts=result.counts | {"UTMALDG": 0, "HGMMA": 0})
    assert aot.faults(case, without, 90) == ["no HGMMA in the SASS", "no UTMALDG in the SASS"]
    assert aot.faults(case, aot.Result(error="PTXASError: x"), 90) == ["PTXASError: x"]


@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_row_of_the_table_is_compiled(aot, arch):
    compiled = [case.config for case in aot.cases(arch)]
    for rule in (*configs.GEMM_RULES, *configs.CANDIDATES):
        if rule.arch[0] <= arch < rule.arch[1]:
            assert rule.config in compiled
    names = {case.name.split()[0] for case in aot.cases(arch)}
    assert names == {"exp2_gemm", "exp2_epilogue", "target_logit", "unit_gradient", "finish", "preference"}
    assert len({case.name for case in aot.cases(arch)}) == len(compiled)


@pytest.mark.slow
def test_sm90_compiles_without_a_fault(repository):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", "90", "--quick"]
    result = subprocess.run(command, cwd=repository, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "0 at fault" in result.stdout
    assert "wgmma TMA" in result.stdout
