"""Who runs in `gpu_ops`: this library by backend and launch configuration, and the peers that are installed.

A contestant is a name and a step: it runs the case once on a `Problem`, leaves gradients in .grad, and returns logp [N]
(None where a peer does not give it). Peers are called through their public names and never copied; one that is not
installed, or does not take the case, is left out with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_measure import BETA, Problem, Step, pair_loss, scores_of
from benchmarks.peers import cce, liger, trl
from mmrlhf.ops import fused_preference_loss, linear_logp
from mmrlhf.ops.backend import choose

OPS = ("linear_logp", "fused_preference_loss")
LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, H], weight [V, H], targets [N] -> [N]
MODES = ("forward", "frozen", "trained")  # no gradients; of hidden; of hidden and weight


@dataclass(frozen=True)
class Case:
    op: str
    head: str
    rows: int  # scored rows
    mode: str
    padded: int = 0  # prefix rows a response, which only a peer that cannot leave them out computes
    pairs: int = 4
    liger: bool = False  # with Liger's loss, which compiles for up to a minute a shape

    @property
    def name(self) -> str:
        tail = f" prefix {self.padded}" if self.padded else ""
        return f"{self.op} {self.mode} {self.head} N={self.rows}{tail}{' and Liger' if self.liger else ''}"

    @property
    def floor(self) -> int:
        """Units of U that the case takes at least."""
        return {"forward": 1, "frozen": 2, "trained": 3}[self.mode]


@dataclass
class Contestant:
    name: str
    step: Step
    ours: bool = True


@contextlib.contextmanager
def launched_with(config: object | None) -> Iterator[None]:
    """Make `configs.pick` return `config` for every problem without statistics; None: leave it alone."""
    if config is None:
        yield
        return
    from mmrlhf.kernels.triton import configs

    picked = configs.pick
    configs.pick = lambda problem: picked(problem) if problem.statistics else config  # type: ignore[assignment]
    try:
        yield
    finally:
        configs.pick = picked


def launch_configs(problem: Problem) -> dict[str, object]:
    """Every way to E on this device by name: the picked row, the library GEMM's epilogue, other rows, candidates."""
    from mmrlhf.kernels.triton import configs, launch

    shape = launch.problem(problem.hidden.detach(), problem.weight.detach())
    found: dict[str, object] = {"triton": None, "triton epilogue": configs.pick_epilogue(shape)}
    if shape.dtype not in configs.HALF:
        return found
    picked = configs.pick(shape)
    for rule in (*configs.GEMM_RULES, *configs.CANDIDATES):
        if configs.fits(rule, shape) and rule.config != picked:
            found["triton " + describe(rule.config)] = rule.config
    return found


def describe(config: object) -> str:
    """block_m x block_v x block_h, warps, stages, and what is special."""
    from mmrlhf.kernels.triton.configs import GemmConfig

    if not isinstance(config, GemmConfig):
        return "epilogue"
    text = f"{config.block_m}x{config.block_v}x{config.block_h} w{config.num_warps} s{config.num_stages} {config.loads}"
    return text + (f" split{config.split}" if config.split > 1 else "") + (" ws" if config.warp_specialize else "")


def mine(case: Case, problem: Problem, backend: str, config: object | None = None, budget: int | None = None) -> Step:
    """The case by this library."""

    def step() -> Tensor:
        problem.trained(case.mode == "trained")
        hidden, weight = problem.hidden, problem.weight
        with launched_with(config):
            if case.op == "linear_logp":
                if case.mode == "forward":
                    with torch.no_grad():
                        return linear_logp(hidden, weight, problem.targets, backend=backend)
                logp = linear_logp(hidden, weight, problem.targets, backend=backend, memory_budget=budget)
                logp.backward(problem.upstream_now)
                return logp
            out = fused_preference_loss(
                hidden,
                weight,
                problem.targets,
                problem.cu_seqlens,
                problem.pairs,
                token_weight=problem.token_weight_now,
                reference_scores=torch.zeros(problem.cu_seqlens.numel() - 1, device=hidden.device),
                beta=BETA,
                memory_budget=budget,
                backend=backend,
            )
            out.loss.backward()
            return out.logp

    return step


