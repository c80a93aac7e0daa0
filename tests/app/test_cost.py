"""The cost of a step in plain steps."""

import time

import pytest
import torch
from torch import nn

import gpkit
from gpkit.app.callbacks.cost import plain_steps


def busy(seconds):
    """Work for a time; what other programs do meanwhile does not count."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


class Slow(nn.Linear):
    """A net whose forward pass takes ten milliseconds."""

    def __init__(self):
        super().__init__(4, 3)

    def forward(self, x):
        busy(0.01)
        return super().forward(x)


class Sleeping(gpkit.Estimator):
    """An estimator that takes twenty milliseconds."""

    def squared_norms(self, target, order, norm, rng):
        busy(0.02)
        (g,) = torch.autograd.grad(target.y.sum(), target.xs, create_graph=True)
        return g.flatten(1).square().sum(1)


def module_of(net, penalty):
    return gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty)


BATCH = torch.randn(8, 4), torch.arange(8) % 3


@pytest.mark.parametrize(("every", "expected"), [(1, 3.0), (4, 1.5)])
def test_the_cost_is_that_of_the_clock(every, expected):
    penalty = gpkit.GradientPenalty(of="loss", estimator=Sleeping(), every=every)
    found = plain_steps(module_of(Slow(), penalty), BATCH, step=7)
    assert found == pytest.approx(expected, rel=0.25)


def test_several_penalties_add_up():
    parts = {
        "a": gpkit.GradientPenalty(of="loss", estimator=Sleeping()),
        "b": gpkit.GradientPenalty(of="loss", estimator=Sleeping(), every=2),
    }
    assert plain_steps(module_of(Slow(), parts), BATCH, step=7) == pytest.approx(4.0, rel=0.25)


def test_no_penalty_costs_nothing():
    assert plain_steps(module_of(Slow(), gpkit.none()), BATCH, step=0) == pytest.approx(1, abs=0.2)


def test_nothing_moves():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    module = module_of(net, gpkit.weight_grad_norm(every=2, weight=gpkit.warmup(1.0, 100)))
    module.penalized_loss(BATCH).backward()
    module.zero_grad(set_to_none=True)
    states = [module.state_dict(), module.penalties.state_dict(), torch.get_rng_state()]
    before = [{k: v.clone() for k, v in states[0].items()}, dict(states[1]), states[2]]
    assert plain_steps(module, BATCH, step=50) > 0.8
    assert module.penalties.state_dict() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    torch.testing.assert_close(module.state_dict(), before[0], rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())
