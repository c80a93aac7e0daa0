"""Repeated calls at points of one's own, and with samples of another device, are right."""

from dataclasses import dataclass

import torch
from plain_critics import critic, require_right, samples
from torch import nn

import gpkit
from gpkit.axes.at import At


class TwoPoints(nn.Module):
    """A net that compares a point with a second one, if it is given."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x, y=0):
        return self.down(torch.tanh(self.up(x) + self.up(x + y)))


def test_points_of_your_own_that_come_to_be_two_are_both_differentiated():
    net, second = TwoPoints().double(), []
    penalty = gpkit.GradientPenalty(at=lambda real, fake: (real, *second))
    for _ in range(3):
        require_right(penalty, net, samples(4, 5), lambda n2: n2)
    second.append(samples(4, 5) + 1)
    for _ in range(2):
        x, y = samples(4, 5).requires_grad_(), second[0].clone().requires_grad_()
        grads = torch.autograd.grad(net(x, y).sum(), (x, y), create_graph=True)
        expected = sum(g.square().sum(1) for g in grads).mean()
        found = penalty(net, real=samples(4, 5))
        torch.testing.assert_close(found, expected)
        own = [torch.autograd.grad(n, net.up.weight)[0] for n in (found, expected)]
        torch.testing.assert_close(*own)


@dataclass(frozen=True, kw_only=True)
class Noisy(At):
    """Points that are drawn, of a class that does not say that they move."""

    def choose(self, real, fake, rng):
        return tuple(x + torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in real)


def test_points_of_your_own_are_drawn_from_the_numbers_of_the_penalty(no_long_way):
    net = critic()
    penalties = [gpkit.GradientPenalty(at=Noisy(), seed=3) for _ in range(2)]
    before = torch.get_rng_state()
    expected = []
    for _ in range(3):
        penalties[0].shortcuts.found.clear()
        expected.append(penalties[0](net, real=samples(4, 5)))
    found = [penalties[1](net, real=samples(4, 5))]
    no_long_way()
    found += [penalties[1](net, real=samples(4, 5)) for _ in range(2)]
    assert found == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_does_not_move_what_is_drawn_for_samples_on_the_cpu():
    net, x = critic(), samples(4, 5)
    for make in (gpkit.wgan_gp, gpkit.dragan):
        plain, moved = make(seed=1), make(seed=1)
        for _ in range(3):
            expected = plain(net, real=x, fake=x - 1)
            with torch.device("meta"):
                assert torch.equal(moved(net, real=x, fake=x - 1), expected)
