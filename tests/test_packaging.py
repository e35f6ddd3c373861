"""What is declared is what is used, and what is built is what a user needs: metadata, wheels, the CUDA decision."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Import name -> distribution, where they differ; and what a declared distribution brings along by its own contract.
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "skimage": "scikit-image", "flash_attn": "flash-attn"}
DISTRIBUTION |= {
    "liger_kernel": "liger-kernel",
    "yaml": "omegaconf",
    "markupsafe": "jinja2",
    "tokenizers": "transformers",
}
DISTRIBUTION |= {"triton": "torch", "huggingface_hub": "transformers", "accelerate": "trl"}
# Hosts that bring mmrlhf in, not the other way round, and trackers a run may name: imported only when asked for.
GUESTS = {"wandb", "tensorboard", "llamafactory", "swift", "lmms_eval", "deepspeed", "openai", "torchvision"}


def names(requirements: list[str]) -> set[str]:
    import re

    return {re.split(r"[\s<>=!~\[;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def third_party_imports(folder: str) -> dict[str, str]:
    """Top-level import name -> one file that imports it."""
    found: dict[str, str] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in ("mmrlhf", "kernels"):
                    found.setdefault(top, str(path.relative_to(ROOT)))
    return found


def test_version_is_said_once_and_the_same():
    import mmrlhf

    assert PROJECT["project"]["version"] == mmrlhf.__version__


def test_every_import_of_the_package_is_declared():
    declared = names(PROJECT["project"]["dependencies"])
    for requirements in PROJECT["project"]["optional-dependencies"].values():
        declared |= names(requirements)
    used = third_party_imports("mmrlhf") | third_party_imports("kernels")
    undeclared = {
        top: path
        for top, path in used.items()
        if DISTRIBUTION.get(top, top).lower() not in declared and top not in GUESTS
    }
    assert undeclared == {}


def test_extras_hold_what_the_readme_promises():
    assert set(PROJECT["project"]["optional-dependencies"]) == {
        "trl",
        "liger",
        "flash",
        "eval",
        "report",
        "video",
        "test",
        "bench",
        "dev",
    }


def test_entry_point():
    assert PROJECT["project"]["scripts"] == {"mmrlhf": "mmrlhf.cli:main"}
    from mmrlhf.cli import main

    assert callable(main)


def test_stub_and_extension_agree():
    """mmrlhf/_C.pyi names what the extension has; the CUDA ops only where they were built."""
    extension = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
    tree = ast.parse((ROOT / "mmrlhf/_C.pyi").read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    built = {name for name in dir(extension) if not name.startswith("_")}
    assert built == {name for name in functions if extension.build_info()["cuda"] or not name.endswith("_cuda")}
    (info,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    fields = {node.target.id for node in info.body if isinstance(node, ast.AnnAssign)}
    assert set(extension.build_info()) == fields
    assert extension.build_info()["version"] == PROJECT["project"]["version"], "rebuild: pip install -e ."
    for name in built:
        arguments = functions[name].args
        wanted = [a.arg for a in arguments.args + arguments.kwonlyargs]
        signature = getattr(extension, name).__doc__.splitlines()[0]
        assert [signature.index(f"{argument}: ") for argument in wanted] == sorted(
            signature.index(f"{argument}: ") for argument in wanted
        )


def test_make_help_names_the_two_commands():
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    printed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make demo" in printed
    assert "make test" in printed


def test_too_old_a_python_is_named(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.8.1;; *) exit 1;; esac\n")
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "-s", "demo", f"PYTHON={old}", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"mmrlhf needs Python 3.10 or newer, but '{old}' is Python 3.8.1" in result.stderr


def build_tool(name: str, *modules: str) -> None:
    import importlib.util

    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"{name} needs {', '.join(absent)}: pip install 'mmrlhf[test]'")


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> Path:
    """MMRLHF_NO_EXT=1 pip wheel, without a compiler or the network."""
    build_tool("building a wheel", "scikit_build_core", "nanobind")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    environment = {**os.environ, "MMRLHF_NO_EXT": "1", "CXX": "/bin/false", "CC": "/bin/false"}
    result = subprocess.run([*command, str(ROOT)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_pure_wheel_holds_the_package_and_nothing_else(pure_wheel):
    assert pure_wheel.name == f"mmrlhf-{PROJECT['project']['version']}-py3-none-any.whl"
    with zipfile.ZipFile(pure_wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        "/".join(("mmrlhf", *path.relative_to(ROOT).parts[folder == "mmrlhf" :]))
        for folder in ("mmrlhf", "kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {"mmrlhf/__init__.py", "mmrlhf/_C.pyi", "mmrlhf/kernels/cuda/formulas.cuh"} <= held
    assert "mmrlhf/kernels/__init__.py" not in held


@pytest.mark.slow
def test_pure_wheel_works(pure_wheel, tmp_path):
    """Installed by unpacking, used outside the checkout: same ops, no extension."""
    with zipfile.ZipFile(pure_wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        "import mmrlhf, torch\n"
        f"assert mmrlhf.__file__.startswith({str(tmp_path)!r}), mmrlhf.__file__\n"
        "logp = mmrlhf.linear_logp(torch.zeros(3, 4), torch.zeros(7, 4), torch.arange(3))\n"
        "assert torch.allclose(logp, -torch.tensor(7.0).log().expand(3))\n"
        "try: import mmrlhf._C\n"
        "except ImportError: pass\n"
        "else: raise AssertionError('a pure wheel has an extension')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "succeeds", "said"),
    [
        ("AUTO", True, "CUDA ops OFF: no working nvcc found. CPU only"),
        ("ON", False, "MMRLHF_CUDA=ON, but no working nvcc found"),
        ("OFF", True, "CUDA ops OFF: MMRLHF_CUDA=OFF"),
        ("MAYBE", False, "MMRLHF_CUDA must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_broken_nvcc(tmp_path, asked, succeeds, said):
    """With an nvcc that does not work: AUTO goes on without it and says so, ON stops."""
    build_tool("configuring", "nanobind", "cmake")
    import cmake
    import nanobind

    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", ROOT, "-B", tmp_path, f"-DMMRLHF_CUDA={asked}"]
    command += [f"-Dnanobind_ROOT={nanobind.cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DSKBUILD_PROJECT_VERSION=0.0.0", "-DSKBUILD_PROJECT_VERSION_FULL=0.0.0"]
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\necho this nvcc is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    environment = {**os.environ, "CUDACXX": str(broken)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    printed = " ".join((result.stdout + result.stderr).split())
    assert said in printed
    assert (result.returncode == 0) == succeeds, printed
