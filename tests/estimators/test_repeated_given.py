"""A repeated step of with_loss has its shortcut for whatever closure and parameters are given."""

import weakref
from functools import partial

import pytest
import torch
from compare import gradients, relative_error
from differenced import data, fd, mlp
from repeated import loss_of
from torch import nn

import gpkit


class Training:
    """What holds a net and a batch, with the loss as a method."""

    def __init__(self, net, x):
        self.net, self.x = net, x

    def loss(self):
        return loss_of(self.net, self.x)


W = torch.ones(3, dtype=torch.float64, requires_grad=True)
GIVEN = {  # what with_loss is called with, at each step anew: the closure and the parameters
    "a list": lambda net, x: (lambda: loss_of(net, x), list(net.parameters())),
    "a generator": lambda net, x: (lambda: loss_of(net, x), net.parameters()),
    "a method": lambda net, _: (HOLDER[net].loss, net),
    "a partial": lambda net, x: (partial(loss_of, net, x), net),
    "a tensor without a net": lambda _, x: (lambda: (x @ W).tanh().square().mean(), [W]),
    "one tensor": lambda _, x: (lambda: (x @ W).tanh().square().mean(), W),
    "both": lambda net, x: (lambda: loss_of(net, x * W), [*net.parameters(), W]),
    "a shape": lambda net, x: (lambda: loss_of(net, x).reshape(1), net),
}
HOLDER = weakref.WeakKeyDictionary()


@pytest.mark.parametrize("name", GIVEN)
def test_whatever_is_given_has_a_shortcut(name, no_long_way):
    net, x = mlp(nn.Tanh()), data()
    HOLDER[net] = Training(net, x)
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))
    penalty.with_loss(*GIVEN[name](net, x))
    no_long_way()
    params = [W] if "tensor" in name else [*net.parameters(), W][: None if name == "both" else -1]
    for size in (5, 3):
        HOLDER[net].x = x[:size]
        closure, of = GIVEN[name](net, x[:size])
        found, loss = penalty.with_loss(closure, of), closure().reshape(())
        grads = torch.autograd.grad(loss, params, create_graph=True)
        exact = loss + 0.3 * sum(g.square().sum() for g in grads)
        torch.testing.assert_close(found, exact)
        true = torch.autograd.grad(exact, params)
        for g, t in zip(torch.autograd.grad(found, params), true, strict=True):
            assert relative_error(g, t) < 1e-5


def test_other_parameters_are_seen():
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))
    loss = lambda: loss_of(net, x)  # noqa: E731
    for some in (list(net.parameters()), list(net[0].parameters()), list(net.parameters())[:3]):
        for _ in range(3):
            found = penalty.with_loss(loss, some)
            grads = torch.autograd.grad(loss(), some, create_graph=True)
            exact = loss() + 0.3 * sum(g.square().sum() for g in grads)
            torch.testing.assert_close(found, exact)
            assert relative_error(gradients(found, net), gradients(exact, net)) < 1e-5
