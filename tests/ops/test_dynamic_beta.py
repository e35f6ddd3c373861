"""Dynamic Reward Scaling, at its bounds, and the released code's implicit beta."""

from __future__ import annotations

import math

import pytest
import torch

from mmrlhf.ops import dynamic_beta, implicit_beta


def test_formula():
    margin = torch.tensor([0.0, 0.1, 1.0, 2.0, 7.5], dtype=torch.float64)
    expected = [0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * d))) for d in margin.tolist()]
    assert torch.allclose(dynamic_beta(margin), torch.tensor(expected, dtype=torch.float64), rtol=1e-15)
    expected = [0.3 * (1 + 2.0 * (1 - math.exp(-1.5 * d))) for d in margin.tolist()]
    got = dynamic_beta(margin, beta=0.3, w=2.0, k=1.5)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds(dtype):
    """[beta, (1 + w) beta]: negative margins (and none, NaN) at the lower bound, very large ones at the upper."""
    margin = torch.tensor([-float("inf"), -1e4, -0.2, 0.0, float("nan"), 1e4, float("inf")], dtype=dtype)
    beta = dynamic_beta(margin)
    assert beta.dtype == dtype
    assert torch.equal(beta[:5], torch.full((5,), 0.1, dtype=dtype))
    assert torch.allclose(beta[5:], torch.full((2,), 0.15, dtype=dtype), rtol=1e-7)
    rising = dynamic_beta(torch.linspace(-3, 30, 500, dtype=dtype))
    assert (rising.diff() >= 0).all()
    assert torch.equal(dynamic_beta(torch.rand(5, dtype=dtype), w=0.0), torch.full((5,), 0.1, dtype=dtype))


def test_small_margins_keep_their_precision():
    """1 - exp(-x) by subtraction would lose all of a margin of 1e-9 in float32."""
    extra = dynamic_beta(torch.tensor([1e-9], dtype=torch.float64), beta=1.0) - 1
    assert abs(float(extra) / 2.5e-10 - 1) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be finite and positive, got 0.0"),
        ({"beta": float("nan")}, "beta must be finite and positive, got nan"),
        ({"w": -0.1}, "w must be finite and 0 or more, got -0.1"),
        ({"w": float("inf")}, "w must be finite"),
        ({"k": 0.0}, "k must be finite and positive, got 0.0"),
    ],
)
def test_k11_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        dynamic_beta(torch.zeros(3), **options)


def test_k01_wrong_dtype():
    with pytest.raises(TypeError, match="margin must be float32 or float64, got int64"):
        dynamic_beta(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="log_ratio_margin must be float32 or float64, got bfloat16"):
        implicit_beta(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 1.5"):
        implicit_beta(torch.zeros(3), keep=1.5)


def test_implicit_beta_follows_the_released_code():
    margin = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 4 + 1
    beta = implicit_beta(margin, generator=torch.Generator().manual_seed(1))
    density = torch.exp(-0.5 * ((margin - margin.mean()) / (margin.std() + 1e-7)) ** 2)
    drawn = torch.multinomial(density, 40, generator=torch.Generator().manual_seed(1))
    expected = 0.1 * (1 + 0.5 * (margin[drawn].mean() - margin.mean()))
    assert torch.allclose(beta, expected)
    assert beta.dim() == 0
    # The whole batch drawn: the means agree and beta is plain.
    assert torch.allclose(implicit_beta(margin, keep=1.0), torch.tensor(0.1), rtol=1e-5)


def test_implicit_beta_is_held_above_its_floor_and_defined_for_few_pairs():
    assert implicit_beta(torch.tensor([3.0])) == torch.tensor(0.1)  # the released code raises here
    assert implicit_beta(torch.empty(0)) == torch.tensor(0.1)
    assert implicit_beta(torch.zeros(8)).isfinite()
    far = torch.cat([torch.zeros(9), torch.tensor([1e6])])
    drawn = [float(implicit_beta(far, generator=torch.Generator().manual_seed(seed))) for seed in range(20)]
    # Without the outlier the drawn mean is far below the mean: beta would be negative.
    assert min(drawn) == float(torch.tensor(1e-3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_t01_implicit_beta_of_a_non_finite_margin_is_nan_not_a_crash(bad):
    margin = torch.tensor([0.1, bad, -0.2, 0.4, 0.0])
    assert implicit_beta(margin, beta=0.1, generator=torch.Generator().manual_seed(0)).isnan()
