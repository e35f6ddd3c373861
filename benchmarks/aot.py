"""Compile every Triton configuration that `configs.pick` can return, without a GPU, and say what came out.

    python -m benchmarks.aot [--arch 90] [--quick]

One line a kernel: registers, spills, shared memory, and what the SASS holds (wgmma on sm_90, tcgen05 on sm_100, TMA,
warp specialisation). Exit status 1 where a kernel does not compile, a hot kernel spills, shared memory is over the
architecture's limit (which Triton checks only on a device), or an instruction that the configuration is about is not
there. Works alike in Triton 3.6 and 3.9; the disassemblers are those that Triton brings. Not covered: speed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
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

from mmrlhf.kernels.triton import configs, launch, linear_logp, preference
from mmrlhf.kernels.triton.configs import GemmConfig, LaunchConfig, Problem

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "UTCHMMA", "HMMA", "UTMALDG", "UTMASTG", "LDGSTS", "USETMAXREG", "STL", "LDL")
WIDTH = 4096  # of the hidden rows; only its divisibility is seen


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time arguments; pointers take 16-byte aligned tensors, as PyTorch's are."""

    name: str
    kernel: Any
    config: LaunchConfig
    types: dict[str, str]  # of the arguments that are neither constants nor int32
    constants: dict[str, Any]
    hot: bool = True
    needs: tuple[str, ...] = ()  # instructions that have to be there


@dataclass
class Result:
    registers: int = 0
    stack: int = 0
    shared: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    error: str = ""


def gemm_cases(arch: int, *, quick: bool) -> Iterator[Case]:
    """What `pick` returns for few and many rows and every epilogue, and the candidates for the same problems."""
    seen = set()
    for rows, bias, softcap, statistics in itertools.product((64, 4096), *[(False, True)] * 3):
        if quick and softcap != bias:
            continue
        problem = Problem(arch, rows, WIDTH, 151646, bias=bias, softcap=softcap, statistics=statistics)
        found = [configs.pick(problem), *(rule.config for rule in configs.CANDIDATES if configs.fits(rule, problem))]
        names = [name for name in ("bias", "softcap", "statistics") if getattr(problem, name)]
        for config in found:
            assert isinstance(config, GemmConfig), f"sm_{arch} has no GEMM row for {problem}"
            variants = ["+".join(names)]
            if not names and not quick:
                variants += ["sums", "ragged width"] if config.loads == "pointer" else ["sums"]
            for variant in variants:
                if (config, variant) not in seen:
                    seen.add((config, variant))
                    yield gemm_case(arch, config, variant)


def gemm_case(arch: int, config: GemmConfig, variant: str) -> Case:
    width = WIDTH + 16 if "ragged" in variant else WIDTH
    constants: dict[str, Any] = launch.gemm_constants(config, "softcap" in variant, "statistics" in variant, width)
    types = {"hidden": "*bf16", "weight": "*bf16", "out": "*bf16", "bias": "*bf16", **_rows()}
    if config.loads == "descriptor":
        types["hidden"] = f"tensordesc<bf16[{config.block_m}, {config.block_h}]>"
        types["weight"] = f"tensordesc<bf16[{config.block_v}, {config.block_h}]>"
        types["out"] = f"tensordesc<bf16[{config.block_m}, {config.tile_columns}]>"
    if "bias" not in variant:
        constants["bias"] = None
    if variant == "sums":
        constants["out"] = None
    needs: tuple[str, ...] = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}[arch]
    if config.loads != "pointer":
        needs += ("UTMALDG",) if variant == "sums" else ("UTMALDG", "UTMASTG")
    if config.warp_specialize:
        needs += ("USETMAXREG",)
    shape = f"{config.block_m}x{config.block_v}x{config.block_h}"
    name = f"exp2_gemm {config.loads} {shape} w{config.num_warps} s{config.num_stages}"
    name += (f" split{config.split}" if config.split > 1 else "") + (" ws" if config.warp_specialize else "")
    return Case(f"{name} {variant}".strip(), linear_logp.exp2_gemm_kernel, config, types, constants, needs=needs)


def epilogue_cases(*, quick: bool) -> Iterator[Case]:
    table = [(configs.EPILOGUE, ""), (configs.EPILOGUE_NARROW, "softcap+bias+statistics")]
    if not quick:
        table += [
            (configs.EPILOGUE, "bias"),
            (configs.EPILOGUE_NARROW, "softcap"),
            (configs.EPILOGUE_NARROW, "statistics"),
        ]
    for config, variant in table:
        constants = {
            "SOFTCAP": "softcap" in variant,
            "STATS": "statistics" in variant,
            "BLOCK_M": config.block_m,
            "BLOCK_V": config.block_v,
        }
        types = {"tile": "*fp32", "out": "*bf16", "bias": "*bf16", **_rows()}
        if "bias" not in variant:
            constants["bias"] = None
        name = f"exp2_epilogue {config.block_m}x{config.block_v} w{config.num_warps} {variant}".strip()
        yield Case(name, linear_logp.exp2_epilogue_kernel, config, types, constants)


