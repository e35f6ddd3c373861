"""`_C.exp2_rowsum_`: in-place exponentials with a row offset, and row sums, on every instruction set of this CPU.

The truth is 2^(z log2(e) - k) in x87 extended precision where NumPy has it (64 bits of mantissa), else float64; both
are over 500 million times finer than the float32 results.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

_C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")

ROOT = Path(__file__).resolve().parents[2]
ISAS = _C.build_info()["isas"]
LOG2E = 1 / np.log(np.longdouble(2))


def exact(z: np.ndarray, k: np.ndarray) -> np.ndarray:
    return np.exp2(z.astype(np.longdouble) * LOG2E - k.astype(np.longdouble)[:, None])


def ulp_error(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """|got - truth| in units of the last place of truth, the denormals' place below 2^-126."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(truth, np.longdouble(1e-60)))), -126).astype(np.int64)
    return np.abs(got.astype(np.longdouble) - truth) / np.ldexp(np.longdouble(1), exponent - 23)


def run(z: np.ndarray, k: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    tile, sums = torch.from_numpy(z.copy()), torch.full((len(z),), float("nan"))
    _C.exp2_rowsum_(tile, torch.from_numpy(k), sums, **options)
    return tile.numpy(), sums.numpy()


def logits(rows: int, cols: int, *, spread: float = 10.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((rows, cols)) * spread).astype(np.float32)
    k = np.rint(z[:, :1].max(axis=1, initial=0.0) * 1.4427).astype(np.float32)
    return z, k


# Ranges: near the offset, where the probabilities that matter lie; the whole finite range of the result; logits so
# large that t = z log2(e) - k cannot be formed without losing bits of z.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("centre", "reach"), [(0.0, 1.0), (0.0, 80.0), (-20.0, 83.0), (1e4, 60.0), (-9e5, 60.0)])
def test_two_ulp(isa, centre, reach):
    rng = np.random.default_rng(1)
    z = (centre + rng.uniform(-reach, reach, (64, 4099))).astype(np.float32)
    k = np.full(64, np.rint(centre * 1.4426950408889634), np.float32)
    tile, _ = run(z, k, isa=isa)
    assert ulp_error(tile, exact(z, k)).max() <= 2.0


@pytest.mark.parametrize("isa", ISAS)
def test_denormal_results_are_kept(isa):
    z = np.linspace(-104.5, -87.0, 40_001, dtype=np.float32)[None]
    k = np.zeros(1, np.float32)
    tile, _ = run(z, k, isa=isa)
    truth = exact(z, k)
    assert ulp_error(tile, truth).max() <= 1.0
    assert (tile[(truth > 1e-45) & (truth < 1.1e-38)] > 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_special_values(isa):
    z = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 88.8, -120.0, 1e-40]] * 2, np.float32)
    tile, sums = run(z, np.zeros(2, np.float32), isa=isa)
    wanted = np.array([np.nan, np.inf, 0, 1, 1, np.inf, 0, np.inf, 0, 1], np.float32)
    np.testing.assert_array_equal(tile, np.stack([wanted, wanted]))
    assert np.isnan(sums).all()
    tile, _ = run(np.zeros((3, 20), np.float32), np.array([np.nan, np.inf, -np.inf], np.float32), isa=isa)
    assert np.isnan(tile[0]).all()
    assert (tile[1] == 0).all()
    assert np.isposinf(tile[2]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_one_bad_row_leaves_the_others_bitwise(isa):
    z, k = logits(5, 333)
    clean, clean_sums = run(z, k, isa=isa)
    z[2, 100] = np.nan
    tile, sums = run(z, k, isa=isa)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(tile[others], clean[others])
    np.testing.assert_array_equal(sums[others], clean_sums[others])
    assert np.isnan(sums[2])


# Widths around the vector lengths (8, 16, 32), around the block of 2048, a prime, and a real vocabulary.
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 2047, 2048, 2049, 4099, 32003])
def test_row_sums(isa, cols):
    z, k = logits(3, cols)
    tile, sums = run(z, k, isa=isa)
    truth = tile.astype(np.float64).sum(axis=1)
    np.testing.assert_allclose(sums, truth, rtol=4e-7, atol=0)
    assert cols == 0 or ulp_error(tile, exact(z, k)).max() <= 2.0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 17, 2049])
