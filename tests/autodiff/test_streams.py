"""Code that draws from the streams of Python or NumPy, at first or later on, moves none."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.autodiff.random import may_draw

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mlp(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *(layers or [nn.Tanh()]), nn.Linear(8, 1)).double()


def drawn():
    return np.random.randn() + random.random()


class Noise:
    def __call__(self, z):
        return z * random.random()


class Doubled(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, z):
        return torch.cat([self.net(z), 2 * self.net(z)], 1).sum(1)


class Augmented(nn.Module):
    def __init__(self, net, late):
        super().__init__()
        self.net, self.late = net, late

    def forward(self, z):
        return self.net(self.moved(z) if self.late() else z)

    def moved(self, z):
        return z + drawn()


def with_hook(net, late):
    net.register_forward_hook(lambda m, i, y: y + drawn() if late() else y)
    return net


def importing(net, late):
    def f(z):
        import random as r

        return net(z * r.random() if late() else z)

    return f


def deep(net, late):
    holder = {"a": [functools.partial(lambda noise, z: noise(z), Noise())]}
    return lambda z: net(holder["a"][0](z) if late() else z)


def from_a_name(net, late, draw=np.random.rand):
    return lambda z: net(z + draw() if late() else z)


LATE = {
    "global": lambda net, late: lambda z: net(z + drawn() if late() else z),
    "method": Augmented,
    "hook": with_hook,
    "import": importing,
    "object": deep,
    "builtin": from_a_name,
}


@pytest.mark.parametrize("made", LATE.values(), ids=LATE)
@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_a_function_that_begins_to_draw_later_moves_no_stream(made, estimator):
    net, calls = mlp(), []
    f = made(net, lambda: len(calls) >= 3)
    penalty = gpkit.r1(estimator=estimator)
    random.seed(0), np.random.seed(0)
    before = random.getstate(), str(np.random.get_state())
    values = set()
    for _ in range(6):
        values.add(penalty(f, real=X).item())
        calls.append(1)
        assert (random.getstate(), str(np.random.get_state())) == before
    if estimator == "exact":
        assert len(values) == (1 if made is with_hook else 4)  # what is added has no slope


def test_a_hook_that_is_added_later_and_draws_moves_no_stream():
    net, penalty = mlp(), gpkit.r1()
    for _ in range(3):
        penalty(net, real=X)
    with_hook(net[1], lambda: True)
    before = random.getstate(), str(np.random.get_state())
    penalty(net, real=X)
    assert (random.getstate(), str(np.random.get_state())) == before


def test_code_without_streams_is_known_as_such():
    net = mlp()
    for f in (net, lambda z: F.silu(net(z)), Doubled(net), functools.partial(net.forward)):
        assert not may_draw([f, net])
