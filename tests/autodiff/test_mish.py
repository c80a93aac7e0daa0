"""Mish has finite, right derivatives of every order, wherever its graph comes from."""

import math

import pytest
import torch
import torch.nn.functional as F
from releases import require
from torch import nn

import gpkit
from gpkit.autodiff import compat
from gpkit.autodiff.derivatives import mended
from gpkit.estimators.curvature_difference import curvature_difference

POINTS = [
    -1e30,
    -1e4,
    -800.0,
    -100.0,
    -20.0,
    -1.2,
    0.0,
    0.3,
    5.0,
    20.0,
    88.0,
    89.0,
    100.0,
    800.0,
    1e4,
]


def truth(x, order):
    """Return a derivative of Mish in float64: tanh(softplus x) is rational in u = e^-|x|."""
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    u = torch.exp(-x if x >= 0 else x)
    top, low = (1 + 2 * u, 2 * u**2) if x >= 0 else (u**2 + 2 * u, 2.0)
    y = x * top / (top + low)
    for _ in range(order):
        (y,) = torch.autograd.grad(y, x, create_graph=True)
    return y.item()


def test_mish_is_known_by_its_node():
    x = torch.ones(3, requires_grad=True)
    node = F.mish(x).grad_fn
    there = compat.class_of(node) == "MishBackward0" and compat.saved_input(node) is x
    require(there, "class_of or saved_input", "penalties through Mish are NaN far from zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_are_right_everywhere(order, dtype):
    x = torch.tensor(POINTS, dtype=dtype, requires_grad=True)
    found = gpkit.derivative(F.mish(x), x, order=order)
    found = found.flatten().double()
    expected = torch.tensor([truth(v, order) for v in x.tolist()], dtype=torch.float64)
    assert expected.isfinite().all()
    assert (found - expected).abs().max() < (1e-6 if dtype == torch.float32 else 1e-13)


def one(x):
    net = nn.Sequential(nn.Linear(1, 1), nn.Mish())
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    return net, torch.tensor([[x], [2 * x]])


ROUTES = {
    "callable": lambda penalty, net, x: penalty(net, x),
    "graph": lambda penalty, net, x: penalty(net(z := x.clone().requires_grad_()), z),
    "mixture": lambda penalty, net, x: penalty(net, real=x, fake=x),
}

PENALTIES = {  # and their values at a slope w = 1, as functions of w
    "jacobian": (lambda: gpkit.jacobian(1.0), "graph", lambda w: w**2),
    "exact": (lambda: gpkit.jacobian(1.0), "callable", lambda w: w**2),
    "projection": (lambda: gpkit.jacobian(1.0, estimator="projection"), "graph", lambda w: w**2),
    "largest singular value": (
        lambda: gpkit.jacobian(1.0, estimator="power_iteration"),
        "callable",
        lambda w: w**2,
    ),
    "two points": (lambda: gpkit.r1_r2(weight=1.0), "mixture", lambda w: w**2),
    "two-sided": (
        lambda: gpkit.GradientPenalty(form=gpkit.two_sided(2.0)),
        "graph",
        lambda w: (w - 2) ** 2,
    ),
}


@pytest.mark.parametrize(("make", "route", "value"), PENALTIES.values(), ids=PENALTIES)
def test_a_penalty_far_from_zero(make, route, value):
    # Mish is the identity there: the derivative of the net is its weight
    net, x = one(100.0)
    found = ROUTES[route](make(), net, x)
    w = torch.ones((), requires_grad=True)
    expected = value(w)
    expected.backward()
    found.backward()
    times = found.item() / expected.item()  # r1_r2 has a factor of its own
    assert times in (1.0, 0.5, 2.0)
    assert net[0].weight.grad.item() == pytest.approx(times * w.grad.item())
    assert math.isfinite(net[0].bias.grad.item())


def test_weight_gradients_far_from_zero():
    net, x = one(100.0)  # L = mean w x + b: ‖∇L‖² = 150² + 1, which does not depend on w
    loss = net(x).mean() ** 2 / 2  # ∇L = L₁ (150, 1), L₁ = 150 w
    penalty = gpkit.weight_grad_norm(1.0)(loss, net)
    penalty.backward()
    assert penalty.item() == pytest.approx(150**2 * (150**2 + 1))
    assert net[0].weight.grad.item() == pytest.approx(2 * 150**2 * (150**2 + 1))


def test_curvature_difference_at_its_second_point():
    net, x = one(100.0)
    penalty = gpkit.GradientPenalty(estimator=curvature_difference(0.5))
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(penalty(lambda z: net(z) ** 2 / 2, x), net[0].weight)
    assert g.item() == pytest.approx(4 * 0.25)  # n = h w²: d n²/dw = 4 h² w³


def test_the_graph_of_the_caller_is_as_before():
    # catches hooks that stay: later backward passes would be slower, and NaN-free by chance
    x = torch.tensor([100.0], requires_grad=True)
    y = F.mish(x)
    with mended(y):
        pass
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.autograd.grad(g, x)[0].isnan()
