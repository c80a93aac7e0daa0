"""torch.compile in tests: where it can run, what it has compiled, and what is compared."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

import gpkit

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs a compiler"
)


def losses_and_gradients(module, batches):
    results = []
    for batch in batches:
        module.zero_grad()
        loss = module.penalized_loss(batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
    return results


class Graphs:
    """A backend that counts what is compiled and what is run of it."""

    def __init__(self):
        self.compiled = self.run = 0

    def __call__(self, graph, inputs, **options):
        self.compiled += 1

        def run(*args):
            self.run += 1
            return graph(*args)

        return run


class Trained:
    """What a few steps leave behind."""

    def __init__(self, step, net, penalties, losses, grads):
        self.step, self.losses, self.grads = step, losses, grads
        self.state = list(net.state_dict().values())
        self.rng = torch.get_rng_state()
        self.penalties = [penalty.state_dict() for penalty in penalties]


def trained(net, make_loss, batches, compile, **options):
    """Take steps of SGD, compiled or not, and return what they leave behind."""
    loss, penalties = make_loss(net)
    step = gpkit.compile(loss, measure=False, **options) if compile else loss
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses, grads = [], []
    torch.manual_seed(1)
    for batch in batches:
        optimizer.zero_grad()
        value = step(*batch)
        value.backward()
        losses.append(value.detach())
        grads += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    return Trained(step, net, penalties, losses, grads)


def critic(*layers):
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.SiLU(), nn.Linear(6, 1))


def wgan_gp(net):
    """Return a critic's loss, and its penalty."""
    penalty = gpkit.wgan_gp(gpkit.warmup(10.0, steps=3), seed=1)

    def loss(real, fake):
        return net(fake).mean() - net(real).mean() + penalty(net, real=real, fake=fake)

    return loss, (penalty,)


def apart(expected, found):
    """‖found - expected‖ / ‖expected‖ over all entries of the tensors, in float64."""
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    own = sum(float(a.square().sum()) for a, _ in pairs)
    return (sum(float((a - b).square().sum()) for a, b in pairs) / own) ** 0.5


def same(build, make_loss, batches, **options):
    """Train eagerly and compiled from the same start; return the compiled loss."""
    torch.manual_seed(0)
    net = build()
    eager, compiled = (
        trained(copy.deepcopy(net), make_loss, batches, c, **options) for c in (False, True)
    )
    assert compiled.step.obstacle is None
    for name in ("losses", "grads", "state"):
        assert apart(getattr(eager, name), getattr(compiled, name)) <= 1e-6, name
    assert torch.equal(compiled.rng, eager.rng)
    (found, how), (expected, as_before) = (tree_flatten(own.penalties) for own in (compiled, eager))
    assert how == as_before
    assert found == pytest.approx(expected, rel=1e-6)  # averages are rounded
    return compiled.step


def samples(n=8):
    return torch.randn(n, 4), torch.randn(n, 4)
