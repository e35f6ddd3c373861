"""Every launcher once or twice on tiny awkward shapes, for a memory or race checker to watch.

    PYTHONPATH=tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python -m benchmarks.gpu_sanitize

Run it bare first: that compiles, and holds every result against float64 (within 1e-3; the gate proper is in tests/).
Each buffer is NaN before the launch, so what a kernel leaves out shows without a checker too. Library GEMMs are left
out: inputs that need one are multiplied on the CPU. With TRITON_INTERPRET=1 it runs without a GPU, in float32.
"""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import sanitize_cuda
from benchmarks.gpu_contestants import describe
from benchmarks.gpu_small import objective
from mmrlhf.kernels.triton import configs, launch, launch_preference, launch_redo
from mmrlhf.kernels.triton.configs import GemmConfig
from mmrlhf.ops._gemm import padded
from numerics import plain_logp

# Rows, H, V: less than a tile and ragged; one more than a tile of rows, and V one more than a multiple of the tiles.
SHAPES = ((5, 80, 1003), (130, 128, 513))
LIMIT = 1e-3  # nats
Check = Callable[[], None]


@dataclass
class Tiny:
    """A head problem on the device, with the products and log-probabilities of the CPU in float64."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    target: Tensor  # [N]
    product: Tensor  # [N, V] float32, <h, W_v>
    epilogue: launch.Epilogue
    truth: Tensor  # [N] float64, on the CPU

    @classmethod
    def make(cls, shape: tuple[int, int, int], device: torch.device, *, bias: bool, softcap: float | None) -> Tiny:
        rows, width, vocab = shape
        g = torch.Generator().manual_seed(rows)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        hidden = torch.randn(rows, width, generator=g).to(dtype)
        weight = (torch.randn(vocab, width, generator=g) * (2 / width**0.5)).to(dtype)
        shift = torch.randn(vocab, generator=g).to(dtype) if bias else None
        target = torch.randint(0, vocab, (rows,), generator=g)
        target[0], target[-1] = 0, vocab - 1
        double = None if shift is None else shift.double()
        truth = plain_logp(hidden.double(), weight.double(), target, bias=double, softcap=softcap)
        return cls(
            hidden.to(device),
            weight.to(device),
            None if shift is None else shift.to(device),
            target.to(device),
            (hidden.float() @ weight.float().T).to(device),
            launch.Epilogue(softcap=softcap),
            truth,
        )

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """NaN in every entry."""
        return torch.full(shape, torch.nan, dtype=dtype, device=self.hidden.device)


def chain(tiny: Tiny, config: object, *, statistics: bool, keep: bool) -> None:
    """target_logit, E by `config`, finish, unit_gradient; AssertionError where logp or E are off."""
    rows, vocab = tiny.product.shape
    z_y, offset, rest, logp = (tiny.empty(rows) for _ in range(4))
    slope = tiny.empty(rows) if tiny.epilogue.softcap is not None else None
    common = {"target": tiny.target, "offset": offset, "bias": tiny.bias, "epilogue": tiny.epilogue}
    launch.target_logit(
        tiny.hidden,
        tiny.weight,
        tiny.target,
        bias=tiny.bias,
        epilogue=tiny.epilogue,
        z_y=z_y,
        slope_y=slope,
        offset=offset,
    )
    assert isinstance(config, (GemmConfig, configs.EpilogueConfig))
    partial = tiny.empty(launch.STATISTICS if statistics else 1, launch.partial_tiles(vocab, config), rows)
    dtype = torch.bfloat16 if tiny.hidden.dtype == torch.bfloat16 else torch.float32
    e = tiny.empty(rows, padded(vocab), dtype=dtype)[:, :vocab] if keep else None
    if isinstance(config, GemmConfig):
        launch.exp2_gemm(tiny.hidden, tiny.weight, e, **common, partial=partial, config=config)
    else:
        launch.exp2_epilogue(tiny.product, e, start=0, **common, partial=partial, config=config)
    found = launch.Statistics.empty(rows, tiny.hidden.device) if statistics else None
    launch.finish(partial, z_y=z_y, offset=offset, vocab=vocab, rest=rest, logp=logp, statistics=found)
    error = (logp.cpu().double() - tiny.truth).abs().max().item()
    assert error < LIMIT, f"logp is {error:.1e} nats off"
    if e is None:
        return
    kept = e.cpu().double()
    assert kept.isfinite().all(), "exponentials that no program wrote"
    assert (kept.gather(1, tiny.target.cpu()[:, None]) == 0).all(), "the target's exponential is not 0"
    unit = (kept @ tiny.weight.cpu().double()).float().to(tiny.hidden.device)
    out = tiny.empty(*unit.shape)
    launch.unit_gradient_(
        unit, tiny.weight, tiny.target, z_y=z_y, offset=offset, rest=rest, slope_y=slope, logit_scale=1.0, out=out
    )
    assert out.cpu().isfinite().all(), "unit_gradient left entries unwritten"


def variants(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Every configuration that fits the plain problem, and the picked one for each heavier epilogue."""
    for shape in SHAPES:
        for bias, softcap, statistics in (
            (False, None, False),
            (True, None, False),
            (True, 30.0, False),
            (True, 30.0, True),
        ):
            tiny = Tiny.make(shape, device, bias=bias, softcap=softcap)
            name = "+".join(["bias"] * bias + ["softcap"] * (softcap is not None) + ["statistics"] * statistics)
            for config in every(tiny, heavier=bool(name), statistics=statistics):
                keep = not statistics
                label = f"{describe(config)} {name} {list(shape)}".replace("  ", " ")
                yield f"exp2 {label}", partial(chain, tiny, config, statistics=statistics, keep=keep)


