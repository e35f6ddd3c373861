"""The sm_90a GEMM as far as a machine without one goes: how a problem is cut, what is refused, the epilogue's
arithmetic against float64, the build's decision; and, on a device that has it, the kernel against float64.

The host half (kernels/cuda/exp2_gemm.cpp and its formula header) is compiled here by the host's C++ compiler alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

INT64 = ctypes.c_int64
VOCABS = (1, 255, 256, 257, 32001, 50257, 128256, 151646, 256000)


@pytest.fixture(scope="module")
def host(repository, tmp_path_factory):
    compiler = shutil.which("c++") or pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "exp2_gemm.so"
    sources = [repository / "tests/kernels/exp2_gemm_host.cpp", repository / "kernels/cuda/exp2_gemm.cpp"]
    command = [compiler, "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*command, *sources, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("name_of", "refusal", "message", "built"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def name(host, tile: int) -> str:
    return host.name_of(tile).decode()


def pick(host, rows: int, vocab: int, multiprocessors: int = 132) -> int:
    return host.pick(INT64(rows), INT64(vocab), multiprocessors)


def plan(host, rows: int, vocab: int, tile: int) -> dict[str, int]:
    out = (INT64 * 6)()
    host.plan(INT64(rows), INT64(vocab), tile, out)
    return dict(zip(("tiles", "padded_rows", "row_step", "swizzle", "rows", "columns"), out, strict=True))


# --- Which tile, and how the problem is cut -----------------------------------------------------------------------


def test_tiles_have_names(host):
    names = [name(host, tile) for tile in range(host.tile_count())]
    assert len(set(names)) == len(names) >= 2
    for tile, text in enumerate(names):
        assert host.tile_named(text.encode()) == tile
        cut = plan(host, 1, 1, tile)
        assert text == f"{cut['rows']}x{cut['columns']}"
    assert host.tile_named(b"128x12") == -1


@pytest.mark.parametrize(
    ("rows", "vocab", "multiprocessors", "wanted"),
    [
        (1, 151646, 132, "64x256"),  # a pair of 128-row tiles would be empty but for one row
        (128, 151646, 132, "64x256"),
        (129, 151646, 132, "128x256"),
        (256, 151646, 132, "128x256"),
        (300, 151646, 132, "64x256"),  # 3 tiles of 128 rows run as 4, 5 of 64 as 6
        (512, 151646, 132, "128x256"),
        (1700, 152064, 132, "128x256"),
        (16384, 32001, 132, "128x256"),
        (16384, 32001, 114, "128x256"),  # H100 PCIe
        (2048, 256, 132, "64x256"),  # fewer tiles than multiprocessors: one wave either way, and this one is shorter
    ],
)
def test_pick(host, rows, vocab, multiprocessors, wanted):
    assert name(host, pick(host, rows, vocab, multiprocessors)) == wanted


@pytest.mark.parametrize("vocab", VOCABS)
def test_plan_covers_the_problem(host, vocab):
    """Partial sums for every column, padded rows for every row, and no group that adds more than 1/32 of work."""
    for rows in (0, 1, 63, 64, 65, 127, 128, 129, 1100, 1699, 2048, 4096, 8191, 16384, 100003):
        for tile in range(host.tile_count()):
            cut = plan(host, rows, vocab, tile)
            assert cut["tiles"] == -(-vocab // cut["columns"])
            assert 0 <= cut["padded_rows"] - rows < cut["rows"]
            assert cut["padded_rows"] % cut["rows"] == 0
            assert cut["row_step"] == 2 * cut["rows"]
            assert cut["swizzle"] in (1, 2, 4, 8)
            pairs = -(-rows // cut["row_step"])
            group = cut["swizzle"]
            rounded = -(-pairs // group) * group * -(-cut["tiles"] // group) * group
            assert group == 1 or (pairs > 8 and rounded * 32 <= pairs * cut["tiles"] * 33)


def test_groups_of_columns_where_many_rows_are_at_work(host):
    assert plan(host, 8192, 151646, 0)["swizzle"] == 8
    assert plan(host, 2048, 151646, 0)["swizzle"] == 1


# --- What is refused ----------------------------------------------------------------------------------------------


GOOD_SIZES = {"rows": 1700, "vocab": 151646, "width": 3584, "hidden": 3584, "weight": 3584, "out": 151648}
GOOD_ADDRESSES = {"hidden": 1 << 20, "weight": 1 << 30, "out": 1 << 34, "partial": 1 << 21}


def refusal(host, sizes, addresses, tile=0):
    told = host.refusal((INT64 * 6)(*sizes.values()), (ctypes.c_uint64 * 4)(*addresses.values()), tile)
    return None if told is None else told.decode()


@pytest.mark.parametrize(
    ("sizes", "addresses", "words"),
    [
        ({}, {}, None),
        ({"rows": 0}, {}, None),
        ({"rows": 16384 * 1024, "vocab": 256000, "out": 256000}, {}, None),  # 4e12 elements of E
        ({}, {"out": 0}, None),
        ({"out": 1}, {"out": 0}, None),  # the stride of what is not stored
        ({"width": 3580}, {}, "width of hidden and weight must be a multiple of 8"),
        ({"hidden": 3588}, {}, "row strides of hidden and weight must be multiples of 8"),
        ({"weight": 3576}, {}, "rows of hidden or weight overlap"),
        ({"out": 151646}, {}, "row stride of out must be a multiple of 8"),
        ({"out": 151640}, {}, "at least the vocabulary"),
        ({}, {"weight": (1 << 30) + 8}, "must start at a multiple of 16 bytes"),
        ({}, {"partial": (1 << 21) + 4}, "must start at a multiple of 16 bytes"),
        ({"rows": 1 << 31}, {}, "does not fit 32 bits"),
        ({"vocab": 0, "out": 8}, {}, "matrices are empty"),
    ],
)
def test_refusals(host, sizes, addresses, words):
    told = refusal(host, GOOD_SIZES | sizes, GOOD_ADDRESSES | addresses)
    assert (told is None) if words is None else (told is not None and words in told)


def test_without_cutlass_it_says_so(host):
    assert host.built() == b""
    assert b"without CUTLASS's headers" in host.message(host.launch())
    assert refusal(host, GOOD_SIZES, GOOD_ADDRESSES, tile=host.tile_count()) == "there is no such tile"


# --- The epilogue's arithmetic ------------------------------------------------------------------------------------


def exponentials(host, acc, *, k, logit_scale=1.0, bias=None):
    t, e = np.empty_like(acc), np.empty_like(acc)
    pointers = [None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in (acc, bias, t, e)]
    host.exponentials(
        pointers[0], pointers[1], ctypes.c_double(logit_scale), ctypes.c_float(k), *pointers[2:], INT64(acc.size)
    )
    return t, e


@pytest.mark.parametrize("z_y", [0.0, 25.0, -25.0, 300.0])
@pytest.mark.parametrize("logit_scale", [1.0, 0.0625, 13.7])
def test_exponent_against_float64(host, z_y, logit_scale):
    """Below 3e-6 relative in E for |t| < 30, whatever the logit itself: the gain has two pieces.

    With one piece the error at z = 300 would be 300 * log2(e) * 2^-25 * ln 2 = 9e-6.
    """
    generator = np.random.default_rng(0)
    k = round(z_y * math.log2(math.e))
    z = z_y + generator.uniform(-20.5, 20.5, 100_000)
    acc = (z / logit_scale).astype(np.float32)
    t, e = exponentials(host, acc, k=k, logit_scale=logit_scale)
    exact = acc.astype(np.float64) * logit_scale * math.log2(math.e) - k
    assert np.abs(exact).max() < 31
    assert np.abs(t - exact).max() * math.log(2) < 2.6e-6
    # The device's ex2.approx is within 2 ulp of 2^t, so within 2^-22 of what the host's exp2 gives.
    assert np.abs(e / np.exp2(exact) - 1).max() + 2.0**-22 < 3e-6


@pytest.mark.parametrize("spread", [1.0, 4.0, 8.0])
def test_logp_stays_below_a_millionth(host, spread):
    """logp = -log1p(S' / E_y) from float32 sums of tiles, over rows with flat to peaked distributions."""
    generator = np.random.default_rng(1)
    errors = []
    for _ in range(20):
        acc = (spread * generator.standard_normal(32001)).astype(np.float32)
        bias = generator.standard_normal(32001).astype(np.float32)
        z = acc.astype(np.float64) + bias
        y = int(generator.choice(z.size, p=np.exp(z - z.max()) / np.exp(z - z.max()).sum()))
        k = round(z[y] * math.log2(math.e))
        _, e = exponentials(host, acc, k=k, bias=bias)
        e[y] = 0
        tiles = np.add.reduceat(e, np.arange(0, e.size, 256), dtype=np.float32)
        logp = -np.log1p(tiles.astype(np.float64).sum() / np.exp2(z[y] * math.log2(math.e) - k))
        errors.append(logp - (z[y] - z.max() - np.log(np.exp(z - z.max()).sum())))
    assert np.sqrt(np.mean(np.square(errors))) < 1e-6


@pytest.mark.parametrize(("softcap", "spread"), [(30.0, 5.0), (30.0, 60.0), (4.0, 3.0), (1000.0, 20.0)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_capped_exponentials_against_float64(host, softcap, spread, with_bias):
    """E within 1.2e-5 relative where |t| < 60, and E times the slope within 2e-5: t is 60 times a tanh in float32. The
    slope is no difference from 1, so that it keeps its digits where the cap is reached."""
    generator = np.random.default_rng(1)
    acc, n = (generator.standard_normal(4001) * spread).astype(np.float32), 4001
    acc[:3] = 0.0, 1e6, -1e6
    bias = generator.standard_normal(n).astype(np.float32) if with_bias else None
    k, e, kept = 7.0, np.empty_like(acc), np.empty_like(acc)
    pointers = [None if a is None else a.ctypes.data_as(ctypes.c_void_p) for a in (acc, bias, e, kept)]
    sizes = ctypes.c_double(0.7), ctypes.c_double(softcap), ctypes.c_float(k)
    host.capped(pointers[0], pointers[1], *sizes, *pointers[2:], INT64(n))
    x = (0.7 * acc.astype(np.float64) + (0.0 if bias is None else bias)) / softcap
    t = softcap * np.tanh(x) * math.log2(math.e) - k
    slope = 1 / np.cosh(np.clip(x, -300, 300)) ** 2
    near, exact = np.abs(t) < 60, np.exp2(np.minimum(t, 100))
    assert near.sum() > n // 2
    assert np.max(np.abs(e[near] / exact[near] - 1)) < 1.2e-5
    seen = near & (slope * exact > 1e-30)
    assert np.max(np.abs(kept[seen] / (slope * exact)[seen] - 1)) < 2e-5
    if softcap < 80:  # else E itself overflows there, and the row is made again
        assert e[1] > 0
        assert kept[1] == 0


def test_special_values(host):
    with np.errstate(over="ignore"):
        t, e = exponentials(host, np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32), k=3)
    assert np.isnan(e[0])
    assert e[1:].tolist() == [math.inf, 0.0, math.inf, 0.0]
    assert t[3] > 1e30


# --- The build's decision -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="without nvcc there is nothing to decide")
def test_what_the_build_says_of_cutlass(repository, tmp_path):
    """Headers found, asked away, absent, or not where they were said to be; each in one line of the build's output."""
    cmake, nanobind = pytest.importorskip("cmake"), pytest.importorskip("nanobind")
    headers = tmp_path / "include"
    (headers / "cutlass").mkdir(parents=True)
    (headers / "cutlass/version.h").write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 3\n#define CUTLASS_PATCH 1\n"
    )
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-S", repository, "-B", tmp_path / "build"]
    command += [f"-Dnanobind_ROOT={nanobind.cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += ["-DSKBUILD_PROJECT_VERSION=0.0.0", "-DSKBUILD_PROJECT_VERSION_FULL=0.0.0"]
    absent = "Hopper GEMM OFF: no CUTLASS headers found; pip install --no-deps nvidia-cutlass"
    if importlib.util.find_spec("cutlass_library") is not None:
        absent = "Hopper GEMM ON (CUTLASS"
    for asked, variable, said, succeeds in (
        ("AUTO", "", absent, True),
        ("OFF", str(headers), "Hopper GEMM OFF: MMRLHF_CUTLASS=OFF", True),
        (str(headers), "", f"Hopper GEMM ON (CUTLASS 4.3.1 in {headers})", True),
        ("AUTO", str(headers), f"Hopper GEMM ON (CUTLASS 4.3.1 in {headers})", True),
        ("/nowhere", "", "MMRLHF_CUTLASS must be AUTO, OFF or CUTLASS's include folder, got '/nowhere'", False),
    ):
        environment = {**os.environ, "MMRLHF_CUTLASS": variable}
        result = subprocess.run(
            [*command, f"-DMMRLHF_CUTLASS={asked}"], env=environment, capture_output=True, text=True
        )
        printed = " ".join((result.stdout + result.stderr).split())
        if "CUDA ops ON" not in printed:
            pytest.skip("nvcc does not work here")
        assert said in printed, printed[-2000:]
        assert (result.returncode == 0) == succeeds


# --- The binding --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def extension():
    module = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
    if not hasattr(module, "exp2_gemm_sm90_plan"):
        pytest.fail("the extension is older than its sources: pip install -e .")
    return module


def test_plan_of_the_extension(extension):
    found = extension.exp2_gemm_sm90_plan(1700, 151646, multiprocessors=132)
    assert found == {"tile": "128x256", "tiles": 593, "padded_rows": 1792, "row_step": 256, "swizzle": 1}
    assert extension.exp2_gemm_sm90_plan(1700, 151646, multiprocessors=132, tile="64x256")["padded_rows"] == 1728
    with pytest.raises(ValueError, match="tile must be one of auto, 128x256, 64x256, got '64x64'"):
        extension.exp2_gemm_sm90_plan(1, 1, multiprocessors=132, tile="64x64")
    with pytest.raises(ValueError, match="vocab must be positive, got 0"):
        extension.exp2_gemm_sm90_plan(1, 0, multiprocessors=132)
    with pytest.raises(ValueError, match="rows must not be negative"):
        extension.exp2_gemm_sm90_plan(-1, 1, multiprocessors=132)


def test_cpu_tensors_are_not_taken(extension):
    half = torch.zeros(8, 8, dtype=torch.bfloat16)
    vectors = {"target": torch.zeros(8, dtype=torch.int64), "offset": torch.zeros(8), "partial": torch.zeros(1, 64)}
    with pytest.raises(ValueError, match="hidden must be on CUDA device"):
        extension.exp2_gemm_sm90_(half, half, None, **vectors, stream=0)
    with pytest.raises(TypeError, match="hidden must be bfloat16, got float32"):
        extension.exp2_gemm_sm90_(half.float(), half, None, **vectors, stream=0)


# --- On the device ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs compute capability 9.0"
)
@pytest.mark.parametrize("tile", ["auto", "128x256", "64x256"])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [(1, 1, 8), (3, 257, 64), (64, 1000, 72), (129, 32001, 896), (700, 50257, 136), (2304, 4097, 512)],
)
@pytest.mark.parametrize("variant", ["plain", "bias and scale", "sums alone", "softcap", "softcap alone"])
def test_against_float64(extension, tile, rows, vocab, width, variant):
    if not extension.build_info()["exp2_gemm"]:
        pytest.skip("built without CUTLASS's headers")
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    hidden, weight = normal(rows, width).bfloat16(), (normal(vocab, width) * 2 / width**0.5).bfloat16()
    target = torch.randint(vocab, (rows,), generator=generator, device=device)
    target[0] = -5  # meets no column
    full, softcap = variant in ("bias and scale", "softcap"), 5.0 if "softcap" in variant else 0.0
    bias, scale = (normal(vocab), 0.7) if full else (None, 1.0)
    z = scale * hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    slope = 1.0
    if softcap:
        slope, z = 1 - torch.tanh(z / softcap) ** 2, softcap * torch.tanh(z / softcap)
    offset = (z.gather(1, target.clamp(min=0)[:, None])[:, 0] * math.log2(math.e)).round().float()
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    cut = extension.exp2_gemm_sm90_plan(rows, vocab, multiprocessors=multiprocessors, tile=tile)
    leading = -(-vocab // 8) * 8 + 8
    whole = torch.full((rows, leading), float("nan"), dtype=torch.bfloat16, device=device)
    out = None if "alone" in variant else whole[:, :vocab]
    partials = []
    for _ in range(2):
        partial = torch.full((cut["tiles"], cut["padded_rows"]), float("nan"), device=device)
        stream = torch.cuda.current_stream().cuda_stream
        options = {"target": target, "offset": offset, "partial": partial, "bias": bias, "logit_scale": scale}
        options["softcap"] = softcap
        extension.exp2_gemm_sm90_(hidden, weight, out, **options, tile=tile, stream=stream)
        partials.append(partial[:, :rows].clone())
    exact = torch.exp2(z * math.log2(math.e) - offset[:, None].double())
    exact[torch.arange(1, rows, device=device), target[1:]] = 0
    sums = torch.stack([part.sum(1) for part in exact.split(256, 1)])
    assert torch.equal(partials[0], partials[1])
    torch.testing.assert_close(partials[0].double(), sums, rtol=1e-5, atol=1e-30)
    if out is not None:
        torch.testing.assert_close(out.double(), exact * slope, rtol=2.0**-8 + 1e-5, atol=1e-30)
        assert whole[:, vocab:].isnan().all(), "columns past the vocabulary were written"
