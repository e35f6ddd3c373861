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
    exp2_gemm: str  # "CUTLASS 4.2.0", or "" where it was left out

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

def exp2_rowsum_block_(
    tile: Any,  # [rows, cols] float32, columns contiguous; in place
    offset: Any,  # [rows] float32, integers k with |k| < 2^23
    rest: Any,  # [rows] float32, added to
    target: Any,  # [rows] int64
    *,
    start: int,  # the token of the tile's first column
    value: Any | None = None,  # [rows] float32
    threads: int = 1,
    isa: str = "auto",
) -> None:
    """exp2_rowsum_ on a block of a head's logits: all that one tile takes between two GEMMs.

    Where start <= target[r] < start + cols, that column is left out of the sum and becomes value[r], or 0. The sum is
    added to rest[r]. Errors as exp2_rowsum_, ValueError for a negative start too.
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

def preference_(
    logp: Any,  # [N] float32, nats
    cu_seqlens: Any,  # [R + 1] int32 or int64
    pairs: Any,  # [P, 2] int32 or int64, (better, worse)
    scores: Any,  # [R] float32, written, as all that follow
    rewards: Any,  # [R]
    losses: Any,  # [P]
    margins: Any,  # [P]
    betas: Any,  # [P]
    coef: Any,  # [N], d loss / d logp
    loss: Any,  # []
    accuracy: Any,  # []
    sft_loss: Any,  # []
    *,
    token_weight: Any | None = None,  # [N] float32
    reference_scores: Any | None = None,  # [R] float32
    beta: float = 0.1,
    beta_tensor: Any | None = None,  # [P] or [] float32, in the place of beta
    margin: Any | None = None,  # [P] float32: beta * (1 + w * (1 - exp(-k * margin)))
    w: float = 0.5,
    k: float = 0.5,
    pair_weight: Any | None = None,  # [P] float32
    kind: str = "sigmoid",
    mean: bool = False,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.5,
    discopop_tau: float = 0.05,
    num_pairs: float = 1.0,
    num_sft_tokens: float = 0.0,  # 0: the better responses' tokens, once a pair
    sft_weight: float = 0.0,
) -> None:
    """ops.reference.Objective from log-probabilities to the loss, and its derivative for every token, in one pass.

    float64 between float32 inputs and outputs. Contiguous arrays on the CPU. Raises TypeError for a wrong dtype,
    ValueError for a wrong shape, stride, device or kind, for cu_seqlens that do not run from 0 to N in ascending order,
    and for pairs outside [0, R). The interpreter lock is released.
    """

def exp2_gemm_sm90_plan(rows: int, vocab: int, *, multiprocessors: int, tile: str = "auto") -> dict[str, Any]:
    """How exp2_gemm_sm90_ cuts a problem, and what `partial` has to be for it. Pure; there in every build.

    tile: rows and columns of a tile of E, such as "128x256"; tiles, padded_rows: the shape of `partial`; row_step: rows
    that two blocks take, a chunk that is no multiple leaves part of them idle; swizzle.

    Raises ValueError for a negative size and a tile of another name.
    """

def exp2_gemm_sm90_(
    hidden: Any,  # [N, H] bfloat16
    weight: Any,  # [V, H] bfloat16
    out: Any | None,  # [N, V] bfloat16, written; None: the sums alone
    *,
    target: Any,  # [N] int64; one outside [0, V) meets no column, if 32 bits hold it
    offset: Any,  # [N] float32, k
    partial: Any,  # [tiles, padded_rows] float32, written, see exp2_gemm_sm90_plan
    bias: Any | None = None,  # [V] float32
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    tile: str = "auto",
    stream: int,
) -> None:
    """out[n, v] <- 2^(z log2(e) - k_n), z = logit_scale <h_n, W_v> + b_v, 0 at the target; and sums over tiles.

    With a softcap above 0 z is softcap * tanh(z / softcap), and out is E times the slope of the cap, sums are of E.

    partial[t, n] is the float32 sum of row n over columns 256 t ... 256 t + 255 before rounding to bfloat16, always
    added in the same order; columns of `partial` from N on hold nothing of use. Relative error of E below 3e-6 for
    |log2 E| < 30. H and all row strides must be multiples of 8, all addresses multiples of 16. For compute capability
    9.0, on `stream`, without waiting.

    Raises TypeError for a wrong dtype, ValueError for a wrong shape, stride, address, device or tile, RuntimeError
    where build_info()["exp2_gemm"] is empty or the launch fails.
    """

# The cuda ops below are there only where build_info()["cuda"]. All write into arguments on one CUDA device, on `stream`
# (torch.cuda.current_stream(device).cuda_stream), without waiting: a CUDA graph can hold them. Indices on the device
# are not checked. They raise TypeError for a wrong dtype, ValueError for a wrong shape, stride or device, RuntimeError
# with CUDA's own message. z = logit_scale <h, W_v> + b_v, then softcap * tanh(z / softcap) where softcap > 0.

def target_logit_cuda(
    hidden: Any,  # [N, H] float32 or bfloat16, columns contiguous, as in every matrix
    weight: Any,  # [V, H], of the same dtype
    target: Any,  # [N] int64; one outside [0, V) is not read, its row becomes NaN
    z_y: Any,  # [N] float32, written
    offset: Any,  # [N] float32, written: k = rint(z_y log2(e))
    *,
    bias: Any | None = None,  # [V] float32
    slope_y: Any | None = None,  # [N] float32, written: the slope of the cap; goes with a softcap
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    stream: int,
) -> None:
    """The logit of each row's target, by gather-dot."""

