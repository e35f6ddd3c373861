"""Every CUDA C++ kernel once or twice on tiny awkward shapes: what `gpu_sanitize` launches of the compiled extension.

`checks(ops, device)` gives a name and a function each; `ops` is the extension, or a module with the same functions (a
test compiles them for the host). Buffers are NaN before a launch, results are held against float64, and matrices that
a library would multiply come from the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrlhf.ops import reference
from numerics import plain_logp

SHAPES = ((5, 80, 1003), (33, 24, 1024), (1, 8, 1))  # rows, H, V
LIMIT = 1e-3  # nats, and relative
LOG2E = math.log2(math.e)
Check = Callable[[], None]


@dataclass
class Case:
    """A head, rows of which every third is so far from its target that it is done again, and its truth."""

    ops: Any
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V] float32
    softcap: float
    target: Tensor  # [N]
    product: Tensor  # [N, V] float32, <h, W_v>
    z: Tensor  # [N, V] float64 on the CPU
    truth: Tensor  # [N] float64 on the CPU: logp

    @classmethod
    def make(cls, ops: Any, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, **how: Any) -> Case:
        rows, width, vocab = shape
        g = torch.Generator().manual_seed(rows)
        hidden = torch.randn(rows, width, generator=g)
        if how.get("far"):
            hidden[::3] *= 60
        weight = (torch.randn(vocab, width, generator=g) * (2 / width**0.5)).to(dtype)
        hidden, bias = hidden.to(dtype), torch.randn(vocab, generator=g) if how.get("bias") else None
        z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        target = z.argmin(1) if how.get("far") else torch.randint(0, vocab, (rows,), generator=g)
        softcap = how.get("softcap", 0.0)
        options = {"bias": None if bias is None else bias.double(), "softcap": softcap or None}
        truth = plain_logp(hidden.double(), weight.double(), target, **options)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        product = (hidden.float() @ weight.float().T).to(device)
        bias = None if bias is None else bias.to(device)
        return cls(ops, hidden.to(device), weight.to(device), bias, softcap, target.to(device), product, z, truth)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN in every entry."""
        return torch.full(shape, torch.nan, device=self.hidden.device).to(dtype)

    @property
    def stream(self) -> int:
        device = self.hidden.device
        return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

    def rows(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """z_y, offset and slope_y, launched."""
        count = self.hidden.shape[0]
        z_y, offset, slope = self.empty(count), self.empty(count), self.empty(count) if self.softcap else None
        options = {"bias": self.bias, "slope_y": slope, "softcap": self.softcap, "stream": self.stream}
        self.ops.target_logit_cuda(self.hidden, self.weight, self.target, z_y, offset, **options)
        return z_y, offset, slope

    def hold(self, logp: Tensor, unit: Tensor | None) -> None:
        """logp against its truth, and dlogp/dh against float64's."""
        close("logp", logp, self.truth)
        if unit is not None:
            weight, p = self.weight.cpu().double(), self.z.softmax(1)
            p = -p
            p[torch.arange(p.shape[0]), self.target.cpu()] += 1
            capped = 1 - (self.z / self.softcap) ** 2 if self.softcap else torch.ones_like(self.z)
            close("dlogp/dh", unit, (p * capped) @ weight, limit=0.02)  # E may be bfloat16


def close(name: str, found: Tensor, truth: Tensor, *, limit: float = LIMIT) -> None:
    """Within the limit, of the truth's size where that is above 1."""
    error = (found.cpu().double() - truth).abs() / truth.abs().clamp(min=1.0)
    worst = error.max().item() if error.numel() else 0.0
    assert worst < limit, f"{name} is off by {worst:.1e}"


def epilogue(case: Case, store: bool) -> None:
    """target_logit, exp2_epilogue, finish, unit_gradient."""
    (count, vocab), ops = case.product.shape, case.ops
    z_y, offset, slope = case.rows()
    partial_sums, rest, logp = case.empty(-(-vocab // 1024), count), case.empty(count), case.empty(count)
    e = case.empty(count, -(-vocab // 16) * 16, dtype=case.weight.dtype)[:, :vocab] if store else None
    options = {"start": 0, "bias": case.bias, "softcap": case.softcap, "stream": case.stream}
    ops.exp2_epilogue_cuda(case.product.clone(), e, case.target, offset, partial_sums, **options)
    ops.finish_cuda(partial_sums, z_y, offset, rest, logp, stream=case.stream)
    unit = None
    if e is not None:
        unit = (e.cpu().double() @ case.weight.cpu().double()).float().to(e.device)
        vectors = (case.target, z_y, offset, rest)
        ops.unit_gradient_cuda(unit, case.weight, *vectors, slope_y=slope, stream=case.stream)
    case.hold(logp, unit)


def redo(case: Case, by_row: bool) -> None:
    """select, redo_maximum, redo_exponentials, finish and redo_unit of all rows, then of all but the first: the index
    buffer holds what would be far out of bounds."""
    (count, vocab), ops = case.product.shape, case.ops
    z_y, offset, slope = case.rows()
    rest = torch.exp(case.z - z_y.cpu().double()[:, None]).sum(1).float().to(offset.device)
    logp, unit = case.truth.float().to(offset.device), case.empty(count, case.hidden.shape[1])
    for first in (0, 1):
        chosen = {
            "index": torch.full((count,), 1 << 30, dtype=torch.int32, device=offset.device),
            "count": torch.full((1,), -1, dtype=torch.int32, device=offset.device),
        }
        ops.select_cuda(torch.full_like(rest, torch.inf), z_y, offset, **chosen, stream=case.stream)
        part = {"first": first, "capacity": count - first, "stream": case.stream, **chosen}
        partial_sums = case.empty(-(-vocab // 128), count - first)
        head = (case.hidden, case.weight)
        options = {"bias": case.bias, "softcap": case.softcap}
        ops.redo_maximum_cuda(*head, case.target, offset, partial=partial_sums, **options, **part)
        e = case.empty(count if by_row else count - first, vocab, dtype=case.weight.dtype)
        options |= {"partial": partial_sums, "by_row": by_row}
        ops.redo_exponentials_cuda(*head, e, case.target, offset, **options, **part)
        finishing = {"first": first, "stream": case.stream, **chosen}
        ops.finish_cuda(partial_sums, z_y, offset, rest, logp, **finishing)
        vectors = (case.target, z_y, offset, rest)
        ops.redo_unit_cuda(unit, e, case.weight, *vectors, slope_y=slope, by_row=by_row, **part)
        again = {name: torch.zeros_like(each) for name, each in chosen.items()}
        ops.select_cuda(rest, z_y, offset, **again, done=True, stream=case.stream)
        want = int((offset.cpu() - z_y.cpu() * LOG2E > 32).sum())
        assert int(again["count"]) == want, f"{int(again['count'])} rows done, not {want}"
    case.hold(logp, unit)


def statistics(case: Case) -> None:
    """token_statistics and finish_statistics."""
    count, vocab = case.product.shape
    partial_sums, z_y = case.empty(5, -(-vocab // 1024), count), case.empty(count)
    options = {"start": 0, "bias": case.bias, "softcap": case.softcap, "stream": case.stream}
    case.ops.token_statistics_cuda(case.product, case.target, z_y, partial_sums, **options)
    logp, entropy, sum_p2, mean = (case.empty(count) for _ in range(4))
    top = torch.full((count,), 7, dtype=torch.int8, device=z_y.device)
    vectors = (z_y, logp, entropy, sum_p2, mean, top)
    case.ops.finish_statistics_cuda(partial_sums, *vectors, vocab=vocab, stream=case.stream)
    p = case.z.softmax(1)
    close("logp", logp, case.truth)
    close("entropy", entropy, -(p * case.z.log_softmax(1)).sum(1))
    close("sum_p2", sum_p2, (p * p).sum(1))
    close("mean_logit", mean, case.z.mean(1))
    assert ((top == 0) | (top == 1)).all(), "is_top1 is neither"


def rowsum(ops: Any, rows: int, columns: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, columns, generator=g)
    tile, offset = logits.clone().to(device), torch.zeros(rows).to(device)
    sums, target = torch.full((rows,), torch.nan).to(device), torch.randint(0, columns, (rows,), generator=g).to(device)
    taken = torch.full((rows,), torch.nan).to(device)
    stream = torch.cuda.current_stream().cuda_stream if device.type == "cuda" else 0
    ops.exp2_rowsum_cuda(tile, offset, sums, target_col=target, target_exp=taken, stream=stream)
    truth = logits.double().exp()
    close("row sums", sums, truth.sum(1) - truth.gather(1, target.cpu()[:, None])[:, 0])
    close("exponentials", tile, truth)


def hopper(case: Case, tile: str, store: bool) -> None:
    """The Hopper GEMM, and finish."""
    (count, vocab), ops = case.product.shape, case.ops
    z_y, offset, _ = case.rows()
    units = torch.cuda.get_device_properties(case.hidden.device).multi_processor_count
    plan = ops.exp2_gemm_sm90_plan(count, vocab, multiprocessors=units, tile=tile)
    partial_sums = case.empty(plan["tiles"], plan["padded_rows"])
    e = case.empty(count, -(-vocab // 16) * 16, dtype=torch.bfloat16)[:, :vocab] if store else None
    options = {"bias": case.bias, "softcap": case.softcap, "tile": tile, "stream": case.stream}
    vectors = {"target": case.target, "offset": offset, "partial": partial_sums}
    ops.exp2_gemm_sm90_(case.hidden, case.weight, e, **vectors, **options)
    rest, logp = case.empty(count), case.empty(count)
    ops.finish_cuda(partial_sums[:, :count], z_y, offset, rest, logp, stream=case.stream)
    close("logp", logp, case.truth)
    assert e is None or e.float().isfinite().all(), "exponentials that no block wrote"


def preference(ops: Any, made: reference.Objective, logp: Tensor) -> None:
    """preference_cuda, by the engine's own call of it."""
    from mmrlhf.ops import _compiled

    sizes = 3 * (made.cu_seqlens.numel() - 1) + 2 * made.pairs.shape[0]
    scratch = torch.full((sizes,), torch.nan, dtype=torch.float64, device=logp.device)
    stream = torch.cuda.current_stream().cuda_stream if logp.is_cuda else 0
    found, coef = _compiled.objective(ops.preference_cuda, made, logp, scratch=scratch, stream=stream)
    truth = made(logp.double().requires_grad_())
    close("loss", found.loss, truth.loss.detach().cpu())
    assert coef.isfinite().all(), "coefficients that no thread wrote"


def checks(ops: Any, device: torch.device, *, hopper_built: bool = False) -> Iterator[tuple[str, Check]]:
    """Name and check of every kernel, the cheap ones first."""
    from benchmarks.gpu_small import objective

    for responses in (2, 64):
        yield f"preference_cuda R={responses}", partial(preference, ops, *objective(responses, device))
    for rows, columns in ((3, 1), (33, 1003)):
        yield f"exp2_rowsum_cuda [{rows}, {columns}]", partial(rowsum, ops, rows, columns, device)
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for bias, softcap in ((False, 0.0), (True, 30.0)):
                words = f"{str(dtype).removeprefix('torch.')}{' bias softcap' if bias else ''} {list(shape)}"
                near = Case.make(ops, shape, device, dtype, bias=bias, softcap=softcap)
                far = Case.make(ops, shape, device, dtype, bias=bias, softcap=4 * softcap, far=True)
                yield f"exp2_epilogue_cuda {words}", partial(epilogue, near, True)
                yield f"exp2_epilogue_cuda sums alone {words}", partial(epilogue, near, False)
                yield f"token_statistics_cuda {words}", partial(statistics, near)
                yield f"redo_cuda {words}", partial(redo, far, False)
                yield f"redo_cuda by row {words}", partial(redo, far, True)
                if hopper_built and dtype == torch.bfloat16:
                    for tile in ("128x256", "64x256"):
                        for store in (True, False):
                            label = f"exp2_gemm_sm90 {tile}{'' if store else ' sums alone'} {words}"
                            yield label, partial(hopper, near, tile, store)
