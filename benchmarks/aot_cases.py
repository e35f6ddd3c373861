"""What `benchmarks.aot` compiles: every configuration that `pick` and its relatives can return, with every variant.

A case is one kernel with its compile-time arguments, and the instructions that have to be in its machine code.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmrlhf.kernels.triton import configs, launch, linear_logp, preference, redo, rows
from mmrlhf.kernels.triton.configs import GemmConfig, LaunchConfig, Problem

WIDTH = 4096  # of the hidden rows; only its divisibility is seen
VOCAB = 151646


@dataclass(frozen=True)
class Case:
    """One kernel with its compile-time arguments; pointers take 16-byte aligned tensors, as PyTorch's are."""

    name: str
    kernel: Any
    config: LaunchConfig
    types: dict[str, str]  # of the arguments that are neither constants nor int32
    constants: dict[str, Any]
    hot: bool = True
    needs: tuple[str, ...] = ()  # instructions that have to be there


def row_counts() -> list[int]:
    """Numbers of rows on either side of every threshold of the tables."""
    rules = (*configs.TUNED, *configs.GEMM_RULES, *configs.CANDIDATES)
    edges = {rule.max_rows for rule in rules if rule.max_rows is not None}
    return sorted({1, *edges, *(edge + 1 for edge in edges)})


def gemm_cases(arch: int, *, quick: bool) -> Iterator[Case]:
    """What `pick` returns for any number of rows and every epilogue, and the candidates for the same problems."""
    seen = set()
    for count, bias, softcap, statistics in itertools.product(row_counts(), *[(False, True)] * 3):
        if quick and softcap != bias:
            continue
        problem = Problem(arch, count, WIDTH, VOCAB, bias=bias, softcap=softcap, statistics=statistics)
        found = [configs.pick(problem), *(rule.config for rule in configs.CANDIDATES if configs.fits(rule, problem))]
        names = [name for name in ("bias", "softcap", "statistics") if getattr(problem, name)]
        for config in found:
            assert isinstance(config, GemmConfig), f"sm_{arch} has no GEMM row for {problem}"
            variants = ["+".join(names)]
            if not names and not quick:
                variants += ["sums", "ragged width"] if config.loads == "pointer" else ["sums"]
            for variant in variants:
                if (config, variant) not in seen:
                    seen.add((config, variant))
                    yield gemm_case(arch, config, variant)


def gemm_case(arch: int, config: GemmConfig, variant: str) -> Case:
    width = WIDTH + 16 if "ragged" in variant else WIDTH
    constants: dict[str, Any] = launch.gemm_constants(config, "softcap" in variant, "statistics" in variant, width)
    types = {"hidden": "*bf16", "weight": "*bf16", "out": "*bf16", "bias": "*bf16", **_rows()}
    if config.loads == "descriptor":
        types["hidden"] = f"tensordesc<bf16[{config.block_m}, {config.block_h}]>"
        types["weight"] = f"tensordesc<bf16[{config.block_v}, {config.block_h}]>"
        types["out"] = f"tensordesc<bf16[{config.block_m}, {config.tile_columns}]>"
    if "bias" not in variant:
        constants["bias"] = None
    if variant == "sums":
        constants["out"] = None
    needs: tuple[str, ...] = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}[arch]
    if config.loads != "pointer":
        needs += ("UTMALDG",) if variant == "sums" else ("UTMALDG", "UTMASTG")
    if config.warp_specialize:
        needs += ("USETMAXREG",)
    shape = f"{config.block_m}x{config.block_v}x{config.block_h}"
    name = f"exp2_gemm {config.loads} {shape} w{config.num_warps} s{config.num_stages}"
    name += (f" split{config.split}" if config.split > 1 else "") + (" ws" if config.warp_specialize else "")
    return Case(f"{name} {variant}".strip(), linear_logp.exp2_gemm_kernel, config, types, constants, needs=needs)


def epilogue_cases(*, quick: bool) -> Iterator[Case]:
    table = [(configs.EPILOGUE, ""), (configs.EPILOGUE_NARROW, "softcap+bias+statistics")]
    if not quick:
        table += [
            (configs.EPILOGUE, "bias"),
            (configs.EPILOGUE_NARROW, "softcap"),
            (configs.EPILOGUE_NARROW, "statistics"),
        ]
    for config, variant in table:
        constants = {
            "SOFTCAP": "softcap" in variant,
            "STATS": "statistics" in variant,
            "BLOCK_M": config.block_m,
            "BLOCK_V": config.block_v,
        }
        types = {"tile": "*fp32", "out": "*bf16", "bias": "*bf16", **_rows()}
        if "bias" not in variant:
            constants["bias"] = None
        name = f"exp2_epilogue {config.block_m}x{config.block_v} w{config.num_warps} {variant}".strip()
        yield Case(name, linear_logp.exp2_epilogue_kernel, config, types, constants)