def exp2_epilogue_cuda(
    tile: Any,  # [N, c] float32, <h, W_v> for v in [start, start + c)
    out: Any | None,  # [N, c] float32 or bfloat16, written; may be `tile`; None: the sums alone
    target: Any,  # [N] int64, of the whole vocabulary
    offset: Any,  # [N] float32
    partial: Any,  # [ceil(c / 1024), N] float32, written
    *,
    start: int,
    bias: Any | None = None,  # [c] float32, the block's part
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    stream: int,
) -> None:
    """E = 2^(z log2(e) - k), times the slope of the cap, 0 at the targets, and sums of E a tile, in one pass."""

def finish_cuda(
    partial: Any,  # [tiles, N] float32
    z_y: Any,  # [N] float32
    offset: Any,  # [N] float32
    rest: Any,  # [N] float32, written: S'
    logp: Any,  # [N] float32, written: nats
    *,
    index: Any
    | None = None,  # [N] int32, of select_cuda; then `partial` is [tiles, capacity], and these rows are written
    count: Any | None = None,  # [1] int32
    first: int = 0,
    stream: int,
) -> None:
    """Partial sums to S' and logp = -log1p(S' / E_y), added in one order, in float64."""

def unit_gradient_cuda(
    product: Any,  # [N, H] float32, E W on entry
    weight: Any,  # [V, H] float32 or bfloat16
    target: Any,  # [N] int64
    z_y: Any,  # [N] float32
    offset: Any,  # [N] float32
    rest: Any,  # [N] float32
    *,
    slope_y: Any | None = None,  # [N] float32
    logit_scale: float = 1.0,
    stream: int,
) -> None:
    """product <- dlogp/dh = logit_scale (S' slope_y W_y - E W) / S."""

def select_cuda(
    rest: Any,  # [N] float32
    z_y: Any,  # [N] float32
    offset: Any,  # [N] float32
    index: Any,  # [N] int32, of which the first `count` are written, ascending
    count: Any,  # [1] int32, written
    *,
    done: bool = False,
    stream: int,
) -> None:
    """The rows to do again: S' above 2^64 or not a number; `done`: those that were, by their offset alone."""

# Of the rows that `select_cuda` chose, the ops below take the places first ... first + capacity, so many as there are.
# low up^T is an adapter's part of <h, W_v>.