def test_target_is_left_out(isa, cols):
    """Targets in the first, the last and a middle column, and in none of this block (-1, cols, 2^40)."""
    z, k = logits(6, cols, seed=3)
    target = np.array([0, cols - 1, cols // 2, -1, cols, 2**40])
    plain, plain_sums = run(z, k, isa=isa)
    target_exp = torch.full((6,), -7.0)
    tile, sums = run(z, k, isa=isa, target_col=torch.from_numpy(target), target_exp=target_exp)
    assert ulp_error(tile, plain.astype(np.longdouble)).max() <= 1.0
    for row in range(3):
        assert target_exp[row] == tile[row, target[row]]
        others = np.delete(tile[row].astype(np.float64), target[row])
        np.testing.assert_allclose(sums[row], others.sum(), rtol=4e-7, atol=0)
    assert target_exp[3:].tolist() == [-7.0] * 3
    np.testing.assert_array_equal(sums[3:], plain_sums[3:])


@pytest.mark.parametrize("isa", ISAS)
def test_target_keeps_relative_precision(isa):
    """p_y = 1 - 1e-9 cannot be told from 1 in a sum that holds the target; -log1p(sum / target_exp) still can."""
    z = np.full((1, 1000), -27.6, np.float32)
    z[0, 5] = 0.0
    target_exp = torch.empty(1)
    _, sums = run(z, np.zeros(1, np.float32), isa=isa, target_col=torch.tensor([5]), target_exp=target_exp)
    truth = -np.log1p(999 * np.exp(np.float64(np.float32(-27.6))))
    np.testing.assert_allclose(-np.log1p(sums.astype(np.float64) / target_exp.numpy()), truth, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_accumulate_over_blocks_of_the_vocabulary(isa):
    z, k = logits(9, 6007)
    _, whole = run(z, k, isa=isa)
    sums = torch.empty(9)
    tile = torch.from_numpy(z)
    for start in range(0, 6007, 1000):
        block = tile[:, start : start + 1000]
        _C.exp2_rowsum_(block, torch.from_numpy(k), sums, accumulate=start > 0, isa=isa)
    np.testing.assert_allclose(sums.numpy(), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given", [False, True])
def test_block_of_a_head(isa, given):
    """Bitwise exp2_rowsum_ on a tile whose target is -inf, the value put in afterwards, and added to what was there."""
    z, k = logits(9, 131)
    target, rest = torch.tensor([-1, 99, 100, 101, 150, 229, 230, 231, 10**12]), torch.rand(9)
    value = torch.rand(9)
    plain, inside = z.copy(), [(row, int(t) - 100) for row, t in enumerate(target) if 100 <= t < 231]
    for row, column in inside:
        plain[row, column] = -np.inf
    tile, sums = run(plain, k, isa=isa)
    for row, column in inside:
        tile[row, column] = value[row] if given else 0
    block, total = torch.from_numpy(z), rest.clone()
    options = {"start": 100, "value": value if given else None, "isa": isa, "threads": 2}
    _C.exp2_rowsum_block_(block, torch.from_numpy(k), total, target, **options)
    np.testing.assert_array_equal(block.numpy(), tile)
    np.testing.assert_allclose(total.numpy(), rest.numpy() + sums, rtol=1e-6)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rest": torch.zeros(4)}, ValueError, "rest must have shape [3]"),
        ({"target": torch.zeros(3)}, TypeError, "target must be int64, got float32"),
        ({"value": torch.zeros(3, 1)}, ValueError, "value must have shape [3]"),
        ({"start": -1}, ValueError, "start must be at least 0, got -1"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ],
)
def test_bad_block_arguments(changed, error, message):
    given = {"rest": torch.zeros(3), "target": torch.zeros(3, dtype=torch.int64), "start": 0} | changed
    with pytest.raises(error, match=re.escape(message)):
        _C.exp2_rowsum_block_(torch.zeros(3, 8), torch.zeros(3), given.pop("rest"), given.pop("target"), **given)


@pytest.mark.parametrize("isa", ISAS)
def test_strided_tile_writes_nothing_else(isa):
    z, k = logits(7, 45)
    wide = torch.full((7, 64), 123.0)
    wide[:, 9:54] = torch.from_numpy(z)
    sums = torch.empty(7)
    _C.exp2_rowsum_(wide[:, 9:54], torch.from_numpy(k), sums, isa=isa)
    tile, plain_sums = run(z, k, isa=isa)
    np.testing.assert_array_equal(wide[:, 9:54].numpy(), tile)
    np.testing.assert_array_equal(sums.numpy(), plain_sums)
    assert (wide[:, :9] == 123.0).all()
    assert (wide[:, 54:] == 123.0).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 257])
def test_threads_change_nothing(rows):
    z, k = logits(rows, 2003)
    one, one_sums = run(z, k, threads=1)
    many, many_sums = run(z, k, threads=5)
    np.testing.assert_array_equal(one, many)
    np.testing.assert_array_equal(one_sums, many_sums)


def test_std_threads_where_no_openmp_runtime_is_loaded(subprocess_python):
    """NumPy alone brings no OpenMP runtime: the loop falls back to std::thread and gives the same result."""
    result = subprocess_python(
        "import numpy as np\n"
        "from mmrlhf import _C\n"
        "z = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)\n"
        "k, one, four = np.zeros(64, np.float32), np.empty(64, np.float32), np.empty(64, np.float32)\n"
        "a, b = z.copy(), z.copy()\n"
        "_C.exp2_rowsum_(a, k, one, threads=1)\n"
        "_C.exp2_rowsum_(b, k, four, threads=4)\n"
        "assert (a == b).all() and (one == four).all()\n"
        "print(_C.build_info()['threads'])\n"
    )
    assert result.strip() == "std::thread"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the shared runtime is looked up on Linux only")
def test_threads_are_those_of_torch():
    assert "libgomp" in _C.build_info()["threads"] or "libiomp5" in _C.build_info()["threads"]


def test_zero_rows():
    tile, sums = run(np.empty((0, 5), np.float32), np.empty(0, np.float32))
    assert tile.shape == (0, 5)
    assert sums.shape == (0,)


def arguments() -> dict:
    return {
        "tile": torch.zeros(3, 8),
        "offset": torch.zeros(3),
        "sums": torch.zeros(3),
        "target_col": torch.zeros(3, dtype=torch.int64),
        "target_exp": torch.zeros(3),
    }


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"tile": torch.zeros(3, 8).double()}, TypeError, "tile must be float32, got float64"),
        ({"tile": torch.zeros(3, 8).bfloat16()}, TypeError, "tile must be float32, got bfloat16"),
        ({"offset": torch.zeros(3).int()}, TypeError, "offset must be float32, got int32"),
        ({"target_col": torch.zeros(3)}, TypeError, "target_col must be int64, got float32"),
        ({"tile": torch.zeros(24)}, ValueError, "tile must be [rows, cols], got shape [24]"),
        (
            {"tile": torch.zeros(8, 3).T},
            ValueError,
            "tile must have contiguous columns (stride 1), got column stride 3",
        ),
        ({"tile": torch.zeros(1, 8).expand(3, 8)}, ValueError, "tile must have rows that do not overlap"),
        ({"offset": torch.zeros(4)}, ValueError, "offset must have shape [3], one value a row of tile, got [4]"),
        ({"sums": torch.zeros(3, 1)}, ValueError, "sums must have shape [3], one value a row of tile, got [3, 1]"),
        ({"sums": torch.zeros(6)[::2]}, ValueError, "sums must be contiguous, got stride 2"),
        ({"target_col": None}, ValueError, "target_exp needs target_col, which is None"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"isa": "sse9"}, ValueError, "isa must be one that this CPU has (auto, scalar"),
    ],
)
def test_bad_arguments(changed, error, message):
    given = arguments() | changed
    before = given["tile"].clone()
    with pytest.raises(error, match=re.escape(message)):
        _C.exp2_rowsum_(given.pop("tile"), given.pop("offset"), given.pop("sums"), **given)
    assert torch.equal(arguments()["tile"].to(before.dtype).reshape(-1), before.reshape(-1))


