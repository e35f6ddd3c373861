"""What this machine and this installation can do, as text: versions, devices, the extension, the backends and why not.

Every line is looked up, none is guessed; a part that cannot be asked says what it answered. Starts no CUDA work beyond
asking for the devices' names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Callable
from importlib import metadata

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "safetensors",
    "tokenizers",
    "triton",
    "omegaconf",
    "pyarrow",
    "pillow",
    "flash-attn",
    "trl",
    "liger-kernel",
    "matplotlib",
    "av",
    "tensorboard",
    "wandb",
)


def describe() -> str:
    """The whole report; never raises for a part that is missing or broken."""
    parts: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("machine", _machine),
        ("packages", _packages),
        ("torchvision", _torchvision),
        ("extension", _extension),
        ("backends", _backends),
    )
    lines: list[str] = []
    for title, look in parts:
        try:
            found = look()
        except Exception as error:  # a broken part is what this command is there to show
            found = [f"cannot be asked: {type(error).__name__}: {error}"]
        lines += [title, *(f"  {line}" for line in found), ""]
    return "\n".join(lines).rstrip()


def _machine() -> list[str]:
    import torch

    lines = [
        f"python {platform.python_version()} on {platform.platform()}",
        f"cpu: {_cpu_name()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
    ]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return [*lines, f"gpu: none ({built})"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        lines.append(
            f"gpu {index}: {about.name}, {about.total_memory / 2**30:.0f} GiB, compute capability {capability}"
        )
    return lines


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        return platform.machine()
    return platform.processor() or platform.machine()


def _packages() -> list[str]:
    from mmrlhf import __version__

    lines = [f"mmrlhf {__version__} in {os.path.dirname(os.path.abspath(__file__))}"]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
    return lines


def _torchvision() -> list[str]:
    from mmrlhf.models.processors import has_torchvision

    try:
        found = has_torchvision()
    except RuntimeError as error:
        return [f"broken: {error}"]
    if not found:
        return ["not installed: pictures go through PIL, videos as lists of frames"]
    return [f"{metadata.version('torchvision')}, works"]


def _extension() -> list[str]:
    if importlib.util.find_spec("mmrlhf._C") is None:
        return [
            "mmrlhf._C is not built: the ops run on PyTorch or Triton (pip install . with a C++ compiler builds it)"
        ]
    about = importlib.import_module("mmrlhf._C").build_info()
    return [f"{name}: {', '.join(value) if isinstance(value, list) else value}" for name, value in about.items()]


def _backends() -> list[str]:
    import torch

    from mmrlhf.ops import backend

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    lines = []
    for device in devices:
        tensor = torch.empty(1, 1, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        for op in backend.HEAD_OPS:
            chosen = backend.choose(op, tensor)
            lines.append(f"{op} on {device}: {chosen.name} ({chosen.reason})")
            for name in backend.KNOWN:
                if name != chosen.name:
                    lines.append(f"  {name}: {_why_not(op, tensor, name)}")
    return lines


def _why_not(op: str, tensor: object, name: str) -> str:
    from mmrlhf.ops import backend

    try:
        backend.choose(op, tensor, requested=name)  # type: ignore[arg-type]
    except RuntimeError as error:
        return str(error).replace(f"backend {name!r} was asked for (backend=), but ", "")
    return "available"
