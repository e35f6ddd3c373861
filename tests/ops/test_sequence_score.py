"""sequence_score: sums and DDPO means over ragged responses, values and gradients."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.ops import sequence_score
from numerics import assert_no_worse

CU = torch.tensor([0, 5, 5, 6, 17, 30])  # the second response is empty, the third one token


def by_hand(logp, weight, reduction):
    rows = []
    for start, stop in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        total = (weight[start:stop] * logp[start:stop]).sum()
        norm = weight[start:stop].sum()
        rows.append(total / norm if reduction == "mean" and norm > 0 else total)
    return torch.stack(rows)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_a_loop(reduction, weighted):
    g = torch.Generator().manual_seed(0)
    logp = -3 * torch.rand(30, generator=g)
    weight = 1 + 4 * (torch.rand(30, generator=g) > 0.6).float() if weighted else torch.ones(30)
    upstream = torch.randn(5, generator=g)

    def run(dtype, function):
        leaf = logp.to(dtype, copy=True).requires_grad_()
        score = function(leaf, weight.to(dtype))
        score.backward(upstream.to(dtype))
        return score, leaf.grad

    def ours(leaf, w):
        return sequence_score(leaf, CU, token_weight=w if weighted else None, reduction=reduction)

    truth = run(torch.float64, lambda leaf, w: by_hand(leaf, w, reduction))
    base = run(torch.float32, lambda leaf, w: by_hand(leaf, w, reduction))
    for dtype in (torch.float32, torch.float64):
        for out, plain, true in zip(run(dtype, ours), base, truth, strict=True):
            assert out.dtype == dtype
            assert_no_worse(out, plain if dtype == torch.float32 else true, true)


def test_int32_cu_seqlens():
    logp = torch.randn(30)
    assert torch.equal(sequence_score(logp, CU.int()), sequence_score(logp, CU))


def test_long_responses_keep_their_precision():
    """100,000 tokens in one response: float64 sums inside, so the float32 result is one rounding from truth."""
    logp = -torch.rand(100_000)
    score = sequence_score(logp, torch.tensor([0, 100_000]))
    assert score == logp.double().sum().float()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_k06_all_masked_row(reduction):
    """Weights all 0, or no tokens at all: score 0 and zero gradient, even over non-finite log-probabilities."""
    logp = torch.randn(30)
    logp[7] = -float("inf")
    logp.requires_grad_()
    weight = torch.ones(30)
    weight[6:17] = 0
    score = sequence_score(logp, CU, token_weight=weight, reduction=reduction)
    score.sum().backward()
    assert score[1] == 0
    assert score[3] == 0
    assert score.isfinite().all()
    assert (logp.grad[6:17] == 0).all()
    assert logp.grad.isfinite().all()


def test_k07_empty():
    logp = torch.empty(0, requires_grad=True)
    assert sequence_score(logp, torch.tensor([0])).shape == (0,)
    score = sequence_score(logp, torch.tensor([0, 0, 0]), reduction="mean")
    score.sum().backward()
    assert (score == 0).all()


def test_k08_nonfinite_token_stays_in_its_response():
    logp = torch.randn(30)
    clean = sequence_score(logp, CU)
    logp[8] = float("nan")
    score = sequence_score(logp, CU)
    assert score[3].isnan()
    assert torch.equal(score[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_gradcheck():
    g = torch.Generator().manual_seed(0)
    logp = torch.randn(30, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.rand(30, dtype=torch.float64, generator=g).add(0.1).requires_grad_()
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda x, w, r=reduction: sequence_score(x, CU, token_weight=w, reduction=r), (logp, weight)
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logp": torch.zeros(30, dtype=torch.bfloat16)}, TypeError, "logp must be float32 or float64, got bfloat16"),
        ({"logp": torch.zeros(5, 6)}, ValueError, r"logp must have shape \[N\], got \[5, 6\]"),
        ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"cu_seqlens": CU[:-1]}, ValueError, r"cu_seqlens must run from 0 to 30 .* got 0 to 17"),
        ({"cu_seqlens": CU + 1}, ValueError, "cu_seqlens must run from 0 to 30"),
        (
            {"cu_seqlens": torch.tensor([0, 9, 6, 30])},
            ValueError,
            "cu_seqlens must be in ascending order; entry 1 is 6",
        ),
        ({"cu_seqlens": torch.tensor([[0, 30]])}, ValueError, r"cu_seqlens must have shape \[R \+ 1\]"),
        ({"token_weight": torch.ones(29)}, ValueError, r"token_weight must have shape \[30\].*got \[29\]"),
        ({"token_weight": -torch.ones(30)}, ValueError, "token_weight must be finite and 0 or more; entry 0 is -1.0"),
        ({"token_weight": torch.ones(30).long()}, TypeError, "token_weight must be float32"),
        ({"reduction": "average"}, ValueError, "reduction must be one of sum, mean, got 'average'"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sequence_score(**({"logp": torch.zeros(30), "cu_seqlens": CU} | change))
