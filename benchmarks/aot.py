"""Compile every Triton configuration that `configs.pick` can return, without a GPU, and say what came out.

    python -m benchmarks.aot [--arch 90] [--quick] [--jobs N]

The list of cases is benchmarks/aot_cases.py. One line a kernel: registers, spills, shared memory, and what the SASS
holds (wgmma on sm_90, tcgen05 on sm_100, TMA, warp specialisation). Exit status 1 where a kernel does not compile, a
hot kernel spills, shared memory is over the architecture's limit (which Triton checks only on a device), or an
instruction that the configuration is about is not there. Works alike in Triton 3.6 and 3.9; the disassemblers are those
that Triton brings. Not covered: speed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.aot_cases import Case, cases
from mmrlhf.kernels.triton import configs, linear_logp

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESERVED = 1024  # bytes of shared memory that every program takes besides its own (CUDA programming guide)
REGISTERS = 65536  # of a multiprocessor
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "USETMAXREG", "STL", "LDL")


@dataclass
class Result:
    registers: int = 0
    stack: int = 0
    shared: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""


def compile_case(case: Case, arch: int) -> Result:
    """Compile for sm_`arch` and read the machine code; `error` holds the compiler's last word if it fails."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    # What is divisible by 16 wherever these configurations are picked: pointers, and an aligned matrix's strides.
    even = ["tile_stride", "out_stride", "product_stride", "weight_stride", "hidden_stride", "width"]
    unaligned = {p.name for p in case.kernel.params if p.do_not_specialize_on_alignment}
    pointers = {n for n in names if signature[n].startswith("*")} - unaligned
    divisible = [n for n in names if n in pointers or (n in even and signature[n] == "i32")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attributes)
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    result, start = Result(), time.perf_counter()
    with _captured() as output:
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        except Exception as error:  # the compiler's own classes differ between versions, and all mean the same here
            result.error = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    result.seconds = time.perf_counter() - start
    if result.error:
        notes = [line for line in output() if "error:" in line or "fatal" in line]
        result.error = " | ".join([result.error, *notes[:2]])
        return result
    result.shared = compiled.metadata.shared
    _read(compiled.asm["cubin"], result)
    return result


@contextlib.contextmanager
def _captured() -> Iterator[Any]:
    """Send file descriptors 1 and 2 to a file: a failing compile prints whole modules there."""
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            lines: list[str] = []
            yield lambda: lines
        finally:
            sys.stdout.flush()
            for target, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, target)
                os.close(copy)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _read(cubin: bytes, result: Result) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        result.error = f"cuobjdump gave no resource usage: {usage.strip()[:200]!r}"
        return
    result.registers, result.stack = int(found[1]), int(found[2])
    result.counts = {name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED}


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


def faults(case: Case, result: Result, arch: int) -> list[str]:
    """Why this result is not good enough; empty if it is."""
    if result.error:
        return [result.error]
    found = []
    spills = result.counts["STL"] + result.counts["LDL"]
    if case.hot and (result.stack or spills):
        found.append(f"spills: {result.stack} bytes of stack, {spills} local loads and stores")
    programs = getattr(case.config, "programs", 1)
    limit = (configs.SHARED_LIMIT[arch] + RESERVED) // programs - RESERVED
    if result.shared > limit:
        found.append(f"shared memory {result.shared} B is over the {limit} B of sm_{arch}")
    registers = REGISTERS // (programs * 32 * case.config.num_warps)
    if result.registers > registers:
        found.append(
            f"{result.registers} registers are over the {registers} that {programs} programs leave each thread"
        )
    found += [f"no {name} in the SASS" for name in case.needs if not result.counts[name]]
    return found


def line(case: Case, result: Result) -> str:
    if result.error:
        return f"  {case.name:<64} {result.seconds:5.1f} s"
    marks = {"wgmma": "HGMMA", "tcgen05": "UTCHMMA", "mma": "HMMA", "cp.async": "LDGSTS", "setmaxnreg": "USETMAXREG"}
    seen = [mark for mark, name in marks.items() if result.counts[name]]
    if result.counts["UTMALDG"] or result.counts["UTMASTG"]:
        seen.append(f"TMA {result.counts['UTMALDG']}+{result.counts['UTMASTG']}")
    spills = result.counts["STL"] + result.counts["LDL"]
    return (
        f"  {case.name:<64} {result.registers:4d} registers  {result.stack:4d} B stack  {spills:3d} spills  "
        f"{result.shared:6d} B shared  {result.seconds:5.1f} s  {' '.join(seen)}"
    )


def _compile_numbered(arch: int, quick: bool, number: int) -> Result:
    return compile_case(cases(arch, quick=quick)[number], arch)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=configs.ARCHITECTURES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="one epilogue a configuration, two loss kinds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    chosen = parser.parse_args(arguments)
    if type(linear_logp.exp2_gemm_kernel).__name__ == "InterpretedFunction":
        print("TRITON_INTERPRET is set: the kernels were decorated for the interpreter and cannot be compiled")
        return 2
    failures, count, start = [], 0, time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(chosen.jobs, multiprocessing.get_context("fork")) as pool:
        for arch in chosen.arch or configs.ARCHITECTURES:
            found = cases(arch, quick=chosen.quick)
            limit = configs.SHARED_LIMIT[arch]
            print(f"sm_{arch}, Triton {triton.__version__}, shared memory limit {limit} B", flush=True)
            numbers = range(len(found))  # not the kernels themselves: they do not pickle, and a fork has them
            results = pool.map(functools.partial(_compile_numbered, arch, chosen.quick), numbers)
            for case, result in zip(found, results, strict=True):
                print(line(case, result), flush=True)
                why = faults(case, result, arch)
                for fault in why:
                    print(f"    FAULT {fault}", flush=True)
                failures += [f"sm_{arch} {case.name}"] if why else []
                count += 1
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(each.ru_utime + each.ru_stime for each in used)
    seconds = time.perf_counter() - start
    print(f"{count} kernels, {len(failures)} at fault, {seconds:.0f} s, {cpu:.0f} s of CPU time")
    for name in failures:
        print(f"FAILED: {name}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
