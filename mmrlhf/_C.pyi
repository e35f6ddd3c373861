"""Compiled ops. Arrays are anything that speaks DLPack (torch, NumPy); nothing is converted or copied.

Every op writes into its arguments behind autograd's back: call it inside an autograd.Function or under no_grad.
"""

from typing import Any, TypedDict

class BuildInfo(TypedDict):
    version: str
    compiler: str
    isas: list[str]  # what this CPU can run: scalar, avx2, avx512
    isa: str  # what isa="auto" means here
    threads: str  # path of the OpenMP runtime shared with torch, or "std::thread"
    cuda: bool
    cuda_archs: str  # CMake's notation: "80-real 80-virtual 90a-real"
    cuda_compiler: str

def build_info() -> BuildInfo:
    """What was built, and what of it this machine uses."""

def exp2_rowsum_(
    tile: Any,  # [rows, cols] float32, columns contiguous; in place
    offset: Any,  # [rows] float32, integers k with |k| < 2^23
    sums: Any,  # [rows] float32, written
    *,
    target_col: Any | None = None,  # [rows] int64
    target_exp: Any | None = None,  # [rows] float32, written
    accumulate: bool = False,
    threads: int = 1,
    isa: str = "auto",
) -> None:
    """tile[r, c] <- 2^(tile[r, c] * log2(e) - offset[r]) and sums[r] <- the sum of row r, without the target's column.

    At most 2 ulp from the exact value on every path. NaN stays NaN, +inf gives inf, -inf gives 0, denormals are kept.
    Where 0 <= target_col[r] < cols, that column is left out of sums[r] and its exponential goes to target_exp[r];
    elsewhere target_exp[r] is not written. `accumulate` adds to sums instead. `threads` is the most to use: pass
    torch.get_num_threads(). The interpreter lock is released.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, stride, device, isa or number of threads.
    """

def exp2_rowsum_cuda(
    tile: Any,
    offset: Any,
    sums: Any,
    *,
    target_col: Any | None = None,
    target_exp: Any | None = None,
    accumulate: bool = False,
    stream: int,
) -> None:
    """exp2_rowsum_ on a CUDA device; there only where build_info()["cuda"].

    `stream` is torch.cuda.current_stream(tile.device).cuda_stream. Raises also RuntimeError with CUDA's own message.
    """
