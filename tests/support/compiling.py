"""torch.compile in tests: where it can run, what it has compiled, and what is compared."""

import shutil

import pytest
import torch

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
