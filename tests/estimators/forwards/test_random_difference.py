"""(D(x + σε) - D(x))/σ: its mean and variance in closed form, and the points evaluated."""

import pytest
import torch
from forwards import IMAGES, H, W, X, conv, flat, mean_of, params_of
from torch.func import functional_call, grad

import gpkit


def test_random_difference_of_a_linear_function():
    mean, error, variance = mean_of(lambda x: x @ W, gpkit.random_difference(0.01))
    n2 = float(W.square().sum())
    assert abs(mean - n2) < 4 * error
    assert variance == pytest.approx(2 * n2**2, rel=0.05)


def test_random_difference_of_a_quadratic_function():
    """σ²‖Hx‖² + σ⁴/4 (2‖H‖_F² + (tr H)²) before the division by σ²."""
    f = lambda x: torch.einsum("bi,ij,bj->b", x, H, x) / 2  # noqa: E731
    for sigma in (0.5, 1.0):
        mean, error, _ = mean_of(f, gpkit.random_difference(sigma))
        bias = sigma**2 / 4 * (2 * H.square().sum() + H.trace() ** 2)
        wanted = float((H @ X).square().sum() + bias)
        assert abs(mean - wanted) < 4 * error
        assert float(bias) > 20 * error  # the bias is seen


class Seen:
    """A function that keeps the points at which it was evaluated."""

    def __init__(self, f):
        self.f, self.points = f, []

    def __call__(self, x):
        self.points.append(x.detach().clone())
        return self.f(x)


@pytest.mark.parametrize("n", [1, 3])
def test_random_difference_is_the_difference_at_its_points(n):
    net = conv()
    f = Seen(net)
    penalty = gpkit.GradientPenalty(estimator=gpkit.random_difference(0.05, n), weight=0.7)
    penalty(f, IMAGES)
    f.points.clear()
    value = penalty(f, IMAGES)
    assert len(f.points) == 1 + n
    torch.testing.assert_close(f.points[0], IMAGES)

    def by_hand(params):
        here, *there = [functional_call(net, params, (x,))[:, 0] for x in f.points]
        return 0.7 * sum(((y - here) / 0.05).square() for y in there).mean() / n

    torch.testing.assert_close(value, by_hand(params_of(net)))
    found = flat(torch.autograd.grad(value, list(net.parameters())))
    torch.testing.assert_close(found, flat(grad(by_hand)(params_of(net)).values()))
    steps = (f.points[1] - IMAGES).flatten(1)
    assert steps.std() == pytest.approx(0.05, rel=0.3)
    assert len(steps.unique()) == steps.numel()
