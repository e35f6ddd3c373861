"""What the CUDA bindings do around a launch, on a runtime that is emulated (emulate.h): the thread's device, errors of
the runtime, and the checks of arguments that only a device could have."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("mmrlhf._C", reason="the extension is not built")
pytestmark = pytest.mark.slow


@pytest.fixture
def runtime(emulated):
    yield emulated
    emulated.set_runtime()


def rowsum(emulated):
    """An op on device 0; the sums it wrote, which are 4 each."""
    sums = torch.full((2,), -1.0)
    emulated.exp2_rowsum_cuda(torch.zeros(2, 4), torch.zeros(2), sums, stream=0)
    return sums.tolist()


@pytest.mark.parametrize(("device", "sets"), [(0, 0), (1, 2)])
def test_the_device_is_set_where_it_is_another(runtime, device, sets):
    """Setting a device may create its context: the thread's own is not set again. Another is set, and restored."""
    runtime.set_runtime(device=device)
    assert rowsum(runtime) == [4.0, 4.0]
    assert runtime.runtime_state() == (device, sets, 0)


@pytest.mark.parametrize(("failing", "sets"), [({"get_fails": True}, 0), ({"sets_succeed": 0}, 1)], ids=["get", "set"])
def test_a_device_that_cannot_be_had(runtime, failing, sets):
    """Nothing is launched, nothing restored, and the error is not said again by the next launch that succeeds."""
    runtime.set_runtime(device=1, **failing)
    with pytest.raises(RuntimeError, match=f"cuda{'Set' if sets else 'Get'}Device: emulated error"):
        rowsum(runtime)
    assert runtime.runtime_state() == (1, sets, 0)


def test_a_device_that_cannot_be_restored(runtime):
    """The op was launched: that is what the caller asked for. No error waits for the next launch."""
    runtime.set_runtime(device=1, sets_succeed=1)
    assert rowsum(runtime) == [4.0, 4.0]
    assert runtime.runtime_state() == (0, 2, 0)
    assert rowsum(runtime) == [4.0, 4.0]


def gemm_arguments(rows=5, vocab=300, width=8):
    return {
        "hidden": torch.empty(rows, width, dtype=torch.bfloat16),
        "weight": torch.empty(vocab, width, dtype=torch.bfloat16),
        "out": None,
        "target": torch.empty(rows, dtype=torch.int64),
        "offset": torch.empty(rows),
        "partial": torch.empty(-(-vocab // 256), -(-rows // 64) * 64),
        "tile": "64x256",
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"hidden": torch.zeros(5, 8)}, TypeError, "hidden must be bfloat16, got float32"),
        ({"weight": torch.zeros(300, 16).bfloat16()}, ValueError, "weight must have shape [300, 8], got [300, 16]"),
        ({"out": torch.zeros(5, 8).bfloat16()}, ValueError, "out must have shape [5, 300], got [5, 8]"),
        ({"out": torch.zeros(5, 300).bfloat16()}, ValueError, "the row stride of out must be a multiple of 8"),
        (
            {"target": torch.zeros(4).long()},
            ValueError,
            "target must have shape [5], one value a row of hidden, got [4]",
        ),
        (
            {"offset": torch.zeros(5, 1)},
            ValueError,
            "offset must have shape [5], one value a row of hidden, got [5, 1]",
        ),
        ({"bias": torch.zeros(5)}, ValueError, "bias must have shape [300], one value a row of weight, got [5]"),
        ({"partial": torch.zeros(2, 5)}, ValueError, "partial must be contiguous [2, 64] for tile 64x256, got [2, 5]"),
        ({"partial": torch.zeros(2, 128)[:, :64]}, ValueError, "partial must be contiguous [2, 64]"),
        ({"tile": "1x1"}, ValueError, "tile must be one of auto, 128x256, 64x256, got '1x1'"),
    ],
)
def test_bad_arguments_of_the_hopper_gemm(emulated, changed, error, message):
    given = gemm_arguments() | changed
    with pytest.raises(error, match=re.escape(message)):
        emulated.exp2_gemm_sm90_(given.pop("hidden"), given.pop("weight"), given.pop("out"), **given, stream=0)


@pytest.mark.parametrize("rows", [1, 5])
def test_what_the_hopper_gemm_takes(emulated, rows):
    """It gets as far as the kernels, which are not in; one row's stride is made up, and need not be a multiple of 8."""
    given = gemm_arguments(rows)
    given["out"] = torch.empty(rows, 304, dtype=torch.bfloat16)[:, :300]
    if rows == 1:
        given["out"] = given["out"].clone()
    with pytest.raises(RuntimeError, match="made without CUTLASS's headers"):
        emulated.exp2_gemm_sm90_(given.pop("hidden"), given.pop("weight"), given.pop("out"), **given, stream=0)


def test_partial_sums_that_32_bits_do_not_count(emulated):
    """CUTLASS's reduction adds up offsets in int: from 2^31 partial sums on they would be written elsewhere."""
    given, rows = gemm_arguments(vocab=256 * 8192), 1 << 18
    given |= {name: given[name].new_empty(rows, *given[name].shape[1:]) for name in ("hidden", "target", "offset")}
    one = np.zeros(1, np.float32)  # 8 GiB that nobody reads
    given["partial"] = np.lib.stride_tricks.as_strided(one, (8192, rows), (4 * rows, 4))
    with pytest.raises(ValueError, match=r"partial \[8192, 262144\] has 2\^31 or more entries: give fewer rows"):
        emulated.exp2_gemm_sm90_(given.pop("hidden"), given.pop("weight"), given.pop("out"), **given, stream=0)


@pytest.mark.parametrize("logit_scale", [0.0625, 0.7, 1.0, 1.7, 13.7, -1.3])
def test_an_infinite_product_keeps_its_meaning(emulated, logit_scale):
    """A token whose logit is -inf has probability 0: both pieces of the gain have one sign, else inf - inf is NaN."""
    for acc in (float("inf"), float("-inf")):
        assert emulated.exponent(acc, logit_scale, 3.0) == acc * np.sign(logit_scale)


def test_statistics_that_would_overwrite_each_other(emulated):
    tile, target = torch.zeros(3, 2048), torch.zeros(3, dtype=torch.int64)
    for partial in (torch.zeros(5, 1, 3).expand(5, 2, 3), torch.zeros(1, 2, 3).expand(5, 2, 3)):
        with pytest.raises(
            ValueError, match=r"partial must have shape \[5, 2, 3\], its rows side by side and nothing twice"
        ):
            emulated.token_statistics_cuda(tile, target, torch.zeros(3), partial, start=0, stream=0)


def test_a_matrix_of_another_dtype(emulated):
    """The message says all that is allowed."""
    matrix, vector, target = torch.zeros(3, 4), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="hidden must be float32 or bfloat16, got float64"):
        emulated.target_logit_cuda(matrix.double(), matrix, target, vector, vector, stream=0)
    with pytest.raises(TypeError, match="partial must be float32, got bfloat16"):
        emulated.finish_cuda(matrix.bfloat16(), vector, vector, vector, vector, stream=0)
