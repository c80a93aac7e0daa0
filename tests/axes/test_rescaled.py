"""Schedules of the weight that act on more than it: `rescaled` and `lazy_adam`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpkit


def classifier():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, torch.randn(8, 3, dtype=torch.float64), torch.randint(3, (8,))


def test_rescaled_divides_the_whole_loss():
    # catches a division of the penalty alone, and one by a weight below one
    net, x, y = classifier()
    loss = F.cross_entropy(net(x), y)
    for step, weight in ((0, 0.5), (1, 40.0)):
        schedule = gpkit.rescaled(gpkit.switch(0.5, 40.0, at=1))
        penalty = gpkit.weight_grad_norm(weight=schedule)
        other = gpkit.weight_grad_norm(weight=3.0)
        module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), {"a": penalty, "b": other})
        penalty.step = step
        norm = gpkit.weight_grad_norm(weight=1.0)(loss, net.parameters())
        expected = (loss + (weight + 3) * norm) / max(1, weight)
        torch.testing.assert_close(module.penalized_loss((x, y)), expected)
        assert penalty.loss_scale() == max(1, weight)
        assert other.loss_scale() == 1
    # where a lazy penalty is skipped the scale stays: the steps keep one size
    lazy = gpkit.weight_grad_norm(weight=gpkit.rescaled(7.0), every=2)
    assert [(lazy.weight_at(t), lazy.loss_scale(t)) for t in (0, 1)] == [(14, 7), (0, 7)]


def test_lazy_adam():
    found = gpkit.lazy_adam(0.002, betas=(0.5, 0.99), every=16)
    assert found["lr"] == pytest.approx(0.002 * 16 / 17)
    assert found["betas"] == pytest.approx((0.5 ** (16 / 17), 0.99 ** (16 / 17)))
    torch.optim.Adam([torch.zeros(1, requires_grad=True)], **found)


def test_rescaled_refuses_a_state():
    with pytest.raises(TypeError, match=r"got target_norm.*has a state: use it without"):
        gpkit.rescaled(gpkit.target_norm(1.0))
