"""backend.choose: what was asked for, in which order, and what is said when it cannot run."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from mmrlhf.ops import backend, linear_logp, reference
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
    missing = next(name for name in backend.KNOWN if name not in backend.available("linear_logp"))
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
