"""A penalty's own forward leaves no trace, however the net is reached."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import gpkit
from gpkit.autodiff.isolation import isolated

NET = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)).double()


def helper(x):
    return NET(x)


class Owner(nn.Module):
    """Writes to a buffer of its own, outside of any child, and replaces another."""

    def __init__(self):
        super().__init__()
        self.net = NET
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def score(self, x):
        self.calls += 1
        self.last = x.detach().mean()
        return self.net(x)


OWNER = Owner()
REACHED = {
    "module": NET,
    "a helper function": lambda x: helper(x),
    "a list": functools.partial(lambda nets, x: nets[0](x), [NET]),
    "an attribute": SimpleNamespace(f=NET, __call__=None).f.__call__,
    "a method": OWNER.score,
    "functional_call with buffers": functools.partial(
        lambda nets, x: functional_call(nets[0], {"1.running_mean": torch.ones(4).double()}, (x,)),
        [NET],  # which it does not name: the net is seen when it is called, with those buffers
    ),
    "functional_call": lambda x: functional_call(NET, dict(NET.named_parameters()), (x,)),
}


def state():
    buffers = dict(OWNER.named_buffers())
    return {name: (buffer, buffer.clone()) for name, buffer in buffers.items()}


@pytest.mark.parametrize("f", REACHED.values(), ids=REACHED)
def test_buffers_are_the_same_objects_with_the_same_values(f):
    x, before, stream = torch.randn(6, 3).double(), state(), torch.get_rng_state()
    gpkit.r1()(f, real=x).backward()
    after = dict(OWNER.named_buffers())
    assert all(after[name] is buffer for name, (buffer, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())
    assert torch.equal(torch.get_rng_state(), stream)


def test_what_the_penalty_computes_is_the_training_forward():
    """Copies must hold the values: a net in eval mode uses them."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    net(torch.randn(50, 3).double() * 3 + 1)
    net.eval()
    x = torch.randn(6, 3).double().requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x)
    norms = gpkit.r1().terms(net, real=x.detach()).norms
    torch.testing.assert_close(norms, slope.norm(dim=1))


def test_buffers_come_back_after_an_error():
    before = state()

    def broken(x):
        NET(x)
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        gpkit.r1()(broken, real=torch.randn(6, 3).double())
    assert all(dict(OWNER.named_buffers())[name] is buffer for name, (buffer, _) in before.items())


def test_cudnn_is_off_for_recurrent_nets_only(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    seen = []
    rnn, linear = nn.GRU(3, 2), nn.Linear(3, 2)
    for net in (linear, rnn):
        net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
        with isolated(net, 0, torch.device("cpu")):
            net(torch.randn(2, 3))
    assert seen == [torch.backends.cudnn.enabled, False]


def test_a_saved_graph_survives_the_penalty():
    """A copy back into the buffers would spoil what the training forward has saved."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().eval()
    x = torch.randn(6, 3).double()
    loss = net(x).square().mean()
    penalty = gpkit.r1()(net, real=x)
    (loss + penalty).backward()
    assert net[0].weight.grad is not None
