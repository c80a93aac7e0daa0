"""`random_difference` where the net computes in bfloat16: its bias, and where it is subtracted."""

import copy
import warnings

import pytest
import torch
from torch import nn

import gpkit


def net():
    torch.manual_seed(0)
    layers = nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
    return nn.Sequential(*layers)


def ratio(sigma, how):
    """Return the mean of n² over that of the exact ‖∇f‖² in float32."""
    f, x = net(), torch.randn(1024, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = gpkit.GradientPenalty()(f, x)
        penalty = gpkit.GradientPenalty(estimator=gpkit.random_difference(sigma, 16), seed=0)
        if how == "true":
            return float(penalty(copy.deepcopy(f).bfloat16(), x.bfloat16()) / exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return float(penalty(f, x) / exact)


@pytest.mark.parametrize("how", ["autocast", "true"])
def test_rounding_makes_it_too_large(how):
    """By a third or more at σ = 0.01, with a warning, and by a few per cent at 0.05."""
    with pytest.warns(UserWarning, match="rounding makes n² too large, by a third at about 1"):
        assert 1.25 < ratio(0.01, how) < 1.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.97 < ratio(0.05, how) < 1.08
        assert 0.97 < ratio(0.01, "float32") < 1.04


def test_the_difference_is_in_float32():
    f, points = net().bfloat16(), []

    def seen(x):
        points.append(x.detach())
        return f(x)

    x = torch.randn(32, 16).bfloat16()
    penalty = gpkit.GradientPenalty(estimator=gpkit.random_difference(0.1))
    penalty(seen, x)
    points.clear()
    terms = penalty.terms(seen, x)
    here, there = (f(z).float() for z in points)
    assert terms.squared_norms.dtype == torch.float32
    wanted = ((there - here) / 0.1).square()[:, 0]
    torch.testing.assert_close(terms.squared_norms, wanted)
    in_half = ((f(points[1]) - f(points[0])) / 0.1).square()[:, 0]
    assert not torch.allclose(in_half.float(), wanted, rtol=1e-4)