def redo_maximum_cuda(
    hidden: Any,  # [N, H] float32 or bfloat16
    weight: Any,  # [V, H], of the same dtype
    target: Any,  # [N] int64
    offset: Any,  # [N] float32, raised
    index: Any,
    count: Any,
    partial: Any,  # [ceil(V / 128), capacity] float32, scratch
    *,
    first: int,
    capacity: int,
    bias: Any | None = None,  # [V] float32
    low: Any | None = None,  # [N, r] float32
    up: Any | None = None,  # [V, r] float32
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    stream: int,
) -> None:
    """offset <- the larger of it and rint(z log2(e)) of the row's largest logit."""

def redo_exponentials_cuda(
    hidden: Any,  # [N, H] float32 or bfloat16
    weight: Any,  # [c, H]: the vocabulary, or a block of it
    out: Any | None,  # [capacity, c], or with by_row [N, c], in the dtype of hidden, written
    target: Any,  # [N] int64, of the whole vocabulary
    offset: Any,  # [N] float32
    index: Any,
    count: Any,
    partial: Any | None,  # [ceil(c / 128), capacity] float32, written
    *,
    first: int,
    capacity: int,
    start: int = 0,
    by_row: bool = False,
    bias: Any | None = None,  # [c] float32
    low: Any | None = None,  # [N, r] float32
    up: Any | None = None,  # [c, r] float32
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    stream: int,
) -> None:
    """E times the slope of the cap, 0 at the targets, and sums of E a tile; the same bits for the same rows."""

def redo_unit_cuda(
    unit: Any,  # [N, H] float32, written
    exponentials: Any,  # [capacity, V], or with by_row [N, V]
    weight: Any,  # [V, H] float32, or bfloat16 as the exponentials
    target: Any,  # [N] int64
    z_y: Any,  # [N] float32
    offset: Any,  # [N] float32
    rest: Any,  # [N] float32
    index: Any,
    count: Any,
    *,
    first: int,
    capacity: int,
    by_row: bool = False,
    slope_y: Any | None = None,  # [N] float32
    logit_scale: float = 1.0,
    stream: int,
) -> None:
    """E W, and dlogp/dh from it."""

def token_statistics_cuda(
    tile: Any,  # [N, c] float32, <h, W_v> for v in [start, start + c)
    target: Any,  # [N] int64, of the whole vocabulary
    z_y: Any,  # [N] float32, written where the block has the target
    partial: Any,  # [5, ceil(c / 1024), N] float32, written
    *,
    start: int,
    bias: Any | None = None,  # [c] float32
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    stream: int,
) -> None:
    """A tile's largest logit m; over the others the sums of e^(z - m), of it times z - m, of its square; all z's."""

def finish_statistics_cuda(
    partial: Any,  # [5, tiles, N] float32
    z_y: Any,  # [N] float32
    logp: Any,  # [N] float32, written, as what follows
    entropy: Any,  # [N] float32, nats
    sum_p2: Any,  # [N] float32
    mean_logit: Any,  # [N] float32, nats
    is_top1: Any,  # [N] int8, 1 where no token has a larger logit than z_y
    *,
    vocab: int,
    stream: int,
) -> None:
    """The tiles of a row to its statistics, folded in float64 in one order."""

def preference_cuda(
    logp: Any,
    cu_seqlens: Any,
    pairs: Any,
    scores: Any,
    rewards: Any,
    losses: Any,
    margins: Any,
    betas: Any,
    coef: Any,
    loss: Any,
    accuracy: Any,
    sft_loss: Any,
    *,
    token_weight: Any | None = None,
    reference_scores: Any | None = None,
    beta: float = 0.1,
    beta_tensor: Any | None = None,
    margin: Any | None = None,
    w: float = 0.5,
    k: float = 0.5,
    pair_weight: Any | None = None,
    kind: str = "sigmoid",
    mean: bool = False,
    label_smoothing: float = 0.0,
    gamma_beta_ratio: float = 0.5,
    discopop_tau: float = 0.05,
    num_pairs: float = 1.0,
    num_sft_tokens: float = 0.0,
    sft_weight: float = 0.0,
    scratch: Any,  # [3 R + 2 P] float64, written
    num_pairs_tensor: Any | None = None,  # [] float64, in the place of num_pairs
    num_sft_tokens_tensor: Any | None = None,  # [] float64
    stream: int,
) -> None:
    """preference_ in one launch; deterministic."""
