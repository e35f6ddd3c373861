"""How the GPU benchmarks time, and what they hold a result against before they do.

Timing: CUDA events around each call, the L2 cache overwritten before it, the contestants one after another in every
round and the order turned by one from round to round, medians over the rounds. So drifts of the clock meet everybody.

The gate: token weights (or upstream gradients) are 1 on up to 128 rows spread over all N and 0 elsewhere, so that
float64 truth is cheap at any size and still covers values, dX, and dW of 64 tokens; `numerics.assert_no_worse` judges
(so tests/ has to be on sys.path). On a CPU everything runs with a wall clock: for tests, not for figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from numerics import assert_no_worse

BETA = 0.1
PEER_FACTOR = 10.0  # a peer only has to compute the same function; ours may be 2 times as far off as PyTorch
Step = Callable[[], Any]


@dataclass(frozen=True)
class HeadShape:
    width: int  # H
    vocab: int  # V


HEADS = {
    "qwen2-7b": HeadShape(3584, 152064),
    "llama-3-8b": HeadShape(4096, 128256),
    "qwen2-0.5b": HeadShape(896, 151936),
    "llava-1.5-7b": HeadShape(4096, 32064),
    "tiny": HeadShape(64, 1003),  # for tests
}


class Clock:
    """Times one call at a time; `flush` bytes are written before each, which on CUDA is twice the L2 cache."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 0
        self.flush = torch.empty(max(size, 1), dtype=torch.int8, device=device)

    def start(self, step: Step) -> Callable[[], float]:
        """Run `step`; the result waits for it and gives milliseconds."""
        if not self.cuda:
            begin = time.perf_counter()
            step()
            spent = time.perf_counter() - begin
            return lambda: spent * 1e3
        self.flush.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        step()
        after.record()

        def wait() -> float:
            after.synchronize()
            return before.elapsed_time(after)

        return wait


def interleaved(
    steps: Mapping[str, Step], clock: Clock, *, seconds: float, least: int = 5, most: int = 25
) -> dict[str, list[float]]:
    """Milliseconds of every call, by contestant; rounds until `seconds` are over, at least `least`, at most `most`.

    One round that is not counted warms up. Every contestant has the same number of times.
    """
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        clock.start(steps[name])()
    begin = time.monotonic()
    for number in range(most):
        if number >= least and time.monotonic() - begin > seconds:
            break
        turn = number % max(len(names), 1)
        waits = [(name, clock.start(steps[name])) for name in names[turn:] + names[:turn]]
        for name, wait in waits:
            times[name].append(wait())
    return times


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> float:
    """Half the distance of the quartiles, relative to the median: a difference below it is noise."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def peak_bytes(step: Step, device: torch.device) -> int | None:
    """Most memory that `step` holds beyond what was there; None without CUDA."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass
