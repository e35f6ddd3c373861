"""What a results file says about its machine: device, driver, clocks, versions, commit, and what can be imported.

    python -m benchmarks.gpu_facts [--write FILE]

Exit status 2 where there is no CUDA device. Without git (a copied tree) the commit is what the environment variable
COMMIT says; the hash over the sources is there either way. Imports torch; nothing of mmrlhf, which may not be built.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "triton", "numpy")
# Module, distribution, and what is left out without it.
OPTIONAL = (
    ("nanobind_backend", "nanobind-backend", "the extension is linked with nanobind instead of sharing its backend"),
    ("nanobind", "nanobind", "no extension: the CUDA C++ op is not built"),
    ("scikit_build_core", "scikit-build-core", "no build"),
    ("cutlass_library", "nvidia-cutlass", "the extension is built without its GEMM for Hopper"),
    ("omegaconf", "omegaconf", "tests that read a recipe"),
    ("transformers", "transformers", "tests of models, the whole step"),
    ("peft", "peft", "the whole step with LoRA"),
    ("pytest", "pytest", "all tests"),
    ("hypothesis", "hypothesis", "property-based tests"),
    ("pyarrow", "pyarrow", "tests that read parquet"),
    ("datasets", "datasets", "TRL's trainer in the whole step"),
    ("trl", "trl", "TRL as a peer"),
    ("liger_kernel", "liger-kernel", "Liger as a peer"),
    ("cut_cross_entropy", "cut-cross-entropy", "cut-cross-entropy as a peer"),
    ("flash_attn", "flash-attn", "flash-attn's varlen function: torch's own is used"),
)
SMI = (
    "name,uuid,driver_version,vbios_version,memory.total,memory.used,clocks.sm,clocks.max.sm,clocks.mem,"
    "power.draw,power.limit,temperature.gpu,pstate,mig.mode.current,clocks_event_reasons.active"
)
SOURCES = ("mmrlhf", "kernels", "csrc", "benchmarks", "CMakeLists.txt", "pyproject.toml")


def said_by(*command: str) -> str | None:
    """What a program printed; None where it is not there or failed."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> dict[str, Any]:
    """The commit, whether the tree differs from it, and a hash over the sources."""
    head = said_by("git", "rev-parse", "HEAD") or os.environ.get("COMMIT")
    changed = said_by("git", "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "changed": None if changed is None else bool(changed), "sources": sources_hash()}


def sources_hash() -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        base = ROOT / name
        files = sorted(base.rglob("*")) if base.is_dir() else [base]
        for path in files:
            kept = path.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".sh", ".txt", ".toml")
            if kept and path.is_file() and "results" not in path.parts:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def smi() -> dict[str, str] | None:
    """nvidia-smi's row of the first device; the fields that this version knows."""
    row = said_by("nvidia-smi", "--id=0", f"--query-gpu={SMI}", "--format=csv,noheader")
    if row is None:  # an older driver rejects the whole query for one unknown field
        fields = SMI.split(",")[:6]
        row = said_by("nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
        return None if row is None else dict(zip(fields, row.split(", "), strict=False))
    return dict(zip(SMI.split(","), row.split(", "), strict=False))


def device() -> dict[str, Any] | None:
    """PyTorch's view of the current device; None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "devices": torch.cuda.device_count(),
    }


def versions() -> dict[str, str | None]:
    """Of everything named above; None: not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for module, distribution, _ in ((name, name, "") for name in NEEDED):
        found[distribution] = version(module, distribution)
    for module, distribution, _ in OPTIONAL:
        found[distribution] = version(module, distribution)
    return found


def version(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def tools() -> dict[str, str | None]:
    """The last line of each tool's own version text."""
    found = {name: said_by(name, "--version") for name in ("nvcc", "compute-sanitizer", "cmake", "ninja", "c++")}
    return {name: None if text is None else text.splitlines()[-1].strip() for name, text in found.items()}


def facts() -> dict[str, Any]:
    import torch

    have = versions()
    return {
        "device": device(),
        "nvidia_smi": smi(),
        "cuda": torch.version.cuda,
        "versions": have,
        "missing": {name: cost for _, name, cost in OPTIONAL if have[name] is None},
        "tools": tools(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        **commit(),
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_facts", description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="JSON file")
    chosen = parser.parse_args(words)
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        print(f"needed and not installed: {', '.join(absent)}")
        return 1
    found = facts()
    if chosen.write:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        chosen.write.write_text(json.dumps(found, indent=1) + "\n")
    for name, cost in found["missing"].items():
        print(f"not installed: {name} (without it: {cost})")
    if found["device"] is None:
        print("no CUDA device")
        return 2
    print(f"{found['device']['name']}, sm_{found['device']['capability']}, commit {found['commit']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
