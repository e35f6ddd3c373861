"""`pick` is a pure function of the problem, and every answer is a row of a table."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mmrlhf.kernels.triton import configs
from mmrlhf.kernels.triton.configs import EpilogueConfig, GemmConfig, Problem

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
