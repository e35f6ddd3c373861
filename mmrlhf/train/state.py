"""What a checkpoint says besides tensors: random number generators as JSON, versions, and what changed since.

Covered: python, numpy's global generator, torch on the CPU and on the run's CUDA device. Not covered: generators that a
custom processor keeps for itself.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import platform
import random
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrlhf.config import TrainConfig
from mmrlhf.train.files import tensor_bytes

# These change no number that is trained: a run may go on with other values.
FREE_ON_RESUME = frozenset(
    {
        "resume",
        "resume_changed",
        "output",
        "save_every",
        "keep_last",
        "log_every",
        "samples",
        "sample_tokens",
        "reference_cache",
        "trackers",
        "report",
        "max_bad_steps",
        "model.self_check",
        "data.workers",
        "data.vision_cache",
        "data.vision_cache_bytes",
        "data.on_bad_row",
        "data.max_bad_rows",
    }
)
PACKAGES = ("mmrlhf", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "pillow", "triton")


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - processors and augmentations draw from the global generator
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Every generator that a run on `device` draws from, as plain JSON values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _encode(torch.get_rng_state()),
        # That device's alone: how many others the machine has is not the run's business.
        "cuda": [_encode(torch.cuda.get_rng_state(device))] if device.type == "cuda" else [],
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` gave; a device of another kind than its own stays as it is.

    Raises ValueError, with every generator as it was, for what `rng_state` cannot have given.
    """
    check_rng(state, device)
    python, numpy, cpu, cuda = _states(state, device)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, device)


def check_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError for a state that `restore_rng` could not put back whole; no generator of the run is touched."""
    try:
        python, numpy, cpu, cuda = _states(state, device)
        random.Random().setstate(python)
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(cpu)
        if cuda is not None and (told := cuda.numel()) != (own := torch.cuda.get_rng_state(device).numel()):
            raise ValueError(f"{told} bytes for a CUDA device whose state has {own}")
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"not a state of the random generators: {type(error).__name__}: {error}") from error


def _states(state: Mapping[str, Any], device: torch.device) -> tuple[Any, Any, Tensor, Tensor | None]:
    """Those of python, numpy, torch and (for a CUDA device) its own, as each takes them."""
    version, words, gauss = state["python"]
    name, keys, position, has_gauss, cached = state["numpy"]
    cuda = _decode(state["cuda"][0]) if state["cuda"] and device.type == "cuda" else None
    numpy = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    return (version, tuple(words), gauss), numpy, _decode(state["torch"]), cuda


def _encode(state: Tensor) -> str:
    return base64.b64encode(tensor_bytes(state)).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """Python's and the packages' versions; a package that is not there is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def flat_settings(settings: TrainConfig) -> dict[str, Any]:
    """The settings as {"optim.lr": 1e-6, …}, with tuples as lists (as JSON gives them back)."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = list(value) if isinstance(value, tuple) else value

    walk("", dataclasses.asdict(settings))
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "name: before -> now" for the settings that change what is trained."""
    names = sorted((set(before) | set(now)) - FREE_ON_RESUME)
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes: the same weights, the same 64 hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def text_fingerprint(*texts: str) -> str:
    """sha256 over strings, each with its length (so that no two lists run into one another)."""
    digest = hashlib.sha256()
    for text in texts:
        raw = text.encode()
        digest.update(f"{len(raw)}:".encode())
        digest.update(raw)
    return digest.hexdigest()