def every(tiny: Tiny, *, heavier: bool, statistics: bool) -> list[object]:
    shape = launch.problem(
        tiny.hidden, tiny.weight, bias=tiny.bias, softcap=tiny.epilogue.softcap, statistics=statistics
    )
    found: list[object] = [configs.pick_epilogue(shape)]
    if tiny.hidden.device.type != "cuda":
        return [*found, GemmConfig(4, 1, 16, 64, 16)]
    rules = [rule for rule in (*configs.GEMM_RULES, *configs.CANDIDATES) if configs.fits(rule, shape)]
    return found + [rule.config for rule in (rules[:1] if heavier else rules)]


def preference_check(responses: int, device: torch.device) -> None:
    made, logp = objective(responses, device)
    out = launch_preference.Buffers.empty(responses, made.pairs.shape[0], logp.numel(), device)
    for buffer in (out.scores, out.rewards, out.d_score, out.losses, out.coef, out.loss, out.scratch):
        buffer.fill_(torch.nan)
    launch_preference.preference(
        logp,
        made.cu_seqlens,
        made.pairs,
        token_weight=made.token_weight,
        reference_scores=made.reference_scores,
        terms=launch_preference.Terms(beta=0.1, sft_weight=0.25),
        out=out,
    )
    doubles = {name: getattr(made, name).cpu() for name in ("cu_seqlens", "pairs", "token_weight", "reference_scores")}
    truth = type(made)(**doubles, reduction="sum", beta=0.1, kind="sigmoid", sft_weight=0.25)(logp.cpu().double())
    assert math.isclose(float(out.loss), float(truth.loss), rel_tol=1e-5), f"{float(out.loss)} != {float(truth.loss)}"
    assert out.coef.cpu().isfinite().all(), "coefficients that no program wrote"