class Problem:
    """Scored rows of pairs of equally long responses (2i better, 2i + 1 worse), and a head, in bfloat16 on CUDA.

    `gating` switches the upstream gradients and token weights to the sampled rows alone.
    """

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    upstream: Tensor  # [N]
    cu_seqlens: Tensor  # [R + 1]
    pairs: Tensor  # [P, 2]
    sample: Tensor  # [n] rows of the gate
    columns: Tensor  # [64] tokens whose rows of dW are checked
    gating: bool = False
    mask: Tensor = field(init=False)  # [N]

    def __post_init__(self) -> None:
        self.mask = torch.zeros_like(self.upstream).index_fill_(0, self.sample, 1.0)

    @classmethod
    def random(cls, shape: HeadShape, rows: int, *, device: torch.device, pairs: int = 4, seed: int = 0) -> Problem:
        """Logits with a standard deviation of 2, as a trained model's are at most; `rows` split over 2 * pairs."""
        if rows < 2 * pairs:
            raise ValueError(f"rows must be at least 2 a pair ({2 * pairs}), got {rows}")
        g = torch.Generator(device).manual_seed(seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        hidden = torch.randn(rows, shape.width, generator=g, device=device, dtype=torch.float32).to(dtype)
        weight = torch.randn(shape.vocab, shape.width, generator=g, device=device, dtype=dtype)
        weight *= 2.0 / shape.width**0.5
        targets = torch.randint(0, shape.vocab, (rows,), generator=g, device=device)
        ends = torch.arange(2 * pairs + 1, device=device) * rows // (2 * pairs)
        sample = torch.linspace(0, rows - 1, min(rows, 128)).round().long().to(device)
        some = torch.randint(0, shape.vocab, (32,), generator=g, device=device)
        return cls(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            torch.randn(rows, generator=g, device=device),
            ends,
            torch.arange(2 * pairs, device=device).view(pairs, 2),
            sample,
            torch.cat([targets[sample[:32]], some]),
        )

    @property
    def upstream_now(self) -> Tensor:
        return self.upstream * self.mask if self.gating else self.upstream

    @property
    def token_weight_now(self) -> Tensor | None:
        return self.mask if self.gating else None

    def trained(self, head: bool) -> Problem:
        """Ask for gradients of the weight, or not, and forget the last ones."""
        self.weight.requires_grad_(head)
        self.hidden.grad = self.weight.grad = None
        return self


def pair_loss(scores: Tensor, pairs: Tensor) -> Tensor:
    """The plain DPO loss of scores [R] with reference scores of 0."""
    return -F.logsigmoid(BETA * (scores[pairs[:, 0]] - scores[pairs[:, 1]])).mean()


def scores_of(logp: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of logp [N] a response, without waiting for the device. [R]"""
    whole = F.pad(logp.cumsum(0), (1, 0))
    return whole[cu_seqlens[1:]] - whole[cu_seqlens[:-1]]


@dataclass
class Truth:
    """Of the sampled rows: logp [n], dX [n, H], and dW of the columns [64, H]; exact, and by PyTorch's own path."""

    logp: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor

    @classmethod
    def exact(cls, problem: Problem, *, fused: bool) -> Truth:
        """In float64, the vocabulary a block at a time."""
        hidden, targets = problem.hidden.detach()[problem.sample].double(), problem.targets[problem.sample]
        weight = problem.weight.detach()
        z_y = (hidden * weight[targets].double()).sum(1)
        total = torch.zeros_like(z_y)
        for _, block in _blocks(weight):
            total += torch.exp(hidden @ block.T - z_y[:, None]).sum(1)
        logp = -total.log()
        upstream = _upstream(problem, logp, fused=fused)
        product = torch.zeros_like(hidden)
        for _, block in _blocks(weight):
            product += (torch.exp(hidden @ block.T - z_y[:, None]) / total[:, None]) @ block
        grad_hidden = upstream[:, None] * (weight[targets].double() - product)
        p = torch.exp(hidden @ weight[problem.columns].double().T - z_y[:, None]) / total[:, None]
        onehot = (targets[:, None] == problem.columns[None, :]).double()
        return cls(logp, grad_hidden, ((onehot - p) * upstream[:, None]).T @ hidden)

    @classmethod
    def plain(cls, problem: Problem, *, fused: bool) -> Truth:
        """PyTorch's own path in the dtype of the inputs: linear, log_softmax in float32, autograd."""
        hidden = problem.hidden.detach()[problem.sample].requires_grad_()
        weight = problem.weight.detach().requires_grad_()
        table = F.linear(hidden, weight).float().log_softmax(-1)
        logp = table.gather(1, problem.targets[problem.sample][:, None])[:, 0]
        upstream = _upstream(problem, logp.detach(), fused=fused)
        by_hidden, by_weight = torch.autograd.grad(logp, (hidden, weight), upstream)
        return cls(logp.detach(), by_hidden, by_weight[problem.columns])


def _blocks(weight: Tensor, size: int = 16384) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, weight.shape[0], size):
        yield start, weight[start : start + size].double()


def _upstream(problem: Problem, logp: Tensor, *, fused: bool) -> Tensor:
    """d loss / d logp of the sampled rows, in the dtype of `logp` [n]."""
    if not fused:
        return problem.upstream[problem.sample].to(logp.dtype)
    leaf = logp.clone().requires_grad_()
    whole = torch.zeros(problem.targets.shape, dtype=logp.dtype, device=logp.device)
    loss = pair_loss(scores_of(whole.index_put((problem.sample,), leaf), problem.cu_seqlens), problem.pairs)
    return torch.autograd.grad(loss, leaf)[0]


@dataclass
class Verdict:
    passed: bool
    reason: str  # the gate's message where it is not passed
    rms_logp: float | None  # nats a token
    grad_hidden: float | None  # relative, in the Frobenius norm
    grad_weight: float | None


def gate(
    problem: Problem, step: Step, truth: Truth, plain: Truth, *, backward: bool, head: bool, ours: bool
) -> Verdict:
    """Run `step` (-> logp [N] or None) on the sampled rows' gradients and judge what it left in .grad."""
    problem.gating = True
    try:
        logp = step()
    finally:
        problem.gating = False
    pairs = []
    if logp is not None:
        pairs.append(("logp", logp.detach()[problem.sample].float(), plain.logp, truth.logp))
    if backward and problem.hidden.grad is not None:
        found = problem.hidden.grad[problem.sample]
        pairs.append(("grad of hidden", found, plain.grad_hidden, truth.grad_hidden))
    if head and problem.weight.grad is not None:
        pairs.append(("grad of weight", problem.weight.grad[problem.columns], plain.grad_weight, truth.grad_weight))
    wanted = (logp is not None) + backward + head
    if len(pairs) < max(wanted, 1):
        return Verdict(False, f"only {[name for name, *_ in pairs]} came out", None, None, None)
    errors, reason = {}, ""
    for name, found, baseline, exact in pairs:
        errors[name] = float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))
        try:
            assert_no_worse(found, baseline, exact, factor=2.0 if ours else PEER_FACTOR, name=name)
        except AssertionError as error:
            reason = reason or str(error)
    rms = None
    if logp is not None:
        rms = float((pairs[0][1].double() - truth.logp).square().mean().sqrt())
    return Verdict(not reason, reason, rms, errors.get("grad of hidden"), errors.get("grad of weight"))
