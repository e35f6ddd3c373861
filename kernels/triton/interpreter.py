"""Triton's interpreter (TRITON_INTERPRET=1) with every NumPy that Triton can be installed beside."""

from __future__ import annotations

import triton


def accept_numpy() -> None:
    """`range(0, width, BLOCK)` asks a kernel's argument `width` for its `__index__`. Triton 3.6 answers with `int()` of
    an array of shape [1], which NumPy 2.5 refuses."""
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None:
        return

    def patched(tensor, *scope):
        patch(tensor, *scope)  # a scope (3.6 and later) puts back what was there before it
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


if triton.knobs.runtime.interpret:
    accept_numpy()
