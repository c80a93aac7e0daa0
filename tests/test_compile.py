"""gpkit.compile: a loss with penalties inside, as one graph, equals the eager loss."""

import copy

import pytest
import torch
from compiling import trained
from torch import nn

import gpkit

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


def critic(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.SiLU(), nn.Linear(6, 1))


def same(build, make_loss, batches, **tolerance):
    """Train eagerly and compiled from the same start; return the compiled loss."""
    torch.manual_seed(0)
    net = build()
    eager, compiled = (trained(copy.deepcopy(net), make_loss, batches, c) for c in (False, True))
    assert compiled.step.obstacle is None
    for name in ("losses", "grads", "state"):
        for expected, found in zip(getattr(eager, name), getattr(compiled, name), strict=True):
            torch.testing.assert_close(
                found, expected, **({"rtol": 1e-5, "atol": 1e-6} | tolerance)
            )
    assert torch.equal(compiled.rng, eager.rng)
    assert compiled.penalties == eager.penalties
    return compiled.step


@pytest.mark.filterwarnings("ignore:the outputs of a batch depend")
def test_a_critic_step_by_step():
    """Interpolates drawn anew, batch norm, two penalties, one of them lazy, a smaller batch."""

    def make_loss(net):
        gp = gpkit.wgan_gp(gpkit.warmup(10.0, steps=3), seed=1)
        lazy = gpkit.weight_grad_norm(weight=0.3, every=2, match="*.weight", seed=2)

        def loss(real, fake):
            value = net(fake).mean() - net(real).mean()
            return value + gp(net, real=real, fake=fake) + lazy(value, net)

        return loss, (gp, lazy)

    real, fake = torch.randn(8, 4), torch.randn(8, 4)
    batches = [(real, fake), (fake, real)] * 2 + [(real[:5], fake[:5])] * 2
    step = same(lambda: critic(nn.BatchNorm1d(6)), make_loss, batches)
    assert step.terms[0].weight == 10.0  # of the schedule at its end
    assert step.terms[1] is None  # it did not act
