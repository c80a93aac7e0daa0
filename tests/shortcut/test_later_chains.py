"""Chains that were proven at an earlier step: what a later one does otherwise is seen."""

import pytest
import torch
from exact_steps import SCOPES, by_hand, loss_of
from exact_steps import require_right as require_right_step
from plain_critics import chain, require_right, samples
from torch import nn
from torch.nn import functional as F

import gpkit


class Hooked(nn.Module):
    """A chain that comes to hook a hidden value, which ReLU and tanh do not save."""

    hooks = False

    def __init__(self, net):
        super().__init__()
        self.first, self.rest = net[0], net[1:]

    def forward(self, x):
        z = self.first(x)
        if self.hooks:
            z.register_hook(lambda g: 2 * g)
        return self.rest(z)


class Skipping(nn.Module):
    """The sum of a chain and a number, later of a chain and its input."""

    skips = False

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, x):
        return self.net(x) + (x if self.skips else 2.0)


@pytest.mark.parametrize("function", [nn.ReLU(), nn.Tanh(), nn.SiLU()])
def test_a_hook_on_a_hidden_value(function, written):
    critic, penalty = Hooked(chain(function, 7, 6, 1)), gpkit.r1(weight=2)
    model = Hooked(chain(function, 7, 6, 3))
    steps = {scope: (make(0.3), make(0.3)) for scope, (make, _) in SCOPES.items()}
    for step in range(5):
        critic.hooks = model.hooks = step >= 3
        require_right(penalty, critic, samples(4, 5), lambda n2: n2)
        for scope, (own, alone) in steps.items():
            x, t = samples(4, 5), torch.randint(3, (4,))
            require_right_step(own, model, x, t, scope)
            both, closure = by_hand(model, x, t, scope)[0], loss_of(model, x, t, scope)
            torch.testing.assert_close(closure().mean() + alone(closure, model), both)
        if step == 2:
            before = len(written)
    assert before == len(written) > 0


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_a_path_beside_the_chain(as_module, written):
    net, penalty = Skipping(), gpkit.r1(weight=2)
    for step in range(5):
        net.skips = step >= 3
        f = net if as_module else lambda x: net(x)
        x = samples(4, 1)
        found, expected = penalty(f, real=x), x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(expected).sum(), expected, create_graph=True)
        expected = g.square().sum(1).mean()
        torch.testing.assert_close(found, expected)
        weights = [net.net[0].weight, net.net[2].weight]
        pairs = [torch.autograd.grad(y, weights) for y in (found, expected)]
        torch.testing.assert_close(*pairs)
    assert written


class Looping(nn.Module):
    """A net that runs one of its layers several times."""

    times = 1

    def __init__(self, net):
        super().__init__()
        self.first, self.again, self.last = net[0], net[2], net[4]

    def forward(self, x):
        h = torch.tanh(self.first(x))
        for _ in range(self.times):
            h = torch.tanh(self.again(h))
        return self.last(h)


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_layers_that_come_to_be_before_the_chain(as_module, written):
    net, penalty = Looping(chain(nn.Tanh(), 5, 5, 1)), gpkit.r1(weight=2)
    for times in (1, 1, 1, 2, 3, 1):
        net.times = times
        x = samples(4, 5)
        found = penalty(net if as_module else lambda x: net(x), real=x)
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
        expected, weights = g.square().sum(1).mean(), [net.first.weight, net.again.weight]
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*[torch.autograd.grad(y, weights) for y in (found, expected)])
    assert written


def test_samples_that_come_to_have_several_rows():
    net, penalty = chain(nn.Tanh(), 7, 3), gpkit.per_sample_grad_norm(0.5)
    params = list(net.parameters())
    for rows in (1, 1, 1, 2, 2):
        x = samples(4 * rows, 5)

        def losses(x=x, rows=rows):
            return net(x).view(4, 3 * rows).square().sum(1)

        total, own = penalty.with_loss(losses, net), losses()
        norms = [
            sum(g.square().sum() for g in torch.autograd.grad(y, params, create_graph=True))
            for y in own
        ]
        expected = own.mean() + 0.5 * torch.stack(norms).mean()
        torch.testing.assert_close(total, expected)
        pairs = [torch.autograd.grad(y, params) for y in (total, expected)]
        torch.testing.assert_close(*pairs)


def test_a_write_to_a_hidden_value_is_noted(written):
    net, hidden = chain(nn.SiLU(), 7, 3), []

    def output(x):
        hidden.append(net[0](x))
        return net[2](F.silu(hidden[-1]))

    x, t = samples(4, 5), torch.randint(3, (4,))
    penalty = gpkit.weight_grad_norm(0.3)
    for _ in range(3):
        total = penalty.with_loss(lambda: loss_of(output, x, t, "batch")(), net)
        hidden[-1].detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    assert written