def row_cases() -> Iterator[Case]:
    """The kernels that run a few numbers a row."""
    config = configs.TARGET_LOGIT
    constants: dict[str, Any] = {"SOFTCAP": True, "BLOCK_M": config.block_m, "BLOCK_H": config.block_other}
    types = {"hidden": "*bf16", "weight": "*bf16", "bias": "*bf16", **_rows()}
    yield Case("target_logit", rows.target_logit_kernel, config, types, constants)
    config = configs.UNIT_GRADIENT
    constants = {"BLOCK_M": config.block_m, "BLOCK_H": config.block_other}
    types = {"product": "*fp32", "out": "*fp32", "weight": "*bf16", **_rows()}
    yield Case("unit_gradient", rows.unit_gradient_kernel, config, types, constants)
    for statistics in (False, True):
        name, constants = _finish(statistics)
        yield Case(f"finish{name}", rows.finish_kernel, configs.FINISH, _rows(), constants, hot=False)
    yield Case("logp", rows.logp_kernel, configs.FINISH, _rows(), {"BLOCK_M": 128}, hot=False)


def _finish(statistics: bool) -> tuple[str, dict[str, Any]]:
    config = configs.FINISH
    constants: dict[str, Any] = {"STATS": statistics, "BLOCK_M": config.block_m, "BLOCK_T": config.block_other}
    if not statistics:
        constants |= dict.fromkeys(("entropy", "sum_p2", "is_top1", "mean_logit", "maximum"))
    return " statistics" if statistics else "", constants


def redo_cases() -> Iterator[Case]:
    """Rows run again: not hot, for they are few or none; but they are launched every time, so they have to fit."""
    for done in (False, True):
        constants: dict[str, Any] = {"DONE": done, "BLOCK": configs.SELECT.block_m}
        name = "select" + (" done" if done else "")
        yield Case(name, redo.select_kernel, configs.SELECT, _chosen(), constants, hot=False)
    for single in (False, True):
        config, dtype = configs.pick_redo(single), "fp32" if single else "bf16"
        types = {**_chosen(), **dict.fromkeys(("hidden", "weight", "out", "bias", "e"), f"*{dtype}")}
        types |= {"low": "*fp32", "up": "*fp32"}
        blocks = {"BLOCK_M": config.block_m, "BLOCK_V": config.block_v, "BLOCK_H": config.block_h}
        for variant in ("maximum", "exponentials", "exponentials by_row softcap adapter", "exponentials statistics"):
            constants = {"MODE": variant.split()[0], "SOFTCAP": "softcap" in variant, "STATS": "statistics" in variant}
            constants |= {"BY_ROW": "by_row" in variant, **blocks}
            if "adapter" not in variant:
                constants |= {"low": None, "up": None, "bias": None}
            if variant == "maximum" or "by_row" in variant:
                constants["partial"] = None
            if variant == "maximum" or "statistics" in variant:
                constants["out"] = None
            yield Case(f"redo {dtype} {variant}", redo.redo_kernel, config, types, constants, hot=False)
        # Its loop is over the vocabulary: launch_redo swaps the two.
        constants = {"BY_ROW": False, **blocks, "BLOCK_H": config.block_v, "BLOCK_V": config.block_h}
        types = {**types, "out": "*fp32"}
        yield Case(f"redo_unit {dtype}", redo.redo_unit_kernel, config, types, constants, hot=False)
        if single:  # an adapter's B stays float32 beside the bfloat16 exponentials of its head
            mixed = {**types, "e": "*bf16"}
            yield Case(f"redo_unit {dtype} adapter", redo.redo_unit_kernel, config, mixed, constants, hot=False)
    for statistics in (False, True):
        name, constants = _finish(statistics)
        yield Case(f"redo_finish{name}", redo.redo_finish_kernel, configs.FINISH, _chosen(), constants, hot=False)


def preference_cases(arch: int, *, quick: bool) -> Iterator[Case]:
    """Every kind for one architecture; the shortest and the one with a pass more for the others."""
    config = configs.PREFERENCE
    kinds = preference.KINDS if arch == 90 and not quick else ("sigmoid", "bco_pair")
    inputs = "logp token_weight reference beta margin pair_weight"
    outputs = "scores rewards d_score losses margins betas coef total_loss accuracy sft_loss"
    floats = "beta_value w k label_smoothing gamma_beta_ratio discopop_tau num_pairs_value num_sft_value sft_weight"
    types = dict.fromkeys(f"{inputs} {outputs}".split(), "*fp32") | dict.fromkeys(floats.split(), "fp32")
    types |= {"cu_seqlens": "*i64", "pairs": "*i64", "scratch": "*fp64"}
    for kind in kinds:
        constants = {"KIND": kind, "MEAN": True, "PER_PAIR": True, "num_pairs": None, "num_sft_tokens": None}
        constants |= {"BLOCK_R": config.block_r, "BLOCK_T": config.block_t, "BLOCK_P": config.block_p}
        yield Case(f"preference {kind}", preference.preference_kernel, config, types, constants)


def _rows() -> dict[str, str]:
    """Types of the arguments that the linear_logp kernels share."""
    floats = "offset partial z_y slope_y rest logp total entropy sum_p2 mean_logit maximum"
    types = dict.fromkeys(floats.split(), "*fp32") | dict.fromkeys(
        ("gain", "bias_gain", "cap", "logit_scale", "softcap"), "fp32"
    )
    return types | {"target": "*i64", "is_top1": "*i8"}


def _chosen() -> dict[str, str]:
    return {**_rows(), "index": "*i32", "count": "*i32"}


def cases(arch: int, *, quick: bool = False) -> list[Case]:
    return [
        *gemm_cases(arch, quick=quick),
        *epilogue_cases(quick=quick),
        *row_cases(),
        *redo_cases(),
        *preference_cases(arch, quick=quick),
    ]
