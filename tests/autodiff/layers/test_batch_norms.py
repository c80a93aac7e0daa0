"""The norm of a batch's gradient by Gram matrices in wide layers: equal to the gradient's norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.autodiff.layers import batch

B, WIDTH = 3, 80


class Reused(nn.Module):
    """A wide layer that runs twice, and one whose weight is used outside of its call too."""

    def __init__(self):
        super().__init__()
        self.twice, self.shared = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.twice(self.twice(x).tanh()).tanh()
        return F.linear(self.shared(h).tanh(), self.shared.weight)


NETS = {
    "rows": lambda: (
        nn.Sequential(
            nn.Linear(4, WIDTH),
            nn.ReLU(inplace=True),
            nn.Linear(WIDTH, 90),
            nn.Tanh(),
            nn.Linear(90, 70, bias=False),
        ),
        torch.randn(B, 4),
    ),
    "positions": lambda: (
        nn.Sequential(nn.Linear(WIDTH, 90), nn.LayerNorm(90), nn.SiLU(), nn.Linear(90, WIDTH)),
        torch.randn(B, 2, WIDTH),
    ),
    "a vector": lambda: (nn.Linear(WIDTH, WIDTH), torch.randn(WIDTH)),
    "reused": lambda: (Reused(), torch.randn(B, WIDTH)),
    "batch norm": lambda: (
        nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 9)
        ),
        torch.randn(B, WIDTH),
    ),
}


def scene(kind):
    torch.manual_seed(0)
    net, x = NETS[kind]()
    net, x = net.double(), x.double()
    scale = torch.arange(1.0, 1.0 + len(x), dtype=torch.float64)

    def losses():
        return net(x).flatten(1).square().mean(1) * scale if x.ndim > 1 else net(x).square()

    return net, losses


def by_hand(net, loss):
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True, allow_unused=True)
    return sum(g.square().sum() for g in grads if g is not None)


def grads_of(value, net):
    return torch.autograd.grad(
        value, list(net.parameters()), allow_unused=True, materialize_grads=True
    )


CALLS = {
    "closure": lambda penalty, net, losses: penalty(lambda: losses().mean(), net),
    "losses": lambda penalty, net, losses: penalty(losses, net),
    "with_loss": lambda penalty, net, losses: (
        penalty.with_loss(lambda: losses().mean(), net) - losses().mean()
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", NETS)
def test_the_norm_is_that_of_the_gradient(kind, call):
    net, losses = scene(kind)
    got = CALLS[call](gpkit.weight_grad_norm(weight=1.0), net, losses)
    want = by_hand(net, losses().mean())
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    for g, w in zip(grads_of(got, net), grads_of(want, net), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "products"), [("rows", 2), ("positions", 2), ("reused", 0)])
def test_wide_layers_have_no_gradient_computed(kind, products, monkeypatch):
    calls = []
    real = batch.gram_product
    monkeypatch.setattr(batch, "gram_product", lambda *a: calls.append(a) or real(*a))
    net, losses = scene(kind)
    gpkit.weight_grad_norm()(losses, net)
    assert len(calls) == products


def test_a_frozen_layer_and_a_pattern_of_names_leave_parameters_out():
    net, losses = scene("rows")
    net[2].weight.requires_grad_(False)
    got = gpkit.weight_grad_norm(weight=1.0, match="[24].*")(losses, net)
    grads = torch.autograd.grad(losses().mean(), [net[2].bias, net[4].weight], create_graph=True)
    torch.testing.assert_close(got, sum(g.square().sum() for g in grads))


def test_two_penalties_share_one_forward_pass():
    net, losses = scene("rows")
    both = gpkit.sum([gpkit.weight_grad_norm(weight=2.0), gpkit.per_sample_grad_norm(weight=3.0)])
    got = both.with_loss(losses, net)
    each = torch.stack([by_hand(net, loss) for loss in losses()])
    want = losses().mean() + 2 * by_hand(net, losses().mean()) + 3 * each.mean()
    torch.testing.assert_close(got, want)
    for g, w in zip(grads_of(got, net), grads_of(want, net), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_a_module_takes_them_from_its_own_forward_pass(scope):
    net, _ = scene("rows")
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(0, 70, (B,))
    penalty = gpkit.weight_grad_norm(weight=1.0, scope=scope)
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)
    passes = []
    net.register_forward_hook(lambda *_: passes.append(1))
    got = module.penalized_loss((x, y))
    assert len(passes) == 1
    each = F.cross_entropy(net(x), y, reduction="none")
    want = by_hand(net, each.mean())
    if scope == "sample":
        want = torch.stack([by_hand(net, loss) for loss in each]).mean()
    torch.testing.assert_close(got, each.mean() + want)
