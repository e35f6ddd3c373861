"""token_statistics by the emulated CUDA kernels (emulate.h), against float64."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import reference, token_statistics
from mmrlhf.ops.head import Head
from numerics import HeadProblem, assert_no_worse

pytest.importorskip("mmrlhf._C", reason="the extension is not built")
pytestmark = pytest.mark.slow
STATISTICS = ("entropy", "sum_p2", "mean_logit", "logp")


@pytest.mark.parametrize("shape", [(0, 8, 5), (1, 1, 1), (13, 17, 2500), (7, 16, 1024), (5, 16, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "bias": True}, {"logit_scale": 0.3, "bias": True}], ids=str)
@pytest.mark.parametrize("spread", [2.0, 60.0])
def test_token_statistics(public, shape, options, spread):
    """Flat and peaked rows, the target the likeliest token, the least likely and any, without targets, and a masked
    token; in blocks of whole tiles."""
    problem = HeadProblem.random(*shape, seed=4, spread=spread, **options)
    z = problem.hidden @ problem.weight.T
    problem.targets[: shape[0] // 3] = z.argmax(1)[: shape[0] // 3]
    problem.targets[shape[0] // 3 : shape[0] // 2] = z.argmin(1)[shape[0] // 3 : shape[0] // 2]
    arguments = {"bias": problem.bias, **problem.options}
    if problem.bias is not None and shape[2] > 2 and "softcap" not in options:
        others = torch.ones(shape[2], dtype=torch.bool)
        others[problem.targets] = False
        problem.bias[others.nonzero()[0]] = -torch.inf
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    truth = reference.token_statistics(problem.hidden.double(), problem.weight.double(), problem.targets, **doubles)
    plain = token_statistics(problem.hidden, problem.weight, problem.targets, **arguments, backend="torch")
    found = token_statistics(problem.hidden, problem.weight, problem.targets, **arguments, backend="cuda")
    for name in STATISTICS:
        out, base, true = (getattr(each, name) for each in (found, plain, truth))
        finite = true.isfinite()  # the mean of a masked token's logit is not
        assert torch.equal(out.isfinite(), finite)
        assert_no_worse(out[finite], base[finite], true[finite], name=name)
    if spread < 10 or not options.get("softcap"):  # at the cap two logits are one number of float32
        assert torch.equal(found.is_top1, truth.is_top1)
    alone = token_statistics(problem.hidden, problem.weight, **arguments, backend="cuda")
    assert alone.logp is None
    assert torch.equal(alone.entropy, found.entropy)


def test_statistics_of_a_nonfinite_row_and_of_no_token(public):
    problem = HeadProblem.random(6, 8, 40)
    clean = token_statistics(problem.hidden, problem.weight, problem.targets, backend="cuda")
    problem.hidden[2, 3], problem.hidden[4, 1] = torch.nan, torch.inf
    found = token_statistics(problem.hidden, problem.weight, problem.targets, backend="cuda")
    others = torch.tensor([0, 1, 3, 5])
    for name in STATISTICS:
        assert not getattr(found, name)[[2, 4]].isfinite().any(), name
        assert torch.equal(getattr(found, name)[others], getattr(clean, name)[others])
    masked = torch.full((40,), -torch.inf)
    none = token_statistics(
        problem.hidden[others], problem.weight, problem.targets[others], bias=masked, backend="cuda"
    )
    assert none.entropy.isnan().all()


def test_a_target_that_is_no_token_gives_nan(public, monkeypatch):
    """On a device nobody looks at the targets: the row's logp must not be what its memory held before."""
    from mmrlhf.ops import _cuda_passes

    problem = HeadProblem.random(6, 8, 40)
    problem.targets[2] = 40
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(3))
    found = _cuda_passes.sweep_statistics(Head(problem.weight, None, 1.0, None), problem.hidden, problem.targets)
    assert found.logp().isnan().tolist() == [False, False, True, False, False, False]
    assert not found.is_top1[2]


def test_what_the_sanitizer_runs_is_right_on_the_host(emulated):
    """benchmarks/gpu_sanitize launches these on a device, under memory and race checkers: every kernel of the extension
    but the Hopper GEMM, which has no host code."""
    from benchmarks import sanitize_cuda

    built, run = {name for name in dir(emulated) if name.endswith("_cuda")}, []

    class Watched:
        def __getattr__(self, name):
            run.append(name)
            return getattr(emulated, name)

    for _, check in sanitize_cuda.checks(Watched(), torch.device("cpu")):
        check()
    assert set(run) == built
