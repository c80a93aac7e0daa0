"""A call with a closure and a module that repeats an earlier one is right, and is short."""

import copy

import pytest
import torch
from exact_steps import SCOPES, loss_of
from plain_critics import chain
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.shortcut.exact_steps import ExactStep

LAMBDA = 0.3


class Images(nn.Module):
    """A net that is no chain, with code of the user's own."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.softplus(self.conv(x[:, None])).mean(2))


NETS = {
    "chain": lambda: chain(nn.SiLU(), 7, 6, 3),
    "relu": lambda: chain(nn.ReLU(), 7, 6, 3),
    "wide": lambda: chain(nn.Tanh(), 90, 80, 3),
    "convolutions": lambda: Images().double(),
}


def by_hand(net, losses, scope):
    """Return the penalty of losses, sample by sample, and its gradients in the parameters."""
    params = [p for p in net.parameters() if p.requires_grad]
    groups = losses.unbind() if scope == "sample" else [losses.mean()]
    n2 = []
    for y in groups:
        grads = torch.autograd.grad(y, params, create_graph=True, allow_unused=True)
        n2.append(sum(g.square().sum() for g in grads if g is not None))
    total = LAMBDA * torch.stack(n2).mean()
    return total, torch.autograd.grad(total, params, allow_unused=True)


def require_right(penalty, net, closure, losses, scope):
    params = [p for p in net.parameters() if p.requires_grad]
    found = penalty(closure, net)
    expected, grads = by_hand(net, losses, scope)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, params, allow_unused=True), grads, strict=True):
        torch.testing.assert_close(*(torch.zeros(()) if g is None else g for g in (a, b)))


def batch(size):
    scale = torch.linspace(0.2, 3, size)[:, None]
    return (scale * torch.randn(size, 5)).double(), torch.randint(3, (size,))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NETS)
def test_a_call_that_repeats_an_earlier_one_is_that_of_a_loop(name, scope, looks):
    net, penalty = NETS[name](), SCOPES[scope][0](LAMBDA)
    for size in (4, 4, 3, 70):
        x, t = batch(size)
        losses = F.cross_entropy(net(x), t, reduction="none")
        require_right(penalty, net, loss_of(net, x, t, scope), losses, scope)
    assert len(looks) == 1
    assert penalty.step == penalty.draws == 4


@pytest.mark.parametrize("name", ["chain", "convolutions"])
def test_a_loss_that_is_linear_in_the_outputs(name, looks):
    net, penalty = NETS[name](), gpkit.weight_grad_norm(LAMBDA)
    for size in (4, 4, 3):
        x, _ = batch(size)
        require_right(penalty, net, lambda x=x: net(x)[:, 1].mean(), net(x)[:, 1], "batch")
    assert len(looks) == 1


@pytest.mark.parametrize("scope", SCOPES)
def test_what_changes_is_seen(scope):
    """Frozen and replaced weights, another loss, another form, and a weight that is zero."""
    net, penalty = chain(nn.SiLU(), 7, 6, 3), SCOPES[scope][0](LAMBDA)
    other = {"factor": 1.0}

    def freeze():
        net[0].requires_grad_(False)

    def replace():
        net[4] = nn.Linear(6, 3).double()

    def twice():
        other["factor"] = 2.0

    for change in (None, None, freeze, None, replace, None, twice, None):
        if change:
            change()
        x, t = batch(4)

        def each(x=x, t=t):
            found = F.cross_entropy(net(x), t, reduction="none")
            return found * found if other["factor"] == 2 else found

        closure = each if scope == "sample" else lambda each=each: each().mean()
        require_right(penalty, net, closure, each(), scope)
    penalty.weight = 0.0
    assert penalty(closure, net) == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_the_first_call_has_the_bits_of_a_later_one_and_masks_of_its_own(scope):
    net = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.SiLU(), nn.Linear(7, 3))
    for own in (net, chain(nn.SiLU(), 7, 6, 3).float()):
        later, params = SCOPES[scope][0](LAMBDA, seed=4), list(own.parameters())
        x, t = torch.randn(4, 5), torch.randint(3, (4,))
        closure = loss_of(own, x, t, scope)
        for step in range(4):
            first = copy.deepcopy(later)  # without what it knows
            torch.manual_seed(step)
            before = torch.get_rng_state()
            found = [p(closure, own) for p in (first, later)]
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(*found)
            grads = [torch.autograd.grad(y, params, allow_unused=True) for y in found]
            for a, b in zip(*grads, strict=True):
                assert (a is b is None) or torch.equal(a, b)
        assert first.state_dict() == later.state_dict()


def test_a_third_derivative_and_the_graph_that_is_kept():
    net, penalty = chain(nn.SiLU(), 7, 3), gpkit.weight_grad_norm(LAMBDA)
    params, (x, t) = list(net.parameters()), batch(4)

    def twice(total):
        grads = torch.autograd.grad(total, params, create_graph=True, allow_unused=True)
        length = sum(g.square().sum() for g in grads if g is not None)
        return torch.autograd.grad(length, params, allow_unused=True)

    for _ in range(3):
        found = twice(penalty(loss_of(net, x, t, "batch"), net))
        grads = torch.autograd.grad(F.cross_entropy(net(x), t), params, create_graph=True)
        for a, b in zip(found, twice(LAMBDA * sum(g.square().sum() for g in grads)), strict=True):
            torch.testing.assert_close(a, b)
        total = penalty(loss_of(net, x, t, "batch"), net)
        total.backward(retain_graph=True)
        total.backward()
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            total.backward()


def test_a_closure_that_fails_leaves_the_state_of_the_call_before(looks):
    net, penalty, fails = chain(nn.SiLU(), 7, 3), gpkit.weight_grad_norm(LAMBDA), []
    x, t = batch(4)

    def closure():
        if fails:
            raise KeyError("no batch")
        return F.cross_entropy(net(x), t)

    for _ in range(2):
        penalty(closure, net)
    fails.append(True)
    with pytest.raises(KeyError, match="no batch"):
        penalty(closure, net)
    fails.clear()
    require_right(penalty, net, closure, F.cross_entropy(net(x), t, reduction="none"), "batch")
    assert not gpkit.in_penalty()


def test_a_loss_that_differs_in_each_call_is_soon_not_looked_at_any_more(monkeypatch):
    """A look at its chain takes a gradient more."""
    net, penalty, count = chain(nn.SiLU(), 7, 6, 3), gpkit.weight_grad_norm(LAMBDA), [0]
    x, t = batch(4)
    looked, after = [], ExactStep.after
    monkeypatch.setattr(ExactStep, "after", lambda *given: looked.append(1) or after(*given))

    def closure():
        found = F.cross_entropy(net(x), t)
        for _ in range(count[0] % 3):
            found = found * 1.5
        return found

    for i in range(12):
        count[0] = i
        assert penalty(closure, net).isfinite()
    assert len(looked) <= 6
