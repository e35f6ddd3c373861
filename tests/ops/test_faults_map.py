"""Every named kernel fault has a test: the names, what is expected, and where the tests are.

A test belongs to a fault if its name has the fault's number (`test_k07_...`, `test_k18_k19_...`), or, for a file that
is about one fault as a whole, if the module's docstring names it (`K20`). The table is read against the sources, so a
test that is renamed or removed shows here.
"""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FAULTS = {
    "k01": "wrong dtype: TypeError that names the argument and the allowed dtypes",
    "k02": "shapes that disagree: ValueError with both shapes",
    "k03": "tensors on two devices: ValueError that names them",
    "k04": "strided, sliced, expanded or transposed input: bitwise the contiguous result",
    "k05": "a label out of range: an error where values may be looked at, never a read out of bounds",
    "k06": "a response whose tokens are all ignored: score 0, no gradient, the others untouched",
    "k07": "no rows, one row, V = 1, prime sizes, odd width",
    "k08": "one non-finite row: only that row's results are non-finite",
    "k09": "logits of 1e4, log-ratios of 1e3: finite, within twice PyTorch's error",
    "k10": "chosen equal to rejected: log 2, and opposite gradients",
    "k11": "bad hyper-parameters: ValueError at once, which lists what is valid",
    "k12": "offsets above 2^31: the right memory",
    "k13": "torch.empty full of NaN: none of it in a result",
    "k14": "a side stream, with tensors freed right after the call",
    "k15": "tensors on cuda:1 while cuda:0 is current",
    "k16": "gradients of any subset of the inputs: exactly those",
    "k17": "upstream gradients other than 1, and accumulation over micro-batches",
    "k18": "double backward: RuntimeError, not zeros",
    "k19": "backward twice: the same gradients, no input written to",
    "k20": "autocast, inference mode, no_grad, torch.compile, opcheck, meta and fake tensors",
    "k21": "the same call twice: bitwise equal",
    "k22": "a backend that cannot run: RuntimeError with the reason; the automatic choice falls back and logs once",
    "k23": "a device older than the kernels: said before a launch",
    "k24": "an allocation that fails: the error comes through, nothing is half written",
    "k25": "a cap, scale, bias, adapter, quantised or tied head: handled or refused, never ignored",
}
ON_A_GPU_ONLY = {"k14", "k15"}  # skipped elsewhere, but collected


@functools.cache
def by_fault() -> dict[str, dict[str, bool]]:
    """The tests of each fault, and whether each runs without a GPU."""
    found: dict[str, dict[str, bool]] = {name: {} for name in FAULTS}
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        if path == Path(__file__).resolve() or not re.search(r"_k\d\d|\bK\d\d", text):
            continue
        tree = ast.parse(text)
        of_file = {name.lower() for name in re.findall(r"\bK\d\d\b", ast.get_docstring(tree) or "")}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = set(re.findall(r"(?<=_)k\d\d(?=_|$)", node.name))
                anywhere = not any("gpu" in ast.unparse(mark) for mark in node.decorator_list)
                for name in (own or of_file) & set(found):
                    found[name][f"{path.relative_to(TESTS)}::{node.name}"] = anywhere
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_test(fault):
    tests = by_fault()[fault]
    assert tests, f"no test is named after {fault}: {FAULTS[fault]}"
    assert fault in ON_A_GPU_ONLY or any(tests.values()), f"{fault} is tested on a GPU alone: {list(tests)}"
