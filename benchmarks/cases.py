"""What is measured: heads of known models, the three tasks put to them, and the float64 truth of each.

A case is a task on a head with N rows, in a dtype, with the head's weight frozen or trained, or for the values alone.
Truth needs one float64 pass over the vocabulary, a block at a time: all values, the gradient of 64 rows of hidden and
of 64 rows of the weight. Hidden rows and weights are random; the logits' standard deviation is 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
SAMPLED = 64
BLOCK = 4096  # columns of float64 logits at a time


@dataclass(frozen=True)
class HeadShape:
    model: str
    hidden: int
    vocab: int


HEADS = {
    "tiny": HeadShape("none: for seconds", 256, 16_000),
    "qwen2-0.5b": HeadShape("Qwen2-0.5B, LLaVA-OneVision-0.5B", 896, 151_936),
    "llava-1.5-7b": HeadShape("LLaVA-1.5-7B", 4096, 32_064),
    "qwen2-7b": HeadShape("Qwen2-7B, Qwen2-VL-7B", 3584, 152_064),
    "llama-3-8b": HeadShape("Llama-3-8B", 4096, 128_256),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TASKS = {
    "linear_logp": "log-probability of every row, any upstream gradient",
    "fused_preference_loss": "DPO over pairs of neighbouring responses, beta 0.1; scores compared",
    "mean_nll": "mean negative log-probability, one scalar",
}
GRID_ROWS = (256, 512, 1024, 2048, 4096, 8192, 16384)
GRADS = ("none", "frozen", "trained")  # what asks for gradients: nothing, hidden alone, hidden and weight


@dataclass(frozen=True)
class Case:
    task: str
    head: str
    rows: int
    dtype: str
    grads: str

    @property
    def name(self) -> str:
        return f"{self.task}/{self.head}/{self.rows}/{self.dtype}/{self.grads}"


def small_cases() -> list[Case]:
    some = [Case("linear_logp", "tiny", 256, dtype, grads) for dtype in DTYPES for grads in GRADS]
    some += [Case("fused_preference_loss", "tiny", 256, dtype, grads) for dtype in DTYPES for grads in GRADS[1:]]
    return [*some, Case("mean_nll", "tiny", 256, "float32", "trained")]


def full_cases() -> list[Case]:
    rows = {"qwen2-0.5b": 512, "llava-1.5-7b": 512, "qwen2-7b": 256, "llama-3-8b": 256}  # U is 0.1 to 0.3 Tflop
    found = [
        Case(task, head, rows[head], dtype, grads)
        for head in rows
        for task in ("linear_logp", "fused_preference_loss")
        for dtype in DTYPES
        for grads in GRADS[1:]
    ]
    found += [Case("linear_logp", "qwen2-0.5b", rows, "float32", "frozen") for rows in (64, 2048)]
    found += [Case("linear_logp", "qwen2-0.5b", rows, "float32", "none") for rows in (512, 2048)]
    found += [Case("fused_preference_loss", "qwen2-0.5b", 2048, "float32", grads) for grads in GRADS[1:]]
    return found + [Case("mean_nll", "qwen2-0.5b", 512, "float32", grads) for grads in GRADS[1:]]


def grid_cases() -> list[Case]:
    """Every known head at every number of rows: for `--case`, which takes some of them, and for the curves over N."""
    heads = [head for head in HEADS if head != "tiny"]
    asked = [("linear_logp", GRADS), ("fused_preference_loss", GRADS[1:]), ("mean_nll", GRADS[1:])]
    return [
        Case(task, head, rows, dtype, grads)
        for head in heads
        for task, modes in asked
        for dtype in DTYPES
        for grads in modes
        for rows in GRID_ROWS
    ]


@dataclass
class Problem:
    case: Case
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    upstream: Tensor  # [N] float32, of linear_logp
    responses: int  # of equal length, an even number; pairs are (0, 1), (2, 3) ...
    rows: Tensor  # [64] rows of hidden whose gradient is checked
    columns: Tensor  # [64] rows of the weight whose gradient is checked

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Problem:
        head, n = HEADS[case.head], case.rows
        if n % 32:
            raise ValueError(f"rows must be a multiple of 32 (responses of equal length), got {n}")
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, head.hidden, generator=g)
        weight = torch.randn(head.vocab, head.hidden, generator=g).mul_(2.0 / head.hidden**0.5)
        targets = torch.randint(0, head.vocab, (n,), generator=g)
        few = SAMPLED // 2
        columns = torch.cat([targets[:few], torch.randint(0, head.vocab, (few,), generator=g)])
        dtype = DTYPES[case.dtype]
        return cls(
            case,
            hidden.to(device, dtype),
            weight.to(device, dtype),
            targets.to(device),
            torch.randn(n, generator=g).to(device),
            responses=n // 32 * 2,
            rows=torch.linspace(0, n - 1, SAMPLED).long().to(device),
            columns=columns.to(device),
        )

    @property
    def cu_seqlens(self) -> Tensor:
        step = self.hidden.shape[0] // self.responses
        return torch.arange(self.responses + 1, device=self.hidden.device) * step

    @property
    def pairs(self) -> Tensor:
        return torch.arange(self.responses, device=self.hidden.device).view(-1, 2)

    def finish(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """From logp [N] to (the values that are compared, the scalar that is differentiated), in logp's dtype."""
        if self.case.task == "linear_logp":
            return logp, (logp * self.upstream.to(logp.dtype)).sum()
        if self.case.task == "mean_nll":
            return -logp.mean(), -logp.mean()
        scores = logp.view(self.responses, -1).sum(1)
        return scores, -F.logsigmoid(BETA * (scores[0::2] - scores[1::2])).mean()


@dataclass(frozen=True)
class Outcome:
    """What a side gives and what truth is: values, and of the gradients the sampled rows; None where not asked."""

    values: Tensor
    hidden_grad: Tensor | None = None  # [64, H]
    weight_grad: Tensor | None = None  # [64, H]

    def named(self):
        return {"values": self.values, "grad of hidden": self.hidden_grad, "grad of weight": self.weight_grad}


def truth(problem: Problem) -> Outcome:
    hidden, targets = problem.hidden.double(), problem.targets
    vocab, own = problem.weight.shape[0], problem.weight[targets].double()
    z_y = (hidden * own).sum(1)
    total = torch.full_like(z_y, -torch.inf)
    for start in range(0, vocab, BLOCK):
        block = hidden @ problem.weight[start : start + BLOCK].double().T
        total = torch.logaddexp(total, block.logsumexp(1))
    logp = (z_y - total).requires_grad_()
    values, loss = problem.finish(logp)
    if problem.case.grads == "none":
        return Outcome(values.detach())
    (coef,) = torch.autograd.grad(loss, logp)
    some = problem.rows
    grad = own[some]
    for start in range(0, vocab, BLOCK):
        block = problem.weight[start : start + BLOCK].double()
        grad -= (hidden[some] @ block.T - total[some, None]).exp() @ block
    grad *= coef[some, None]
    if problem.case.grads == "frozen":
        return Outcome(values.detach(), grad)
    p = (hidden @ problem.weight[problem.columns].double().T - total[:, None]).exp()
    slope = ((targets[:, None] == problem.columns).double() - p) * coef[:, None]
    return Outcome(values.detach(), grad, slope.T @ hidden)
