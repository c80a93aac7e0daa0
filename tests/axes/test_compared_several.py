"""`target=` and `metric=` of several variables with one norm: inputs, dicts, activations."""

import pytest
import torch
from compared import MASK, B, assert_same, draw, measured
from torch import nn

import gpkit


def test_several_inputs():
    x, c, gx, gc = draw(B, 3), draw(B, 2, 2), draw(B, 3), draw(B, 2, 2)
    a = draw(3, 4).requires_grad_()

    def f(x, c):
        return (torch.tanh(x @ a) * c.flatten(1)).sum(1)

    value = gpkit.GradientPenalty()(f, (x, c), target=(gx, gc), metric=(2.0, MASK[0, :2, :2]))
    dx = ((1 - torch.tanh(x @ a) ** 2) * c.flatten(1)) @ a.T
    dc = torch.tanh(x @ a).reshape(B, 2, 2)
    parts = (
        (2 * (dx - gx)).square().sum(1),
        (MASK[0, :2, :2] * (dc - gc)).flatten(1).square().sum(1),
    )
    torch.testing.assert_close(value, sum(parts).mean())


def test_one_norm_over_two_activations():
    """With a target and a metric for each of them, for a callable and for tensors."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1))
    net.double()
    x, goals = draw(B, 3), (draw(B, 4), draw(B, 2))
    penalty = gpkit.GradientPenalty(wrt=[gpkit.activation("0"), gpkit.activation("2")])
    u = net[0](x)
    v = net[2](torch.tanh(u))
    dv = (1 - torch.tanh(v) ** 2) * net[4].weight[0]
    du = (1 - torch.tanh(u) ** 2) * (dv @ net[2].weight)
    n2 = (du - goals[0]).square().sum(1) + (2 * (dv - goals[1])).square().sum(1)
    given = {"target": goals, "metric": (1.0, 2.0)}
    found = penalty(net, x, **given)
    torch.testing.assert_close(found, n2.mean())
    torch.testing.assert_close(penalty(net[3:](v), (u, v), **given), n2.mean())
    for a, b in zip(
        torch.autograd.grad(found, list(net.parameters())[:5]),
        torch.autograd.grad(n2.mean(), list(net.parameters())[:5]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


class OfDict(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(6, 4)
        self.double().eval()

    def forward(self, inputs):
        h = torch.tanh(self.norm(self.a(inputs["positions"])))
        return (h * torch.tanh(self.b(inputs["cell"].flatten(1)))).sum(1)


@pytest.mark.parametrize("estimator", ["exact", gpkit.finite_difference(side="central")])
def test_samples_by_name_have_one_norm(estimator):
    net = OfDict()
    x = {"positions": draw(B, 3), "cell": draw(B, 2, 3)}
    g = {"cell": draw(B, 2, 3), "positions": draw(B, 3)}  # in any order
    penalty = gpkit.GradientPenalty(estimator=estimator)
    found = measured(penalty, net, x, net=net, target=g)

    def pair(positions, cell):
        return net({"positions": positions, "cell": cell})

    wanted = measured(
        gpkit.GradientPenalty(),
        pair,
        tuple(x.values()),
        net=net,
        target=(g["positions"], g["cell"]),
    )
    assert_same(found, wanted, 1e-7)
    net.train()
    before = net.norm.running_mean.clone()
    gpkit.wgan_gp().terms(net, real=x, fake={name: -value for name, value in x.items()})
    torch.testing.assert_close(net.norm.running_mean, before)


def test_a_tensor_of_samples_by_name():
    net = OfDict()
    x = {"positions": draw(B, 3).requires_grad_(), "cell": draw(B, 2, 3).requires_grad_()}
    torch.testing.assert_close(gpkit.r1()(net(x), real=x), gpkit.r1()(net, real=x))
    with pytest.raises(ValueError, match=r"target= must have the same keys as the samples"):
        gpkit.r1()(net, real=x, target={"positions": x["positions"]})
