"""The step of a difference is one for the coarsest numbers that a function computes with."""

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit


def half():
    return torch.autocast("cpu", torch.bfloat16)


def built():
    torch.manual_seed(0)
    layers = nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)
    return nn.Sequential(*layers), torch.randn(64, 20), torch.randint(3, (64,))


def off(found, expected):
    """Return the relative difference of gradients."""
    pairs = [*zip(found, expected, strict=True)]
    distance = sum((a.double() - b).square().sum() for a, b in pairs)
    return float((distance / sum(b.square().sum() for _, b in pairs)).sqrt())


def exact(net, x, y, *, inputs=False):
    """Return the gradient of the squared norm in the weights, in float64."""
    wide = nn.Sequential(*net).double()
    z = x.double().requires_grad_()
    losses = F.cross_entropy(wide(z), y, reduction="none")
    params = list(wide.parameters())
    total, xs = (losses.sum(), [z]) if inputs else (losses.mean(), params)
    n2 = sum(g.square().sum() for g in torch.autograd.grad(total, xs, create_graph=True))
    found = torch.autograd.grad(n2 / (len(x) if inputs else 1), params)
    wide.float()
    return found


WAYS = {
    "inside": (contextlib.nullcontext, half),
    "around": (half, contextlib.nullcontext),
    "a part": (contextlib.nullcontext, contextlib.nullcontext),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("together", [True, False])
def test_autocast_in_the_closure_around_it_or_in_a_part(way, together):
    (net, x, y), (around, inside) = built(), WAYS[way]
    expected, params = exact(net, x, y), list(net.parameters())
    penalty = gpkit.weight_grad_norm(1.0, estimator="finite_difference")

    def loss():
        with inside():
            if way != "a part":
                return F.cross_entropy(net(x), y)
            h = net[1](net[0](x))
            with half():
                h = net[2](h)
            return F.cross_entropy(net[4](net[3](h.float())), y)

    for _ in range(3):  # the last repeats an earlier one
        with around():
            total = penalty.with_loss(loss, net) if together else loss() + penalty(loss, net)
            plain = loss()
        found = torch.autograd.grad(total, params), torch.autograd.grad(plain, params)
        assert off([a - b for a, b in zip(*found, strict=True)], expected) < 0.2


def test_autocast_in_a_function_of_the_inputs():
    net, x, y = built()
    expected, params = exact(net, x, y, inputs=True), list(net.parameters())
    penalty = gpkit.input_grad_norm(1.0, estimator="finite_difference")

    def losses(z):
        with half():
            return F.cross_entropy(net(z), y, reduction="none")

    for _ in range(3):
        assert off(torch.autograd.grad(penalty(losses, x), params), expected) < 0.2
