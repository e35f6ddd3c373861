"""backend.choose: what was asked for, in which order, and what is said when it cannot run."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import torch

from mmrlhf.ops import (
    backend,
    fused_preference_loss,
    linear_logp,
    reference,
    sequence_score,
    streaming,
    token_statistics,
)
from numerics import HeadProblem


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT, raising=False)
    monkeypatch.setattr(backend, "_logged", set())


def test_automatic_choice_has_a_reason_and_is_logged_once(caplog):
    hidden = torch.zeros(2, 3)
    with caplog.at_level(logging.INFO, logger="mmrlhf.ops"):
        choices = [backend.choose("linear_logp", hidden, hidden) for _ in range(3)]
    assert len(set(choices)) == 1
    assert choices[0].name in backend.available("linear_logp")
    assert choices[0].reason
    assert [r.message for r in caplog.records] == [
        f"linear_logp runs on backend {choices[0].name}: {choices[0].reason}"
    ]


def test_what_is_asked_for_is_logged_once_too(caplog, monkeypatch):
    """A forgotten MMRLHF_BACKEND=reference makes the whole [N, V]: it must not do so without a word."""
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    with caplog.at_level(logging.INFO, logger="mmrlhf.ops"):
        for _ in range(2):
            backend.choose("linear_logp", torch.zeros(2, 3))
            backend.choose("linear_logp", torch.zeros(2, 3), requested="torch")
    assert [(r.levelno, r.message) for r in caplog.records] == [
        (logging.INFO, "linear_logp runs on backend reference: asked for by MMRLHF_BACKEND"),
        (logging.INFO, "linear_logp runs on backend torch: asked for by backend="),
    ]


def test_reference_is_never_automatic():
    with pytest.raises(
        RuntimeError, match=r"no backend of this build runs linear_logp: .*float64; mmrlhf.ops.reference"
    ):
        backend.choose("linear_logp", torch.zeros(2, 3, dtype=torch.float64))


def test_argument_then_context_then_environment(monkeypatch):
    hidden = torch.zeros(2, 3)
    monkeypatch.setenv(backend.ENVIRONMENT, "reference")
    assert backend.choose("linear_logp", hidden) == backend.Choice("reference", "asked for by MMRLHF_BACKEND")
    with backend.use_backend("torch"):
        assert backend.choose("linear_logp", hidden) == backend.Choice("torch", "asked for by use_backend")
        asked = backend.choose("linear_logp", hidden, requested="reference")
        assert asked == backend.Choice("reference", "asked for by backend=")
        seen = []
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
        assert seen == ["reference"]  # another thread sees the environment, not this block
    assert backend.requested() == "reference"


def test_k22_backend_unavailable(monkeypatch):
    hidden = torch.zeros(2, 3)
    missing = "triton"
    monkeypatch.setattr(backend, "BACKENDS", tuple(row for row in backend.BACKENDS if row.name != missing))
    message = (
        f"backend '{missing}' was asked for .*this build has no {missing} backend for linear_logp; it has: .*torch"
    )
    with pytest.raises(RuntimeError, match=message):
        backend.choose("linear_logp", hidden, requested=missing)
    with backend.use_backend(missing), pytest.raises(RuntimeError, match="use_backend"):
        backend.choose("linear_logp", hidden)
    monkeypatch.setenv(backend.ENVIRONMENT, missing)
    with pytest.raises(RuntimeError, match="MMRLHF_BACKEND"):
        linear_logp(hidden, hidden, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"'torch' was asked for .*float32, not float64"):
        backend.choose("linear_logp", hidden.double(), requested="torch")


def test_unknown_names_list_the_known(monkeypatch):
    with pytest.raises(ValueError, match="backend= must be one of cuda, triton, cpu, torch, reference, got 'gpu'"):
        backend.choose("linear_logp", torch.zeros(1), requested="gpu")
    with pytest.raises(ValueError, match="use_backend must be one of"), backend.use_backend("gpu"):
        pass
    monkeypatch.setenv(backend.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match="MMRLHF_BACKEND must be one of"):
        backend.choose("linear_logp", torch.zeros(1))


def test_reference_backend_runs_float64():
    problem = HeadProblem.random(5, 8, 13, dtype=torch.float64)
    got = linear_logp(problem.hidden, problem.weight, problem.targets, backend="reference")
    assert got.dtype == torch.float64
    assert torch.equal(got, reference.linear_logp(problem.hidden, problem.weight, problem.targets))


def test_values_are_not_looked_at_off_the_cpu():
    """Looking would wait for the device. Meta tensors stand for one: they would raise if looked at."""
    from mmrlhf.ops import checks

    targets = torch.zeros(4, dtype=torch.int64, device="meta")
    checks.targets(targets, torch.zeros(4, 8, device="meta"), 11, -100)
    checks.pairs(torch.zeros(3, 2, dtype=torch.int64, device="meta"), 4)
    checks.cu_seqlens(torch.zeros(5, dtype=torch.int64, device="meta"), 9)
    with pytest.raises(ValueError, match="targets is on cpu but hidden is on meta"):
        checks.targets(torch.zeros(4, dtype=torch.int64), torch.zeros(4, 8, device="meta"), 11, -100)


def test_cpu_is_first_on_the_cpu_and_says_its_instruction_set():
    _C = pytest.importorskip("mmrlhf._C", reason="the extension is not built")
    hidden = torch.zeros(2, 3)
    choice = backend.choose("fused_preference_loss", hidden, hidden)
    assert choice.name == "cpu"
    assert _C.build_info()["isa"] in choice.reason
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for .*its tensors must be on the CPU, not meta"):
        backend.choose("linear_logp", hidden.to("meta"), requested="cpu")
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for .*float32, not float64"):
        backend.choose("linear_logp", hidden.double(), requested="cpu")


def test_k22_cpu_without_its_extension(monkeypatch, caplog):
    """Asked for: an error with the reason. Left free: torch, saying why, once."""
    monkeypatch.setitem(sys.modules, "mmrlhf._C", None)
    monkeypatch.delattr("mmrlhf._C", raising=False)
    monkeypatch.delitem(sys.modules, "mmrlhf.ops._cpu", raising=False)
    monkeypatch.delattr("mmrlhf.ops._cpu", raising=False)
    backend._missing_extension.cache_clear()
    hidden = torch.zeros(2, 3)
    try:
        with pytest.raises(RuntimeError, match=r"'cpu' was asked for .*mmrlhf\._C cannot be imported \(.*_C"):
            linear_logp(hidden, hidden, torch.zeros(2, dtype=torch.int64), backend="cpu")
        with caplog.at_level(logging.INFO, logger="mmrlhf.ops"):
            for _ in range(2):
                linear_logp(hidden, hidden, torch.zeros(2, dtype=torch.int64))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING  # a library's INFO is not seen by default, and this is much slower
        assert "linear_logp runs on backend torch" in record.message
        assert "; not cpu: the compiled extension mmrlhf._C cannot be imported" in record.message
    finally:
        backend._missing_extension.cache_clear()


def test_exponentials_of_the_backends_agree():
    """2^(z log2(e) - k) and its sum, by PyTorch and compiled: the same for ordinary, infinite and NaN entries."""
    pytest.importorskip("mmrlhf._C", reason="the extension is not built")
    z = torch.randn(9, 131, generator=torch.Generator().manual_seed(0)) * 20
    z[2, 5], z[3, 7], z[4, 1] = float("nan"), float("inf"), -float("inf")
    offset = streaming.offset_of(z[:, 0])
    offset[5] = float("nan")
    tiles = []
    for name in ("torch", "cpu"):
        tile = z.clone()
        tiles.append((tile, backend.engine(name).exp2_rowsum_(tile, offset)))
    truth = torch.exp2(z.double() * streaming.LOG2E - offset.double()[:, None])
    for values in zip(*tiles, strict=True):
        torch.testing.assert_close(*values, rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(tiles[1][0], truth.float(), rtol=3e-7, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("value", [None, "given"])
@pytest.mark.parametrize("start", [0, 100, 231])
def test_a_block_of_a_head_is_the_same_on_the_backends(start, value):
    """Targets before, in (first and last column too), behind and outside of the block; another rank's is -1."""
    pytest.importorskip("mmrlhf._C", reason="the extension is not built")
    g = torch.Generator().manual_seed(start)
    z, rest = torch.randn(9, 131, generator=g) * 20, torch.rand(9, generator=g)
    targets = torch.tensor([0, 99, 100, 130, 150, 230, 231, 361, -1])
    value = None if value is None else torch.randn(9, generator=g)
    offset = streaming.offset_of(z[:, 0])
    found = []
    for name in ("torch", "cpu"):
        tile, sums = z.clone(), rest.clone()
        backend.engine(name).exp2_rowsum_(tile, offset, sums, targets, start, value)
        found.append((tile, sums))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    truth = torch.exp2(z.double() * streaming.LOG2E - offset.double()[:, None])
    for row, target in enumerate(targets.tolist()):
        if 0 <= target - start < 131:
            truth[row, target - start] = 0
            assert found[1][0][row, target - start] == (0 if value is None else value[row])
    torch.testing.assert_close(found[1][1], (rest + truth.sum(1)).float(), rtol=1e-6, atol=0)


