"""A hook on a parameter acts on the gradient that trains, once, and the penalty is without it."""

import copy

import by_hand
import pytest
import torch
from fits import LAMBDA, assert_trained_as, batches, callback, fit, one_rank
from modules import SGD, Plain
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut.products import summed

TIMES = 0.5


def built():
    """Return a net with a wide layer, for Gram matrices and summed products, and a batch."""
    torch.manual_seed(0)
    layers = nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 80), nn.Tanh(), nn.Linear(80, 3)
    return nn.Sequential(*layers).double(), *batches(1)[0]


def norm_of_batch(net, x, y):
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
    return loss + LAMBDA * by_hand.squares(grads)


def norms_of_samples(net, x, y):
    losses, n2 = F.cross_entropy(net(x), y, reduction="none"), 0
    for own in losses:
        grads = torch.autograd.grad(own, list(net.parameters()), create_graph=True)
        n2 = n2 + by_hand.squares(grads) / len(x)
    return losses.mean() + LAMBDA * n2


def with_loss(penalty, reduction="mean"):
    loss = lambda net, x, y: F.cross_entropy(net(x), y, reduction=reduction)  # noqa: E731
    return lambda net, x, y: penalty.with_loss(lambda: loss(net, x, y), net)


def added(penalty, *, closure=False):
    def total(net, x, y):
        loss = F.cross_entropy(net(x), y)
        again = lambda: F.cross_entropy(net(x), y)  # noqa: E731
        return loss + (penalty(again, net) if closure else penalty(loss, list(net.parameters())))

    return total


def difference():
    return gpkit.weight_grad_norm(LAMBDA, estimator=gpkit.finite_difference(by_hand.STEP))


def by_difference(net, x, y):
    return by_hand.weight_difference(net, x, y, LAMBDA, 1.0)


WAYS = {
    "with_loss": (lambda: with_loss(gpkit.weight_grad_norm(LAMBDA)), norm_of_batch),
    "of a loss": (lambda: added(gpkit.weight_grad_norm(LAMBDA)), norm_of_batch),
    "closure": (lambda: added(gpkit.weight_grad_norm(LAMBDA), closure=True), norm_of_batch),
    "samples": (lambda: with_loss(gpkit.per_sample_grad_norm(LAMBDA), "none"), norms_of_samples),
    "difference": (lambda: with_loss(difference()), by_difference),
    "difference, closure": (lambda: added(difference(), closure=True), by_difference),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_acts_once(way, monkeypatch):
    monkeypatch.setattr(summed, "LARGE", 1000)
    (net, x, y), (make, oracle) = built(), WAYS[way]
    alone, ours, seen = copy.deepcopy(net), make(), []
    params = list(net.parameters())
    expected = torch.autograd.grad(oracle(alone, x, y), list(alone.parameters()))
    times = lambda g: seen.append(g) or TIMES * g  # noqa: E731
    handles = [p.register_hook(times) for p in params]
    for _ in range(3):  # the first takes the long way
        seen.clear()
        net.zero_grad()
        ours(net, x, y).backward()
        assert len(seen) == len(params)
        for p, g in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, TIMES * g, rtol=1e-9, atol=1e-12)
    handles[0].remove()  # what is left of them stays
    net.zero_grad()
    ours(net, x, y).backward()
    for p, g, times in zip(params, expected, [1.0, *[TIMES] * 5], strict=True):
        torch.testing.assert_close(p.grad, times * g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_a_hook_acts_once_in_a_fit_with_the_callback(estimator):
    class Hooked(Plain):
        def on_fit_start(self):
            for p in self.parameters():
                p.register_hook(lambda g: TIMES * g)

    net, _, _ = built()
    total = by_hand.TOTALS["weight", estimator]
    slower = lambda params: SGD(params, lr=TIMES * SGD.keywords["lr"])  # noqa: E731
    true = by_hand.train(net, one_rank(batches()), total, LAMBDA, slower, windows=[1] * 6)
    assert_trained_as(fit(Hooked(net), callback("weight", estimator), batches()), true)


@pytest.mark.parametrize("estimator", ["exact", gpkit.finite_difference(by_hand.STEP)])
def test_a_hook_acts_once_in_a_penalized_module(estimator):
    net, x, y = built()
    penalty = gpkit.weight_grad_norm(LAMBDA, estimator=estimator)
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)
    oracle = norm_of_batch if estimator == "exact" else by_difference
    expected = torch.autograd.grad(oracle(net, x, y), list(net.parameters()))
    for p in net.parameters():
        p.register_hook(lambda g: TIMES * g)
    for _ in range(3):
        net.zero_grad()
        module.penalized_loss((x, y)).backward()
        for p, g in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, TIMES * g, rtol=1e-9, atol=1e-12)


def test_a_hook_on_scores_is_a_part_of_the_graph():
    x, w = torch.randn(4, 3).double(), torch.ones(3).double().requires_grad_()
    x.requires_grad_()
    h = x * w
    h.register_hook(lambda g: TIMES * g)
    n2 = gpkit.input_grad_norm().terms(h.sum(1), x).squared_norms
    torch.testing.assert_close(n2, torch.full((4,), 3 * TIMES**2).double())


def test_hooks_are_back_where_a_gradient_fails():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise RuntimeError("no")

    w, seen = torch.ones(3, requires_grad=True), []
    w.register_hook(seen.append)
    with pytest.raises(RuntimeError, match="no"):
        gpkit.weight_grad_norm()(Fails.apply(w * 2).sum(), [w])
    w.sum().backward()
    assert len(seen) == 1
