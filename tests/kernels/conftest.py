"""Fixtures of the kernels' tests."""

from __future__ import annotations

import sys

import pytest

from triton_interpreter import patched_once


@pytest.fixture(scope="module", autouse=True)
def interpreter_patched_once():
    """A third of the interpreted tests' time. Not where Triton compiles, or has not been imported; and a module at a
    time, so that no test elsewhere finds Triton's language patched."""
    if "triton.runtime.interpreter" not in sys.modules:
        yield
        return
    with patched_once():
        yield
