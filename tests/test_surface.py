"""The public surface is frozen: names, commands and settings. Adding or removing one is a decision, written down by
`python tests/test_surface.py > tests/surface.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FROZEN = Path(__file__).with_name("surface.json")
MODULES = ("mmrlhf", "mmrlhf.ops", "mmrlhf.losses")


def public(module: str) -> list[str]:
    """What a module offers: `__all__`, or the names without underscore that it defines."""
    home = importlib.import_module(module)
    if hasattr(home, "__all__"):
        return sorted(home.__all__)
    return sorted(n for n, v in vars(home).items() if n[0] != "_" and getattr(v, "__module__", None) == module)


def commands(parser: argparse.ArgumentParser, prefix: str = "mmrlhf") -> dict[str, list[str]]:
    """Each command and the words it takes: `mmrlhf data check` -> ["path", "--format", ...]."""
    found: dict[str, list[str]] = {}
    words: list[str] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= commands(sub, f"{prefix} {name}")
        elif not isinstance(action, argparse._HelpAction):
            words.append(action.option_strings[-1] if action.option_strings else action.dest)
    if words or not found:
        found[prefix] = sorted(words)
    return dict(sorted(found.items()))


def fields(kind: Any, prefix: str = "") -> dict[str, str]:
    """Each setting by its dotted name, with its default."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(field.default_factory):
            found |= fields(field.default_factory, f"{name}.")
        else:
            found[name] = repr(field.default)
    return found


def surface() -> dict[str, Any]:
    from mmrlhf.cli import build_parser
    from mmrlhf.config import RECIPES, TrainConfig
    from mmrlhf.data.readers import FORMATS

    return {
        "names": {module: public(module) for module in MODULES},
        "commands": commands(build_parser()),
        "settings": fields(TrainConfig),
        "recipes": sorted(RECIPES),
        "formats": sorted(FORMATS),
    }


@pytest.mark.parametrize("part", ["names", "commands", "settings", "recipes", "formats"])
def test_surface_is_as_decided(part):
    assert surface()[part] == json.loads(FROZEN.read_text())[part], __doc__


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    home = importlib.import_module(module)
    offered = {name: getattr(home, name) for name in public(module)}
    bare = [name for name, value in offered.items() if callable(value) and not (value.__doc__ or "").strip()]
    assert bare == []


if __name__ == "__main__":
    print(json.dumps(surface(), indent=2))