def redo_check(shape: tuple[int, int, int], device: torch.device, by_row: bool) -> None:
    """The kernels that run rows again, of all rows and of a part of them, in the place of an ordinary pass."""
    tiny = Tiny.make(shape, device, bias=True, softcap=30.0)
    rows, vocab = tiny.product.shape
    dtype = torch.bfloat16 if tiny.hidden.dtype == torch.bfloat16 else torch.float32
    z_y, offset, slope = tiny.empty(rows), tiny.empty(rows), tiny.empty(rows)
    options = {"bias": tiny.bias, "epilogue": tiny.epilogue}
    launch.target_logit(tiny.hidden, tiny.weight, tiny.target, **options, z_y=z_y, slope_y=slope, offset=offset)
    rest, logp = tiny.empty(rows), tiny.empty(rows)
    chosen = launch_redo.select(rest, z_y=z_y, offset=offset)  # a NaN is chosen
    assert int(chosen.count) == rows, f"{int(chosen.count)} of {rows} rows chosen"
    unit, vectors = tiny.empty(*tiny.hidden.shape), {"z_y": z_y, "offset": offset, "rest": rest}
    options["target"] = tiny.target
    half = -(-rows // 2)
    for first in range(0, rows, half):
        part = chosen.part(first, half)
        launch_redo.maximum_(tiny.hidden, tiny.weight, part, offset=offset, **options)
        found = launch.Statistics.empty(rows, device) if first else None
        partial_sums = launch_redo.partial_sums(part, tiny.weight, statistics=found is not None)
        e = tiny.empty(rows if by_row else part.capacity, padded(vocab), dtype=dtype)[:, :vocab]
        words = {"offset": offset, "partial": partial_sums, "by_row": by_row, **options}
        launch_redo.exponentials(tiny.hidden, tiny.weight, e, part, **words)
        launch_redo.finish(partial_sums, part, vocab=vocab, logp=logp, statistics=found, **vectors)
        words = {"target": tiny.target, "slope_y": slope, "logit_scale": 1.0, "by_row": by_row, **vectors}
        launch_redo.unit_gradient_(unit, e, tiny.weight, part, **words)
    error = (logp.cpu().double() - tiny.truth).abs().max().item()
    assert error < LIMIT, f"logp is {error:.1e} nats off"
    assert unit.cpu().isfinite().all(), "redo's unit_gradient_ left entries unwritten"
    again = launch_redo.select(rest, z_y=z_y, offset=offset, done=True)
    assert int(again.count) == int((offset.cpu() - z_y.cpu() * launch.LOG2E > 32).sum()), "the rows that were done"


def checks(device: torch.device) -> Iterator[tuple[str, Check]]:
    """Name and check, the cheap ones first."""
    for responses in (2, 64):
        yield f"preference R={responses}", partial(preference_check, responses, device)
    for shape in SHAPES:
        for by_row in (False, True):
            yield f"redo {'by row' if by_row else 'by place'} {list(shape)}", partial(redo_check, shape, device, by_row)
    if device.type == "cuda" and extension():
        from mmrlhf import _C

        built = _C.build_info()["exp2_gemm"] and torch.cuda.get_device_capability() == (9, 0)
        yield from sanitize_cuda.checks(_C, device, hopper_built=bool(built))
    yield from variants(device)


def extension() -> bool:
    try:
        from mmrlhf import _C
    except ImportError:
        return False
    return bool(_C.build_info()["cuda"])


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names that hold this text")
    chosen = parser.parse_args(words)
    if not torch.cuda.is_available() and not launch.interpreted():
        print("no CUDA device")
        return 2
    device = torch.device("cpu" if launch.interpreted() else "cuda")
    failed = count = 0
    for name, run in checks(device):
        if chosen.only not in name:
            continue
        count += 1
        try:
            run()
            print(f"ok {name}", flush=True)
        except Exception as error:  # the rest still has to run, and the status says that one failed
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
    if device.type == "cuda":
        torch.cuda.synchronize()
    if device.type == "cuda" and not extension():
        print("left out: the CUDA C++ kernels, the extension is not built with CUDA")
    print(f"{count} launches checked, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
