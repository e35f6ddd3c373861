"""The nn.Module drop-ins give what the ops give, and refuse bad settings when they are made."""

from __future__ import annotations

import pytest
import torch

from mmrlhf.losses import LinearLogp, PreferenceLoss
from mmrlhf.ops import dynamic_beta, fused_preference_loss, linear_logp
from numerics import HeadProblem

pytestmark = pytest.mark.usefixtures("head_backend")

N = 47
CU = torch.tensor([0, 9, 14, 21, 21, 33, 34, 47])
PAIRS = torch.tensor([[1, 0], [2, 4], [5, 2], [4, 5]])
MARGIN = torch.tensor([0.4, 2.0, -1.0, 6.0])


def test_modules_are_the_ops():
    problem = HeadProblem.random(N, 24, 301, bias=True, softcap=9.0, logit_scale=1.5)
    module = LinearLogp(logit_scale=1.5, softcap=9.0)
    expected = linear_logp(problem.hidden, problem.weight, problem.targets, bias=problem.bias, **problem.options)
    assert torch.equal(module(problem.hidden, problem.weight, problem.targets, problem.bias), expected)
    shared = {"token_weight": torch.ones(N), "reference_scores": torch.full((7,), -30.0)}
    tensors = (problem.hidden, problem.weight, problem.targets, CU, PAIRS)
    margin = PreferenceLoss(beta_mode="margin", sft_weight=0.25, logit_scale=1.5, softcap=9.0)
    got = margin(*tensors, margin=MARGIN, bias=problem.bias, **shared)
    want = fused_preference_loss(
        *tensors, beta=dynamic_beta(MARGIN), sft_weight=0.25, bias=problem.bias, **problem.options, **shared
    )
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.beta, dynamic_beta(MARGIN))
    with pytest.raises(ValueError, match="margin is None, but beta_mode 'margin'"):
        margin(*tensors, **shared)
    implicit = PreferenceLoss(beta_mode="implicit")(*tensors, **shared)
    assert implicit.loss.isfinite()
    assert not list(margin.parameters())
    assert "kind=sigmoid" in repr(margin)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be finite and positive"),
        ({"kind": "dpo"}, "kind must be one of"),
        ({"label_smoothing": 0.7}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"reduction": "avg"}, "reduction must be one of"),
        ({"beta_mode": "dynamic"}, "beta_mode must be one of fixed, margin, implicit"),
        ({"sft_weight": -1.0}, "sft_weight must be"),
    ],
)
def test_k11_bad_settings_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**settings)
