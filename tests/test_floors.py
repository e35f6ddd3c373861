"""The floors of the package: an import never goes up, nor sideways between rooms of one floor. And files and
functions stay short."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A room is a module or a folder of mmrlhf/; kernels/ is mapped to mmrlhf/kernels.
FLOORS = (
    ("batch", "config", "kernels", "_C"),
    ("data",),
    ("models", "ops"),
    ("train", "losses"),
    ("report", "integrations", "reward", "evaluation"),
    ("demo", "doctor"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PART_OF = {"_report": "report", "_cli": "cli"}  # folders that a module of another name keeps its parts in
MAX_LINES = 420
MAX_FUNCTION = 75  # lines, in host code; a Triton kernel is one function by nature

SOURCES = sorted(
    path
    for folder in ("mmrlhf", "kernels", "benchmarks", "csrc", "tests")
    for pattern in ("*.py", "*.cu", "*.cuh", "*.cpp", "*.h")
    for path in (ROOT / folder).rglob(pattern)
)


def room_of(module: str) -> str:
    """The room that `mmrlhf.x.y` belongs to; "" for the package itself."""
    parts = module.split(".")
    room = parts[1] if len(parts) > 1 else ""
    return PART_OF.get(room, room)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "mmrlhf")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names() -> dict[str, str]:
    """Where each lazy name of mmrlhf/__init__.py lives, read without importing."""
    tree = ast.parse((ROOT / "mmrlhf/__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "_HOME":
            return ast.literal_eval(node.value)
    raise AssertionError("mmrlhf/__init__.py has no _HOME")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import of mmrlhf in a file, also inside functions and by importlib."""
    found = []
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    lazy = public_names()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from mmrlhf import train` names a room; `from mmrlhf import linear_logp` a lazy name of one.
            wanted = [lazy.get(alias.name, f"mmrlhf.{alias.name}") for alias in node.names if alias.name[0] != "_"]
            found += [(node.lineno, name) for name in wanted] if module == "mmrlhf" else [(node.lineno, module)]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found += [
                (node.lineno, a.value) for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
            ]
    return [(line, name) for line, name in found if name.split(".")[0] == "mmrlhf" and room_of(name)]


PACKAGE = sorted(path for folder in ("mmrlhf", "kernels") for path in (ROOT / folder).rglob("*.py"))


def test_every_room_has_a_floor():
    rooms = {room_of(module_name(path)) for path in PACKAGE} - {""}
    assert rooms <= set(FLOOR), f"give these a floor in DESIGN's order: {sorted(rooms - set(FLOOR))}"


@pytest.mark.parametrize("path", PACKAGE, ids=[str(path.relative_to(ROOT)) for path in PACKAGE])
def test_imports_go_down(path):
    room = room_of(module_name(path))
    if not room:
        return  # mmrlhf/__init__.py names the public API, lazily; it is no room
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if room_of(name) != room and FLOOR[room_of(name)] >= FLOOR[room]
    ]
    assert wrong == []


def test_the_checker_sees_every_form(tmp_path, monkeypatch):
    """Each way to write an import is seen; the test above would otherwise pass by blindness."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "mmrlhf/ops").mkdir(parents=True)
    (tmp_path / "mmrlhf/__init__.py").write_text('_HOME = {"linear_logp": "mmrlhf.ops"}\n')
    path = tmp_path / "mmrlhf/ops/x.py"
    path.write_text(
        "import mmrlhf.train.loop\nfrom mmrlhf import cli\nfrom mmrlhf import linear_logp\nfrom ..models import load\n"
        "def f():\n    from mmrlhf.data.schema import BadRow\n    import importlib\n"
        "    importlib.import_module('mmrlhf.report')\n"
    )
    assert [room_of(name) for _, name in sorted(imports(path))] == ["train", "cli", "ops", "models", "data", "report"]


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_a_file_is_readable_in_one_go(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines: split it by meaning"


def test_a_function_is_readable_in_one_go():
    long = [
        f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in (ROOT / "mmrlhf").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert long == []