def test_not_an_array():
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.exp2_rowsum_([[1.0]], torch.zeros(1), torch.zeros(1))


def test_read_only_array_is_refused():
    tile = np.zeros((3, 8), np.float32)
    tile.flags.writeable = False
    with pytest.raises(TypeError):
        _C.exp2_rowsum_(tile, np.zeros(3, np.float32), np.zeros(3, np.float32))


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA")
def test_cuda_op_refuses_cpu_tensors():
    with pytest.raises(ValueError, match="tile must be on CUDA device"):
        _C.exp2_rowsum_cuda(torch.zeros(3, 8), torch.zeros(3), torch.zeros(3), stream=0)


@pytest.mark.gpu
@pytest.mark.skipif(not (_C.build_info()["cuda"] and torch.cuda.is_available()), reason="needs CUDA")
@pytest.mark.parametrize("cols", [1, 3, 255, 1024, 32003])
def test_cuda_matches_the_scalar_path_bitwise(cols):
    """The kernel and the scalar path compile the same formula; only the order of the sums differs."""
    z, k = logits(33, cols)
    target = np.random.default_rng(5).integers(-1, cols + 1, 33)
    target_exp = torch.zeros(33)
    tile, sums = run(z, k, isa="scalar", target_col=torch.from_numpy(target), target_exp=target_exp)
    device_tile = torch.from_numpy(z).cuda()
    device_sums, device_exp = torch.empty(33, device="cuda"), torch.zeros(33, device="cuda")
    _C.exp2_rowsum_cuda(
        device_tile,
        torch.from_numpy(k).cuda(),
        device_sums,
        target_col=torch.from_numpy(target).cuda(),
        target_exp=device_exp,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    assert torch.equal(device_tile.cpu(), torch.from_numpy(tile))
    assert torch.equal(device_exp.cpu(), target_exp)
    np.testing.assert_allclose(device_sums.cpu().numpy(), sums, rtol=1e-6, atol=0)


def test_the_header_holds_the_fitted_polynomial():
    """kernels/cuda/formulas.cuh against its derivation, csrc/cpu/fit_exp2.py."""
    spec = importlib.util.spec_from_file_location("fit_exp2", ROOT / "csrc/cpu/fit_exp2.py")
    fit_exp2 = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fit_exp2)
    header = (ROOT / "kernels/cuda/formulas.cuh").read_text()
    values = [float(value) for value in re.findall(r"kExp2C\d = ([\d.e-]+)f;", header)]
    assert len(values) == fit_exp2.DEGREE
    assert fit_exp2.relative_error([float(np.float32(value)) for value in values]) < 4.1e-9
