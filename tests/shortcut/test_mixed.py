"""Parts of two gradients are added up in place, and are those that autograd makes one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut import step
from gpkit.shortcut.products import mixed

FRACTION = 1.7


class Net(nn.Module):
    """Layers of all kinds: with and without a bias, one used twice, of steps, and a sparse one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 40, sparse=True)
        self.first, self.second = nn.Linear(40, 50, bias=False), nn.Linear(50, 60)
        self.twice, self.steps = nn.Linear(60, 60), nn.Linear(60, 40)
        self.conv, self.last = nn.Conv1d(1, 20, 3), nn.Linear(20, 70)
        self.idle = nn.Linear(30, 40)

    def forward(self, i):
        h = torch.tanh(self.second(F.silu(self.first(self.table(i)))))
        h = self.twice(torch.tanh(self.twice(h)))
        h = torch.relu(self.steps(h.view(2, -1, 60)).flatten(0, 1))
        h = self.conv(h[:, None]).amax(2) * self.conv.weight.square().sum()
        return self.last(h).square().mean()


@pytest.fixture
def layers(monkeypatch):
    """Return a list with the shapes of the inputs whose products are added in place."""
    for module in (mixed, step):
        monkeypatch.setattr(module, "LARGE", 1000)
    shapes, find = [], mixed.layers_of

    def noting(*args):
        found = find(*args)
        shapes.append(sorted(tuple(layer.a.shape) for layer in found.values()))
        return found

    monkeypatch.setattr(mixed, "layers_of", noting)
    return shapes


def derivatives(y, ends):
    return torch.autograd.grad(y, ends, allow_unused=True)


def as_tensor(number):
    """As on devices that a step does not wait for."""
    return torch.tensor(number, dtype=torch.float64)


@pytest.mark.parametrize("number", [float, as_tensor])
@pytest.mark.parametrize("size", [4, 60])
def test_each_layer_has_its_part_of_both_gradients(size, number, layers):
    net = Net().double()
    x, leaves = torch.randint(9, (size,)), list(net.parameters())
    base = [torch.randn_like(p) for p in leaves]
    grads = [
        torch.zeros_like(p) if g is None else g.to_dense()
        for p, g in zip(leaves, derivatives(net(x), leaves), strict=True)
    ]
    expected = [(1 - FRACTION) * b + FRACTION * g for b, g in zip(base, grads, strict=True)]
    given = [b.clone() for b in base]
    found = mixed.mixed(net(x), leaves, given, number(FRACTION), derivatives)
    for own, true in zip(found, expected, strict=True):
        torch.testing.assert_close(own, true, rtol=1e-12, atol=1e-14)
    joined = [] if size > 4 else [[(4, 20), (4, 40), (4, 50), (4, 60)]]
    assert layers == ([] if number is as_tensor else joined or [[]])
    assert not any(p._backward_hooks for p in leaves)


def test_a_layer_that_no_gradient_reaches_keeps_its_part_of_the_base(layers):
    net = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 1)).double()
    x, leaves = torch.randn(3, 40).double(), list(net.parameters())

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    y = net[1](Nothing.apply(net[0](x))).sum()
    base = [torch.ones_like(p) for p in leaves]
    found = mixed.mixed(y, leaves, base, FRACTION, derivatives)
    assert layers == [[(3, 40)]]
    for own in found[:2]:
        torch.testing.assert_close(own, torch.full_like(own, 1 - FRACTION))


@pytest.mark.parametrize("kept", [True, False])
def test_values_that_hooks_pack_are_not_read(kept, layers):
    """As those of a checkpoint, which are computed again in the backward pass."""
    net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    x, leaves, read = torch.randn(3, 40).double(), list(net.parameters()), []
    hooks = (lambda t: t), (lambda t: read.append(t) or t)
    with torch.autograd.graph.saved_tensors_hooks(*hooks):
        y = net(x).sum()
    mixed.layers_of(y, {id(p): i for i, p in enumerate(leaves)}, leaves)
    assert layers == [[]]
    assert not read


@pytest.mark.parametrize("kinks", [True, False])
def test_a_difference_is_that_of_a_loop(kinks, layers):
    """λ n (∇L(θ + h v) - ∇L(θ)) / h for λ‖∇L‖²/2, in steps that repeat the first."""
    net = nn.Sequential(
        *[nn.Linear(40, 50), nn.ReLU() if kinks else nn.SiLU(), nn.Linear(50, 40, bias=False)],
        *[nn.Tanh(), nn.Linear(40, 1)],
    ).double()
    penalty, h = gpkit.weight_grad_norm(0.3, estimator=gpkit.finite_difference(step=1e-4)), 1e-4
    params = list(net.parameters())
    for _ in range(4):
        x = torch.randn(5, 40).double()
        loss = lambda x=x: net(x).square().mean()  # noqa: E731
        base = torch.autograd.grad(loss(), params)
        n = torch.cat([g.flatten() for g in base]).norm()
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, g in zip(params, base, strict=True):
                p += h * g / n
        there = torch.autograd.grad(loss(), params)
        with torch.no_grad():
            for p, was in zip(params, before, strict=True):
                p.copy_(was)
        found = torch.autograd.grad(penalty.with_loss(loss, net), params)
        for own, here, g in zip(found, base, there, strict=True):
            torch.testing.assert_close(own, here + 0.6 * n * (g - here) / h, rtol=1e-7, atol=1e-9)
    assert layers == [[(5, 40), (5, 50)]] * 3
