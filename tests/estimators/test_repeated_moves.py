"""How weights move and come back in a repeated step, and how its gradients are added."""

import copy
import random
import signal

import pytest
import torch
from compare import gradients, relative_error
from differenced import data, fd, mlp
from repeated import PENALTIES, by_hand, closure_of, loss_of
from torch import nn

import gpkit
from gpkit.shortcut import step
from gpkit.shortcut.products import mixed


def test_the_weights_come_back_if_the_second_pass_fails(no_long_way):
    net, x, penalty, calls = mlp(nn.Tanh()), data(), gpkit.sam(), []

    def closure():
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss_of(net, x)

    for _ in range(2):
        penalty.with_loss(closure, net)
    no_long_way()
    before, places = copy.deepcopy(net.state_dict()), [p.data_ptr() for p in net.parameters()]
    with pytest.raises(KeyboardInterrupt):
        penalty.with_loss(closure, net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert places == [p.data_ptr() for p in net.parameters()]
    assert len(calls) == 6


@pytest.mark.parametrize("name", ["squared", "default step", "norm", "two-sided"])
def test_numbers_stay_tensors_as_on_other_devices(name, no_long_way, monkeypatch):
    """No number of the step is read there, since it would be waited for."""
    build, form = PENALTIES[name]
    net, x, penalty = mlp(nn.ReLU()), data(), build()
    penalty.with_loss(closure_of(net, x), net)
    no_long_way()
    length = lambda parts: torch.stack([g.detach().norm() for g in parts]).norm()  # noqa: E731
    monkeypatch.setattr(step, "length_of", length)
    monkeypatch.setattr(step, "size_of", lambda xs: length(xs) / sum(x.numel() for x in xs) ** 0.5)
    monkeypatch.setattr(step, "fitted", lambda factor, _: factor)
    monkeypatch.setattr(mixed, "LARGE", 10)
    for _ in range(2):
        found = penalty.with_loss(closure_of(net, x), net)
        total, grads = by_hand(net, net(x).square().mean(), form)
        torch.testing.assert_close(found.detach(), total)
        assert relative_error(gradients(found, net), grads) < 1e-5


class Two(nn.Module):
    """Two layers, a tied one, and two parameters whose gradients are one tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.d, self.e = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.c.weight = self.a.weight
        self.b.weight.requires_grad_(False)
        self.double()

    def forward(self, x):
        return self.c((self.a(x) + self.b(x) + (self.d + self.e)).relu())


@pytest.mark.parametrize("least", [1, 5, 100])
@pytest.mark.parametrize("cross", [True, False])
def test_large_gradients_are_added_where_they_are_computed(least, cross, no_long_way, monkeypatch):
    monkeypatch.setattr(step, "LARGE", least)
    monkeypatch.setattr(mixed, "LARGE", least)
    net, x = Two(), data()
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd(1e-7, cross_kinks=cross))
    penalty.with_loss(closure_of(net, x), net)
    no_long_way()
    trained = [p for p in net.parameters() if p.requires_grad]
    for size in (5, 1):
        found = penalty.with_loss(closure_of(net, x[:size]), net)
        total, grads = by_hand(net, net(x[:size]).square().mean(), lambda n: n**2)
        torch.testing.assert_close(found.detach(), total)
        mine = torch.cat([g.flatten() for g in torch.autograd.grad(found, trained)])
        assert relative_error(mine, grads) < 1e-5


@pytest.mark.slow
def test_no_signal_leaves_the_weights_moved():
    def interrupt(*_):
        raise KeyboardInterrupt

    net, x, penalty, rng = mlp(nn.Tanh()), data(), gpkit.sam(), random.Random(0)
    loss = lambda: loss_of(net, x)  # noqa: E731
    for _ in range(3):
        penalty.with_loss(loss, net)
    before, hits = copy.deepcopy(net.state_dict()), 0
    handler = signal.signal(signal.SIGALRM, interrupt)
    for _ in range(2000):
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(5e-5, 1e-3))
            penalty.with_loss(loss, net)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            hits += 1
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    signal.signal(signal.SIGALRM, handler)
    assert hits > 500


def test_weights_that_grow_lengthen_the_step(no_long_way):
    """While they are small, they are looked at in every eighth step."""
    net, x = mlp(nn.Tanh()).float(), data().float()
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd())
    penalty.with_loss(closure_of(net, x), net)
    no_long_way()
    (known,) = penalty.shortcuts.steps.found.values()
    params, step, lengths = list(net.parameters()), 2 * torch.finfo(torch.float32).eps ** 0.5, []
    for _ in range(10):
        lengths.append(known.length_at(params) / step)
        with torch.no_grad():
            for p in params:
                p.mul_(1.5)
    sizes = torch.cat([p.detach().flatten() for p in params])
    assert lengths[0] == 1 < lengths[-1]
    expected = sizes.square().mean().sqrt().item()
    assert known.length_at(params) / step == pytest.approx(expected, rel=1e-5)
    found = gradients(penalty.with_loss(closure_of(net, x), net), net)
    true = by_hand(net, net(x).square().mean(), lambda n: n**2)[1]
    assert relative_error(found, true) < 0.02
