"""`pick` is a pure function of the problem, and every answer is a row of a table."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mmrlhf.kernels.triton import configs, launch
from mmrlhf.kernels.triton.configs import EpilogueConfig, GemmConfig, Problem
from mmrlhf.ops import _gemm

ARCHITECTURES = (80, 86, 89, 90, 100, 103, 120)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_problem_has_an_answer(arch, dtype):
    flags = itertools.product((1, 64, 65, 4096), (False, True), (False, True), (False, True), (False, True))
    for rows, aligned, bias, softcap, statistics in flags:
        problem = Problem(arch, rows, 896, 151646, dtype, aligned, bias, softcap, statistics)
        config = configs.pick(problem)
        assert config == configs.pick(dataclasses.replace(problem))
        if dtype == "float32" or not aligned or arch == 120:
            assert config == configs.pick_epilogue(problem)
        else:
            assert config in [rule.config for rule in (*configs.TUNED, *configs.GEMM_RULES)]
            assert config.loads == ("pointer" if arch < 90 else "descriptor")


def test_a_heavier_epilogue_takes_a_smaller_tile():
    def area(**flags):
        config = configs.pick(Problem(90, 4096, 4096, 151646, **flags))
        return config.block_m * config.block_v

    assert area() == area(bias=True) > area(softcap=True) > area(statistics=True)


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match="dtype must be float32, bfloat16 or float16, got 'float64'"):
        configs.pick(Problem(90, 1, 1, 1, "float64"))


def test_tiles_a_kernel_can_run():
    """Powers of two, a split that divides, and half the rows of a warp-specialised tile for each of two consumers."""
    for rule in (*configs.TUNED, *configs.GEMM_RULES, *configs.CANDIDATES):
        config = rule.config
        assert isinstance(config, GemmConfig)
        for size in (config.block_m, config.block_v, config.block_h, config.num_warps):
            assert size & (size - 1) == 0
        assert config.tile_columns * config.split == config.block_v
        if config.warp_specialize:
            assert (config.loads, config.num_warps, config.block_m) == ("device_descriptor", 4, 128)
    assert isinstance(configs.EPILOGUE, EpilogueConfig)


@pytest.mark.parametrize(("tiles", "groups"), [(1, [1]), (9, [9]), (16, [16]), (17, [9, 8]), (33, [11, 11, 11])])
def test_groups_of_row_tiles_are_even(tiles, groups):
    """A last group of one tile would read the whole weight again for it."""
    size = launch.group(tiles, 16)
    assert [min(size, tiles - first) for first in range(0, tiles, size)] == groups


@pytest.mark.parametrize(
    ("width", "rows", "size"), [(3584, 8192, 1024), (3584, 8064, 1152), (4096, 4096, 1024), (3584, 300, 300)]
)
def test_chunks_fill_the_waves_of_a_device(width, rows, size):
    """1,664 rows fit the workspace at V = 152k; of H = 3584 they are two waves on 132 multiprocessors, 31% idle."""
    most = _gemm.most_rows(152064, 2, 128)
    assert most == 1664
    assert _gemm.wave_chunk(rows, most, width, 128, 132) == size


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("width", [1, 896, 8192])
def test_chunks_are_whole_tiles_within_the_workspace(rows, width):
    """Or all rows at once; never in more waves than chunks as large as can be."""
    size = _gemm.wave_chunk(rows, 512, width, 128, 132)
    assert size == max(rows, 1) or size % 128 == 0
    assert 0 < size <= 512

    def waves(chunk):
        parts = [min(chunk, rows - first) for first in range(0, rows, chunk)]
        return sum(-(-(-(-part // 128) * -(-width // 256)) // 132) for part in parts)

    assert waves(size) <= waves(512)


def test_a_half_precision_gradient_is_rounded_once():
    """dW in bfloat16: the float32 sum, rounded; not a float32 buffer of it that is copied."""
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(33, 100, generator=g).bfloat16(), torch.randn(100, 17, generator=g).bfloat16()
    out = torch.full((33, 17), float("nan"), dtype=torch.bfloat16)
    _gemm.multiply(out, left, right)
    truth = left.double() @ right.double()
    assert ((out.double() - truth).abs() <= 2.0**-8 * truth.abs() + 1e-5).all()
    with pytest.raises(AssertionError, match="would be rounded several times"):
        _gemm.multiply(out, left, right, add=True)