def row_cases() -> Iterator[Case]:
    """The kernels that run a few numbers a row."""
    config = configs.TARGET_LOGIT
    constants: dict[str, Any] = {"SOFTCAP": True, "BLOCK_M": config.block_m, "BLOCK_H": config.block_other}
    types = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", **_rows()}
    yield Case("target_logit", linear_logp.target_logit_kernel, config, types, constants)
    config = configs.UNIT_GRADIENT
    constants = {"BLOCK_M": config.block_m, "BLOCK_H": config.block_other}
    types = {"product": "*fp32", "out": "*fp32", "weight": "*bf16", **_rows()}
    yield Case("unit_gradient", linear_logp.unit_gradient_kernel, config, types, constants)
    config = configs.FINISH
    for statistics in (False, True):
        constants = {"STATS": statistics, "BLOCK_M": config.block_m, "BLOCK_T": config.block_other}
        if not statistics:
            constants |= dict.fromkeys(("entropy", "sum_p2", "is_top1", "mean_logit", "maximum"))
        name = "finish" + (" statistics" if statistics else "")
        yield Case(name, linear_logp.finish_kernel, config, _rows(), constants, hot=False)


def preference_cases(arch: int, *, quick: bool) -> Iterator[Case]:
    """Every kind for one architecture; the shortest and the one with a pass more for the others."""
    config = configs.PREFERENCE
    kinds = preference.KINDS if arch == 90 and not quick else ("sigmoid", "bco_pair")
    inputs = "logp token_weight reference beta margin pair_weight"
    outputs = "scores rewards d_score losses margins betas coef total_loss accuracy sft_loss"
    floats = "beta_value w k label_smoothing gamma_beta_ratio discopop_tau num_pairs_value num_sft_value sft_weight"
    types = dict.fromkeys(f"{inputs} {outputs}".split(), "*fp32") | dict.fromkeys(floats.split(), "fp32")
    types |= {"cu_seqlens": "*i64", "pairs": "*i64", "scratch": "*fp64"}
    for kind in kinds:
        constants = {"KIND": kind, "MEAN": True, "PER_PAIR": True, "num_pairs": None, "num_sft_tokens": None}
        constants |= {"BLOCK_R": config.block_r, "BLOCK_T": config.block_t, "BLOCK_P": config.block_p}
        yield Case(f"preference {kind}", preference.preference_kernel, config, types, constants)


def _rows() -> dict[str, str]:
    """Types of the arguments that the linear_logp kernels share."""
    floats = "offset partial z_y slope_y rest logp entropy sum_p2 mean_logit maximum"
    types = dict.fromkeys(floats.split(), "*fp32") | dict.fromkeys(
        ("gain", "bias_gain", "cap", "logit_scale", "softcap"), "fp32"
    )
    return types | {"target": "*i64", "is_top1": "*i8"}


def cases(arch: int, *, quick: bool = False) -> list[Case]:
    return [
        *gemm_cases(arch, quick=quick),
        *epilogue_cases(quick=quick),
        *row_cases(),
        *preference_cases(arch, quick=quick),
    ]


def compile_case(case: Case, arch: int) -> Result:
    """Compile for sm_`arch` and read the machine code; `error` holds the compiler's last word if it fails."""
    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32") for name in names}
    # What is divisible by 16 wherever these configurations are picked: pointers, and an aligned matrix's strides.
    even = ["tile_stride", "out_stride", "product_stride", "weight_stride", "hidden_stride", "width"]
    divisible = [n for n in names if signature[n].startswith("*") or (n in even and signature[n] == "i32")]
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
    limit = configs.SHARED_LIMIT[arch]
    if result.shared > limit:
        found.append(f"shared memory {result.shared} B is over the {limit} B of sm_{arch}")
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", choices=configs.ARCHITECTURES, help="default: all")
    parser.add_argument("--quick", action="store_true", help="one epilogue a configuration, two loss kinds")
    chosen = parser.parse_args(arguments)
    if type(linear_logp.exp2_gemm_kernel).__name__ == "InterpretedFunction":
        print("TRITON_INTERPRET is set: the kernels were decorated for the interpreter and cannot be compiled")
        return 2
    failures, count, start = [], 0, time.perf_counter()
    for arch in chosen.arch or configs.ARCHITECTURES:
        print(f"sm_{arch}, Triton {triton.__version__}, shared memory limit {configs.SHARED_LIMIT[arch]} B", flush=True)
        for case in cases(arch, quick=chosen.quick):
            result = compile_case(case, arch)
            print(line(case, result), flush=True)
            found = faults(case, result, arch)
            for fault in found:
                print(f"    FAULT {fault}", flush=True)
            failures += [f"sm_{arch} {case.name}"] if found else []
            count += 1
    print(f"{count} kernels, {len(failures)} at fault, {time.perf_counter() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
