"""Compile every CUDA source for the architectures it is shipped for, without a GPU, and say what ptxas made of it.

    python -m benchmarks.cuda_check [--cutlass FOLDER] [--require-cutlass] [--jobs N]

One line a kernel: registers, stack, spilled bytes, static shared memory. Exit status 1 where a source does not compile,
a hot kernel spills, ptxas serialises wgmma (C7510), or the Hopper GEMM has no wgmma or TMA in its machine code, more
shared memory than an SM has, or refuses a shape that it is for (CUTLASS's own host code is asked, linked with the
objects). FOLDER is CUTLASS's include folder; by default that of the installed package nvidia-cutlass, and without one
the Hopper GEMM is left out, unless --require-cutlass says that this is an error. Without nvcc: status 77, nothing done.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "cuda"
HOST_PROGRAM = ROOT / "benchmarks" / "exp2_gemm_facts.cpp"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xptxas", "-v")
ARCHITECTURES = ("80", "90a")
CUTLASS_ARCHITECTURES = ("90a",)
CANNOT = 77

# Kernels that every logit or hidden value goes through: a spill in one of them is a fault.
HOT = (
    "exp2_gemm_sm90",
    "exp2_rowsum_kernel",
    "exp2_epilogue_kernel",
    "redo_kernel",
    "redo_unit_kernel",
    "target_logit_kernel",
    "token_statistics_kernel",
    "unit_gradient_kernel",
)
# Kernels that a few numbers a row or a batch go through, most of them in float64.
COLD = ("finish_kernel", "finish_statistics_kernel", "preference_kernel", "redo_offset_kernel", "select_kernel")
# What the Hopper GEMM is for, and has to be in its machine code.
NEEDED = ("HGMMA", "UTMALDG", "UTMASTG")


@dataclass
class Kernel:
    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0  # bytes stored and loaded
    shared: int = 0  # bytes known at compile time

    @property
    def hot(self) -> bool:
        return self.name.startswith(HOT)


@dataclass
class Unit:
    """One source for one architecture, and what came of it."""

    source: Path
    arch: str
    cutlass: Path | None = None
    seconds: float = 0.0
    kernels: list[Kernel] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.source.name} sm_{self.arch}"

    def object_in(self, folder: Path) -> Path:
        return folder / f"{self.source.stem}.{self.arch}.o"


def needs_cutlass(source: Path) -> bool:
    return '#include "exp2_gemm_sm90.cuh"' in source.read_text()


def cutlass_headers() -> Path | None:
    """The include folder of the installed package nvidia-cutlass."""
    spec = importlib.util.find_spec("cutlass_library")
    for place in (spec and spec.submodule_search_locations) or ():
        folder = Path(place) / "source" / "include"
        if (folder / "cutlass" / "version.h").is_file():
            return folder
    return None


def units(cutlass: Path | None) -> list[Unit]:
    """Everything to compile, the longest first."""
    sources = sorted(SOURCES.glob("*.cu"), key=lambda source: (not needs_cutlass(source), source.name))
    found = []
    for source in sources:
        if not needs_cutlass(source):
            found += [Unit(source, arch) for arch in ARCHITECTURES]
        elif cutlass is not None:
            found += [Unit(source, arch, cutlass) for arch in CUTLASS_ARCHITECTURES]
    return found


def compile_unit(unit: Unit, folder: Path) -> Unit:
    command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{unit.arch},code=sm_{unit.arch}"]
    if unit.cutlass is not None:
        command += ["--expt-relaxed-constexpr", f"-I{unit.cutlass}"]
    start = time.perf_counter()
    result = subprocess.run(
        [*command, "-c", str(unit.source), "-o", str(unit.object_in(folder))], capture_output=True, text=True
    )
    unit.seconds = time.perf_counter() - start
    said = result.stdout + result.stderr
    unit.kernels = kernels_of(said, unit.source.stem)
    unit.faults = faults(unit, said)
    if result.returncode != 0:
        errors = [line for line in said.splitlines() if "error" in line.lower()] or said.splitlines()[-3:]
        unit.faults = [f"nvcc: {line[:300]}" for line in errors[:5]]
    elif unit.cutlass is not None and not unit.faults:
        unit.faults = missing_instructions(unit.object_in(folder))
    return unit


def kernels_of(said: str, stem: str) -> list[Kernel]:
    """What `ptxas -v` says of each kernel."""
    found: list[Kernel] = []
    for line in said.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            found.append(Kernel(readable(match[1], stem)))
        if not found:
            continue
        here = found[-1]
        if match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            here.stack, here.spills = int(match[1]), int(match[2]) + int(match[3])
        if match := re.search(r"Used (\d+) registers", line):
            here.registers = int(match[1])
            shared = re.search(r"(\d+) bytes smem", line)
            here.shared = int(shared[1]) if shared else 0
    return found


def readable(mangled: str, stem: str) -> str:
    """A kernel's own name with its compile-time arguments; that of the file where it is CUTLASS's."""
    if "cutlass" in mangled:
        return stem
    at = 0
    while match := re.compile(r"\D*?(\d+)").match(mangled, at):  # a name is its length and then itself
        at = match.end() + int(match[1])
        name = mangled[match.end() : at]
        if name.endswith("kernel"):
            values = re.findall(r"L[a-z](\d+)E", mangled[at:]) if mangled[at : at + 1] == "I" else []
            return name + (f"<{', '.join(values)}>" if values else "")
    return mangled


def faults(unit: Unit, said: str) -> list[str]:
    found = ["ptxas C7510: wgmma is serialized"] if "C7510" in said else []
    if not unit.kernels:
        found.append("ptxas named no kernel")
    for kernel in unit.kernels:
        if kernel.hot and (kernel.spills or kernel.stack):
            found.append(f"{kernel.name} spills {kernel.spills} bytes, {kernel.stack} bytes of stack")
    return found


def missing_instructions(file: Path) -> list[str]:
    """What the Hopper GEMM lacks in its machine code, by the disassemblers that Triton brings."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        print("    triton is not installed: the machine code was not looked at")
        return []
    tools = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as place:
        subprocess.run([tools / "cuobjdump", "-xelf", "all", file], cwd=place, check=True, capture_output=True)
        code = "".join(
            subprocess.run([tools / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
            for cubin in sorted(Path(place).glob("*.cubin"))
        )
    return [f"no {name} in the machine code" for name in NEEDED if not re.search(rf"\b{name}\b", code)]


def host_facts(objects: list[Path], cutlass: Path, folder: Path) -> int:
    """CUTLASS's host half: shared memory, stages, workspace, and whether it takes the shapes. The program's status."""
    program = folder / "exp2_gemm_facts"
    command = ["nvcc", "-std=c++17", "-O1", f'-DMMRLHF_CUTLASS_VERSION="{version_of(cutlass)}"', "-o", str(program)]
    built = subprocess.run(
        [*command, HOST_PROGRAM, SOURCES / "exp2_gemm.cpp", *objects], capture_output=True, text=True
    )
    if built.returncode != 0:
        print(f"    FAULT {HOST_PROGRAM.name} does not build: {built.stderr.strip()[-600:]}")
        return 1
    ran = subprocess.run([program], capture_output=True, text=True)
    print(ran.stdout, end="", flush=True)
    return ran.returncode


def version_of(cutlass: Path) -> str:
    text = (cutlass / "cutlass" / "version.h").read_text()
    return ".".join(re.findall(r"#define CUTLASS_(?:MAJOR|MINOR|PATCH) +(\d+)", text))


def report(unit: Unit) -> None:
    print(f"{unit.name}, {unit.seconds:.0f} s", flush=True)
    for kernel in unit.kernels:
        print(
            f"  {kernel.name:<48} {'hot' if kernel.hot else '   '} {kernel.registers:4d} registers  "
            f"{kernel.stack:4d} B stack  {kernel.spills:4d} B spilled  {kernel.shared:6d} B shared"
        )
    for fault in unit.faults:
        print(f"    FAULT {fault}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_check", description=__doc__.splitlines()[0])
    parser.add_argument("--cutlass", type=Path, help="CUTLASS's include folder")
    parser.add_argument("--require-cutlass", action="store_true", help="fail without CUTLASS's headers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    chosen = parser.parse_args(arguments)
    if shutil.which("nvcc") is None:
        print("SKIPPED: nvcc is not on the PATH, no CUDA source was compiled")
        return CANNOT
    cutlass = chosen.cutlass or cutlass_headers()
    if cutlass is not None and not (cutlass / "cutlass" / "version.h").is_file():
        parser.error(f"--cutlass must be CUTLASS's include folder, got {cutlass}")
    if cutlass is None:
        print("SKIPPED: the Hopper GEMM: no CUTLASS headers. To have them: pip install --no-deps nvidia-cutlass")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place, concurrent.futures.ThreadPoolExecutor(chosen.jobs) as pool:
        folder = Path(place)
        done = []
        for unit in pool.map(lambda unit: compile_unit(unit, folder), units(cutlass)):
            report(unit)
            done.append(unit)
        at_fault = [unit.name for unit in done if unit.faults]
        gemm = [unit for unit in done if unit.cutlass is not None]
        objects = [unit.object_in(folder) for unit in gemm if not unit.faults]
        if cutlass is not None and len(objects) == len(gemm) and host_facts(objects, cutlass, folder) != 0:
            at_fault.append("exp2_gemm on the host")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if cutlass is None and chosen.require_cutlass:
        at_fault.append("no CUTLASS headers, which --require-cutlass asks for")
    print(
        f"{len(done)} compilations, {len(at_fault)} at fault, {time.perf_counter() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of CPU time"
    )
    for name in at_fault:
        print(f"FAILED: {name}")
    return 1 if at_fault else 0


if __name__ == "__main__":
    sys.exit(main())
