"""A net, samples, and penalties by finite differences of it."""

import pytest
import torch
from torch import nn

import gpkit

SIDES = ("forward", "backward", "central")

fd = gpkit.finite_difference

sides = pytest.mark.parametrize("side", SIDES)

KINDS = ("input", "weight")

kinds = pytest.mark.parametrize("kind", KINDS)


def mlp(*middle, dtype=torch.float64):
    layers = [nn.Linear(3, 6), *middle, nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).to(dtype)


def data(dtype=torch.float64):
    x = torch.randn(5, 3, dtype=torch.float64) * torch.tensor([0.3, 1, 2, 0.5, 1]).reshape(5, 1)
    return x.to(dtype)


def penalise(kind, net, x, estimator, **axes):
    """Return a penalty on the net's squared outputs, in the inputs or in the weights."""
    if kind == "input":
        penalty = gpkit.input_grad_norm(weight=0.7, estimator=estimator, **axes)
        return penalty(lambda x: net(x).square().squeeze(1), x)
    penalty = gpkit.weight_grad_norm(weight=0.7, estimator=estimator, **axes)
    return penalty(lambda: net(x).square().mean(), net)


FORMS = {
    "squared": (gpkit.squared(), lambda n: n**2),
    "norm": (gpkit.norm(), lambda n: n),
    "two_sided": (gpkit.two_sided(0.4), lambda n: (n - 0.4) ** 2),
}
