"""Triton's interpreter made cheaper. It pays for an operation on a block whatever the block's size, and for every call.

    with patched_once(): ...    Triton's language is patched for the interpreter once, not at every call
    with tiles("cut"): ...      launch configurations: a row of TILES

Neither changes what a kernel computes. Triton is imported inside: without it the tests that ask for it are skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest


class _Stays:
    """The scope that `_patch_lang` returns (Triton 3.6 and later), of a patch that is taken back elsewhere."""

    def restore(self) -> None:
        pass


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Triton replaces some 300 attributes of its language at every launch and at every call of a jitted function inside
    one (tl.zeros and tl.cdiv are such): about 60 times a fused loss, a third of its time. By what, depends on the
    module of the function alone."""
    from triton.runtime import interpreter

    patch: Any = interpreter._patch_lang
    scopes: dict[str, Any] = {}

    def once(function: Any) -> _Stays:
        if function.__module__ not in scopes:
            scopes[function.__module__] = patch(function)
        return _Stays()

    with pytest.MonkeyPatch.context() as change:
        change.setattr(interpreter, "_patch_lang", once)
        try:
            yield
        finally:
            for scope in reversed(scopes.values()):
                if scope is not None:  # before 3.6 Triton takes nothing back
                    scope.restore()


@dataclass(frozen=True)
class Tiles:
    """What the kernels take at a time, where `kernels.triton.configs` has what suits a GPU."""

    rows: int
    columns: int
    width: int
    partial: int  # partial sums of a row
    preference: tuple[int, int, int]  # responses, tokens of a response, pairs
    workspace: int | None = None  # bytes: more makes several chunks of rows and blocks of columns
    gemm: bool = False  # E by the fused GEMM; else, as `pick` has it for float32, by the epilogue


_WHOLE = {"rows": 32, "columns": 256, "width": 64, "partial": 16, "preference": (8, 16, 8)}
_CUT = {"rows": 16, "columns": 64, "width": 32, "partial": 2, "preference": (4, 8, 4), "workspace": 16 * 80 * 4}
# `whole`: a problem of at most those sizes is one program a kernel. `cut`: of the same size it is several of each.
TILES = {
    "whole": Tiles(**_WHOLE),
    "whole, gemm": Tiles(**_WHOLE, gemm=True),
    "cut": Tiles(**_CUT),
    "cut, gemm": Tiles(**_CUT, gemm=True),
}


@contextlib.contextmanager
def tiles(name: str) -> Iterator[None]:
    """The triton backend with the tiles of that name."""
    from mmrlhf.kernels.triton import configs
    from mmrlhf.ops import _gemm, _triton

    size = TILES[name]
    epilogue = configs.EpilogueConfig(4, 1, size.rows, size.columns)
    gemm = configs.GemmConfig(4, 1, size.rows, size.columns, size.width, group_m=1)
    wanted = {
        "EPILOGUE": epilogue,
        "EPILOGUE_NARROW": epilogue,
        "TARGET_LOGIT": configs.RowConfig(4, 1, size.rows, size.width),
        "UNIT_GRADIENT": configs.RowConfig(4, 1, size.rows, size.width),
        "FINISH": configs.RowConfig(4, 1, size.rows, size.partial),
        "SELECT": configs.RowConfig(4, 1, size.rows),
        "REDO_FLOAT": gemm,
        "PREFERENCE": configs.PreferenceConfig(4, 1, *size.preference),
    }
    with pytest.MonkeyPatch.context() as change:
        for key, value in wanted.items():
            change.setattr(configs, key, value)
        if size.gemm:
            change.setattr(configs, "pick", lambda problem: gemm)
        if size.workspace is not None:
            change.setattr(_gemm, "WORKSPACE_BYTES", size.workspace)
            change.setattr(_triton, "ROW_STEP", size.rows)
        yield
