"""Launch configurations as data, and `pick()`: a pure function from a problem to the row of a table.

Nothing is tuned while it runs: `tuned` holds what a benchmark measured, and is looked at first. The rows here are what
compiles without a spill for its architecture in Triton 3.6 and 3.9 (`python -m benchmarks.aot` holds that, with shared
memory under the limit). CANDIDATES are compiled and checked too, but `pick()` does not return them: they await a
measurement that says they are faster.

Not covered: float64, and devices below compute capability 8.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmrlhf.kernels.triton import tuned

# Shared memory a program may have, in bytes, by compute capability (CUDA programming guide, table of features).
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
ARCHITECTURES = (80, 90, 100)  # what the check without a GPU compiles for
HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class LaunchConfig:
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class GemmConfig(LaunchConfig):
    """`exp2_gemm`: one tile is [block_m rows, block_v tokens], the loop takes block_h of the width at a time."""

    block_m: int = 128
    block_v: int = 128
    block_h: int = 64
    group_m: int = 16  # most tiles of rows between two visits to the same columns, see `launch.group`
    split: int = 1  # halves of the epilogue
    programs: int = 1  # at a time on a multiprocessor: with two, one's epilogue runs beside the other's products
    loads: str = "pointer"  # or descriptor, device_descriptor: see `exp2_gemm_kernel`
    warp_specialize: bool = False

    @property
    def tile_columns(self) -> int:
        """Columns a partial sum covers."""
        return self.block_v // self.split


@dataclass(frozen=True)
class EpilogueConfig(LaunchConfig):
    """`exp2_epilogue`: one [block_m, block_v] tile of float32 logits a program."""

    block_m: int = 8
    block_v: int = 1024

    @property
    def tile_columns(self) -> int:
        return self.block_v


@dataclass(frozen=True)
class RowConfig(LaunchConfig):
    """Kernels that run a few numbers a row: target_logit, finish, unit_gradient."""

    block_m: int = 4
    block_other: int = 512


@dataclass(frozen=True)
class PreferenceConfig(LaunchConfig):
    block_r: int = 32
    block_t: int = 64
    block_p: int = 128


@dataclass(frozen=True)
class Rule:
    """One row of the GEMM table: the configuration, and the problems it is for. The first row that fits is taken."""

    config: GemmConfig
    arch: tuple[int, int]  # from, to (not included)
    max_rows: int | None = None
    heavy: int = 3  # largest epilogue: 0 plain, 1 with bias, 2 with softcap, 3 with statistics


# Every row needs aligned matrices: TMA does, and a pointer row would load 2 bytes at a time and spill (232 bytes).
# The accumulator of a 128 x 256 tile is 128 registers a thread with 8 warps; a heavier epilogue than the plain one
# spills there, and takes half the tile. On sm_100 the plain epilogue does so too, and ptxas holds itself to 128
# registers with 8 warps, which is 2 too few for it.
GEMM_RULES: tuple[Rule, ...] = (
    # Up to 64 rows the weight's bytes are the bound: of two programs one reads while the other is in its epilogue.
    Rule(GemmConfig(4, 4, 64, 128, 64, loads="descriptor", programs=2), (90, 100), max_rows=64, heavy=1),
    Rule(GemmConfig(8, 3, 128, 256, 64, loads="descriptor"), (90, 100), heavy=1),
    Rule(GemmConfig(4, 4, 128, 128, 64, loads="descriptor"), (100, 120), heavy=0),
    Rule(GemmConfig(8, 4, 128, 128, 64, loads="descriptor"), (90, 120), heavy=2),
    Rule(GemmConfig(8, 4, 128, 64, 64, loads="descriptor"), (90, 120)),
    Rule(GemmConfig(8, 3, 128, 128, 64), (80, 90), heavy=2),
    Rule(GemmConfig(8, 3, 128, 64, 32), (80, 90)),
)

CANDIDATES: tuple[Rule, ...] = (
    Rule(GemmConfig(4, 3, 128, 256, 64, loads="device_descriptor", warp_specialize=True), (90, 100), heavy=1),
    Rule(GemmConfig(4, 4, 128, 128, 64, loads="device_descriptor", warp_specialize=True), (90, 100), heavy=1),
    Rule(GemmConfig(8, 4, 128, 256, 64, split=2, loads="descriptor"), (90, 100), heavy=1),
    Rule(GemmConfig(8, 3, 256, 128, 64, loads="descriptor"), (90, 100), heavy=1),
    # Two programs hide each other's epilogue, which for H = 896 is a quarter of the tile, for 4/3 of the loads from L2.
    Rule(GemmConfig(4, 3, 128, 128, 64, split=2, loads="descriptor", programs=2), (90, 100), heavy=1),
)


def rules(rows: tuple[dict[str, Any], ...]) -> tuple[Rule, ...]:
    """Rules from plain data, as `tuned` has them."""
    return tuple(Rule(**{**row, "config": GemmConfig(**row["config"])}) for row in rows)


TUNED = rules(tuned.ROWS)

EPILOGUE = EpilogueConfig(8, 1, 8, 1024)
EPILOGUE_NARROW = EpilogueConfig(4, 1, 4, 512)  # softcap and statistics keep more of the tile in registers
TARGET_LOGIT = RowConfig(4, 1, 4, 512)
FINISH = RowConfig(8, 1, 16, 128)  # 594 partial sums a row at V = 152k: 5 loads one after another
UNIT_GRADIENT = RowConfig(4, 1, 4, 512)
SELECT = RowConfig(8, 1, 1024)
REDO = GemmConfig(8, 3, 64, 128, 64)  # rows run again: few, so a tile of 64 rows is half empty and never the bound
REDO_FLOAT = GemmConfig(4, 1, 32, 64, 32)  # float32 is multiplied exactly, without tensor cores
PREFERENCE = PreferenceConfig(16, 1, 32, 64, 128)


@dataclass(frozen=True)
class Problem:
    """What a choice may depend on. `dtype` is that of hidden and weight; `aligned`: see `launch.aligned`."""

    arch: int  # 10 * major + minor
    rows: int
    width: int
    vocab: int
    dtype: str = "bfloat16"
    aligned: bool = True
    bias: bool = False
    softcap: bool = False
    statistics: bool = False

    @property
    def heavy(self) -> int:
        """The class of the epilogue, as `Rule.heavy` counts."""
        return max(int(self.bias), 2 * self.softcap, 3 * self.statistics)


def pick(problem: Problem) -> GemmConfig | EpilogueConfig:
    """How E is made: by a fused GEMM where a row fits, else by the epilogue over tiles of a library GEMM.

    float32 is for the library: Triton multiplies it exactly only without tensor cores, several times slower.
    Raises ValueError for a dtype that the kernels do not take.
    """
    if problem.dtype not in (*HALF, "float32"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {problem.dtype!r}")
    if problem.dtype in HALF:
        for rule in (*TUNED, *GEMM_RULES):
            if fits(rule, problem):
                return rule.config
    return pick_epilogue(problem)


def fits(rule: Rule, problem: Problem) -> bool:
    return (
        rule.arch[0] <= problem.arch < rule.arch[1]
        and problem.heavy <= rule.heavy
        and (rule.max_rows is None or problem.rows <= rule.max_rows)
        and problem.aligned
    )


def pick_epilogue(problem: Problem) -> EpilogueConfig:
    return EPILOGUE_NARROW if problem.softcap or problem.statistics else EPILOGUE


def pick_redo(single: bool) -> GemmConfig:
    """How rows are run again; `single`: float32."""
    return REDO_FLOAT if single else REDO