def test_strided_targets_reach_the_compiled_pass():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(50, 8, generator=g)
    targets = torch.randint(0, 50, (12,), generator=g)[::2]
    assert torch.equal(linear_logp(hidden, weight, targets), linear_logp(hidden, weight, targets.clone()))


def test_reference_under_autocast_is_float32_as_the_others_are():
    """Autocast casts the operands, as of a linear layer, and not the logits, which would be 0.02 nats off."""
    problem = HeadProblem.random(6, 16, 101)
    rest = torch.tensor([0, 2, 6]), torch.tensor([[0, 1]])
    options = {"reference_scores": torch.zeros(2), "backend": "reference"}
    cast = problem.hidden.bfloat16(), problem.weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = linear_logp(problem.hidden, problem.weight, problem.targets, backend="reference")
        fused = fused_preference_loss(problem.hidden, problem.weight, problem.targets, *rest, **options)
        statistics = token_statistics(problem.hidden, problem.weight, problem.targets, backend="reference")
    assert logp.dtype == fused.scores.dtype == statistics.entropy.dtype == torch.float32
    assert torch.equal(logp, linear_logp(*cast, problem.targets, backend="reference"))
    assert torch.equal(fused.scores, sequence_score(logp, rest[0]))
    assert torch.equal(statistics.entropy, token_statistics(*cast, problem.targets, backend="reference").entropy)
