"""What is run again draws the same numbers, starts from the same state, and leaves no trace."""

import random

import numpy as np
import pytest
import torch
from torch import nn

import gpkit


class Noisy(nn.Module):
    """Draws from every stream, and carries a state in an attribute, a list and a buffer."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.h, self.seen = torch.zeros(1), []
        self.own, self.of_numpy = torch.Generator(), np.random.default_rng(0)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        noise = random.random() + np.random.rand() + self.of_numpy.random() + torch.rand(())
        noise = noise + torch.rand((), generator=self.own)
        self.calls, self.h = self.calls + 1, self.h + x.detach().mean()
        self.seen.append(1)
        return self.net(x * noise) + self.h * self.calls + len(self.seen)


def made():
    torch.manual_seed(0)
    return Noisy().double(), torch.randn(5, 3).double()


def streams(net):
    own = [net.own.get_state().tolist(), str(net.of_numpy.bit_generator.state)]
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), *own]


def state(net):
    return [net.h.tolist(), list(net.seen), net.calls.item()]


@pytest.mark.parametrize("where", ["weights", "inputs"])
def test_a_penalty_leaves_every_stream_and_state_alone(where):
    net, x = made()
    before = streams(net), state(net)
    box = [net]
    if where == "weights":
        gpkit.weight_grad_norm(estimator="finite_difference")(lambda: box[0](x).mean(), net)
    else:
        gpkit.input_grad_norm(estimator="finite_difference")(lambda z: box[0](z), x)
    assert (streams(net), state(net)) == before


def test_with_loss_reruns_the_same_function():
    """The gradient is that of a difference whose second loss has the first one's draws."""
    net, x = made()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    penalty = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(1e-5, "central"))
    params = list(net.parameters())
    found = torch.autograd.grad(penalty.with_loss(lambda: net(x).square().mean(), net), params)
    assert state(net)[1:] == [[1], 1.0]  # of one forward pass
    net, x = made()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    params = list(net.parameters())
    loss = net(x).square().mean()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    total = loss + sum(g.square().sum() for g in grads)
    for a, b in zip(found, torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["penalty", "with_loss", "inputs"])
def test_what_cannot_be_repeated_is_refused(how):
    net, counts = nn.Linear(3, 1), iter(range(100))
    x = torch.randn(5, 3)
    penalty = gpkit.weight_grad_norm(estimator="finite_difference")

    def losses(z):
        return net(z).square() * (1 + next(counts))

    calls = {
        "inputs": lambda: gpkit.input_grad_norm(estimator="finite_difference")(losses, x),
        "penalty": lambda: penalty(lambda: losses(x).mean(), net),
        "with_loss": lambda: penalty.with_loss(lambda: losses(x).mean(), net),
    }
    with pytest.raises(RuntimeError, match=r"another value when it is run again .* state"):
        calls[how]()
    gpkit.weight_grad_norm(estimator="exact")(lambda: losses(x).mean(), net)  # as is advised


def test_labels_are_drawn_once_for_all_points():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4).double(), torch.randn(6, 3).double()
    grads = []
    for estimator in ("exact", gpkit.finite_difference(1e-5, "central")):
        value = gpkit.fisher(estimator=estimator, seed=3)(lambda: net(x), net)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, net.parameters())]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["scripted", "traced", "inside"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_net_keeps_its_statistics(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(6, 3).double()
    true = gpkit.r1()(net, real=x)
    made = torch.jit.trace(net.eval(), x) if kind == "traced" else torch.jit.script(net)
    if kind == "traced":
        true = gpkit.r1()(net, real=x)
    made = nn.Sequential(made) if kind == "inside" else made
    before = {k: v.clone() for k, v in made.state_dict().items()}
    torch.testing.assert_close(gpkit.r1()(made, real=x), true)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_a_hook_can_tell_the_pass_of_a_penalty():
    net, seen, x = nn.Linear(3, 1), [], torch.randn(4, 3)
    net.register_forward_hook(lambda *_: seen.append(gpkit.in_penalty()))
    penalty = gpkit.weight_grad_norm(estimator="finite_difference")
    net(x)
    gpkit.r1()(net, real=x)
    gpkit.r1(forward="training")(net, real=x)
    assert seen == [False, True, True]
    penalty.with_loss(lambda: net(x).square().mean(), net)
    assert seen[3] is False
    assert all(seen[4:])
    assert len(seen) > 4
    assert not gpkit.in_penalty()
