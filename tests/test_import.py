"""Importing has no side effect, costs little, and works where a GPU, Triton or the extension is missing."""

from __future__ import annotations

import json
import pkgutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules that may be imported without having paid for a model library.
LIGHT = ("mmrlhf.batch", "mmrlhf.config", "mmrlhf.cli", "mmrlhf.data.schema", "mmrlhf.losses", "mmrlhf.ops")
HEAVY = ("transformers", "datasets", "pyarrow", "matplotlib", "peft", "trl", "omegaconf", "PIL", "triton")


def every_module() -> list[str]:
    """Names of all modules of the package, kernels/ under its installed name."""
    names = [
        module.name
        for folder, prefix in (("mmrlhf", "mmrlhf."), ("kernels", "mmrlhf.kernels."))
        for module in pkgutil.walk_packages([str(ROOT / folder)], prefix)
        if not module.name.endswith("__main__")
    ]
    # walk_packages imports packages to walk into them only where it can find them by name; kernels/triton it cannot.
    names += [f"mmrlhf.kernels.triton.{path.stem}" for path in sorted((ROOT / "kernels/triton").glob("[!_]*.py"))]
    return sorted(set(names) - {"mmrlhf._C"})


WITHOUT = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"

SNAPSHOT = """
import builtins, json, logging, os, signal, sys, threading, warnings
import torch, PIL.Image, PIL.ImageFile, PIL.PngImagePlugin

def state():
    return {
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "default dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32],
        "torch seed": torch.initial_seed(),
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "truncated": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
        "png text": [PIL.PngImagePlugin.MAX_TEXT_CHUNK, PIL.PngImagePlugin.MAX_TEXT_MEMORY],
        "handlers": [repr(signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)],
        "root logger": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "our logger": [logging.getLogger("mmrlhf").level, len(logging.getLogger("mmrlhf").handlers)],
        "excepthook": repr(sys.excepthook),
        "running": sorted(t.name for t in threading.enumerate()),
    }

"""


def test_import_mmrlhf_loads_nothing_else(subprocess_python):
    printed = subprocess_python(
        "import json, sys\nbefore = set(sys.modules)\nimport mmrlhf\n"
        "print(json.dumps([name for name in set(sys.modules) - before if name.split('.')[0] != 'mmrlhf']))\n"
    )
    new = {name.split(".")[0] for name in json.loads(printed)} - set(sys.stdlib_module_names)
    assert new == set()


def test_light_modules_leave_heavy_ones_alone(subprocess_python):
    """torch itself loads some of these in some builds; what counts is what we add to it."""
    printed = subprocess_python(
        "import importlib, json, sys, torch\nbefore = set(sys.modules)\nadded = {}\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        f"    added[name] = [heavy for heavy in {HEAVY!r} if heavy in set(sys.modules) - before]\n"
        "print(json.dumps(added))"
    )
    assert json.loads(printed) == {name: [] for name in LIGHT}


def test_no_module_has_a_side_effect(subprocess_python):
    """All modules in one interpreter. The libraries they need are imported first: their side effects are not ours."""
    modules = every_module()
    assert {"mmrlhf.batch", "mmrlhf.ops.linear_logp", "mmrlhf.train.loop"} <= set(modules)
    code = (
        SNAPSHOT
        + "import importlib, importlib.util\n"
        + f"for name in {HEAVY!r}:\n"
        + "    if importlib.util.find_spec(name): importlib.import_module(name)\n"
        + "before = state()\n"
        + f"missing = []\nfor name in {modules!r}:\n"
        + "    try: importlib.import_module(name)\n"
        + "    except ModuleNotFoundError as error:\n"
        + "        assert error.name.split('.')[0] in ('triton',), (name, error)\n"
        + "after = state()\n"
        + "assert not torch.cuda.is_initialized(), 'a CUDA context was made'\n"
        + "print(json.dumps({key: [before[key], after[key]] for key in before if before[key] != after[key]}))\n"
    )
    printed = subprocess_python(code)
    assert printed.strip() == "{}", f"importing changed, or printed: {printed}"


@pytest.mark.parametrize("missing", [["mmrlhf._C"], ["triton"], ["mmrlhf._C", "triton", "peft", "matplotlib", "av"]])
def test_ops_work_without(subprocess_python, missing):
    """No extension, no Triton, no optional library: the ops still run and still agree with float64."""
    subprocess_python(
        WITHOUT.format(names=missing)
        + "import torch, mmrlhf\n"
        + "hidden = torch.randn(5, 8, requires_grad=True); weight = torch.randn(19, 8); targets = torch.arange(5)\n"
        + "logp = mmrlhf.linear_logp(hidden, weight, targets)\n"
        + "logp.sum().backward()\n"
        + "truth = torch.log_softmax(hidden.detach().double() @ weight.double().T, -1)[torch.arange(5), targets]\n"
        + "assert torch.allclose(logp.double(), truth, atol=1e-5)\n"
        + "assert hidden.grad.isfinite().all()\n"
    )


def test_public_names_are_lazy_and_real(subprocess_python):
    subprocess_python(
        "import sys, mmrlhf\n"
        "assert 'torch' not in sys.modules\n"
        "assert dir(mmrlhf) == sorted(mmrlhf.__all__)\n"
        "for name in mmrlhf.__all__: assert getattr(mmrlhf, name) is not None, name\n"
        "import mmrlhf.ops\n"
        "assert mmrlhf.linear_logp is mmrlhf.ops.linear_logp and callable(mmrlhf.linear_logp)\n"
    )


def test_unknown_name():
    import mmrlhf

    with pytest.raises(AttributeError, match="module 'mmrlhf' has no attribute 'linear_logits'"):
        mmrlhf.linear_logits  # noqa: B018


def test_hugging_face_kernels_is_not_shadowed(subprocess_python, tmp_path):
    """transformers does `from kernels import ...` where that package is installed. Our folder kernels/ lies in the
    repository's root, which is on sys.path for `python -m pytest`; without an __init__.py at its top, any regular
    package of the name wins (fault T22)."""
    package = tmp_path / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "__version__ = '99.0'\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
    )
    info = tmp_path / "site" / "kernels-99.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n")
    printed = subprocess_python(
        "import os, sys\n"
        "assert os.path.isdir('kernels') and sys.path[0] in ('', os.getcwd())\n"
        "import kernels\n"
        "import transformers.integrations.hub_kernels\n"
        "from transformers import AutoModelForImageTextToText\n"
        "print(kernels.__file__)\n",
        env={"PYTHONPATH": str(package.parent)},
    )
    assert Path(printed.strip()) == package / "__init__.py"


def test_kernels_has_no_init_at_its_top():
    assert not (ROOT / "kernels" / "__init__.py").exists()