def refused(case: Case, problem: Problem, backend: str) -> str | None:
    """Why this build's `backend` does not take the case; None if it does."""
    try:
        choose(case.op, problem.hidden, problem.weight, requested=backend)
    except RuntimeError as error:
        return str(error)
    return None


def composed(case: Case, problem: Problem, logp_of: LogpOf) -> Step:
    """The case by a peer's log-probabilities; the loss over them is a few small PyTorch ops."""

    def step() -> Tensor:
        problem.trained(case.mode == "trained")
        if case.mode == "forward":
            with torch.no_grad():
                return logp_of(problem.hidden, problem.weight, problem.targets)
        logp = logp_of(problem.hidden, problem.weight, problem.targets)
        if case.op == "linear_logp":
            logp.backward(problem.upstream_now.to(logp.dtype))
        else:
            weights = problem.token_weight_now
            weighed = logp.float() if weights is None else logp.float() * weights
            pair_loss(scores_of(weighed, problem.cu_seqlens), problem.pairs).backward()
        return logp

    return step


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch alone, [N, V] in memory."""
    table = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
    return table.gather(1, targets[:, None])[:, 0]


def cce_logp(implementation: str) -> LogpOf:
    def logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(hidden, weight, targets, reduction="none", impl=implementation)

    return logp


def liger_dpo(case: Case, problem: Problem) -> Step:
    """Liger's fused DPO loss, without its reference model; it also computes the rows of each prefix."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    responses, length = 2 * case.pairs, case.rows // (2 * case.pairs)
    order = torch.cat([problem.pairs[:, 0], problem.pairs[:, 1]])
    prefix = torch.zeros(responses, case.padded, problem.hidden.shape[1], device=problem.hidden.device)
    prefix = prefix.normal_().to(problem.hidden.dtype)

    def step() -> None:
        problem.trained(case.mode == "trained")
        rows = problem.hidden.view(responses, length, -1)[order]
        targets = problem.targets
        if problem.gating:
            targets = torch.where(problem.mask > 0, targets, -100)
        padded = torch.nn.functional.pad(targets.view(responses, length)[order], (case.padded, 0), value=-100)
        loss(problem.weight, torch.cat([prefix, rows], 1), padded)[0].backward()

    return step


def contestants(case: Case, problem: Problem, *, race: bool) -> tuple[list[Contestant], dict[str, str]]:
    """Everybody who runs `case`, ours first, and who is left out, with the reason."""
    found, absent = [], {}
    cuda = problem.hidden.device.type == "cuda"
    if cuda:
        ways = launch_configs(problem)
        for name in ways if race else ("triton", "triton epilogue"):
            found.append(Contestant(name, mine(case, problem, "triton", ways[name])))
        why = refused(case, problem, "cuda")
        if why:
            absent["cuda"] = why
        else:
            found.append(Contestant("cuda", mine(case, problem, "cuda")))
    if race or not cuda:
        found.append(Contestant("torch", mine(case, problem, "torch")))
    if race and cuda and case.mode == "trained":
        found.append(Contestant("triton budget 8 GiB", mine(case, problem, "triton", budget=8 << 30)))
        found.append(Contestant("triton budget 0", mine(case, problem, "triton", budget=0)))
    peers: list[tuple[str, str | None, LogpOf]] = [("trl", trl.missing(), trl.chunked_logp)]
    no_cce = cce.missing() or (None if cuda else "needs CUDA")
    peers += [(f"{kind} (cut-cross-entropy)", no_cce, cce_logp(kind)) for kind in ("cce_exact", "cce")]
    for name, why, logp_of in peers:
        if why:
            absent[name] = why
        else:
            found.append(Contestant(name, composed(case, problem, logp_of), ours=False))
    found.append(Contestant("pytorch", composed(case, problem, full_logits), ours=False))
    if case.liger:
        why = liger.missing()
        if why:
            absent["liger dpo"] = why
        elif not cuda or case.rows % (2 * case.pairs):
            absent["liger dpo"] = "needs CUDA, and responses of one length"
        else:
            found.append(Contestant("liger dpo", liger_dpo(case, problem), ours=False))
    return found, absent
