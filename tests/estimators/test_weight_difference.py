"""In few passes over the weights: loss and penalty have one gradient, which is handed out."""

import copy

import pytest
import torch
from torch import nn

import gpkit
from gpkit.estimators.differences.moves import owns_memory, perturbed

H = 1e-7


def setting(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.SiLU(), nn.Flatten(), nn.Linear(12, 1)).to(dtype)
    x = torch.randn(5, 2, 4, 4, dtype=dtype) * torch.arange(1, 6).reshape(5, 1, 1, 1)
    return net, x, lambda: net(x).square().mean()


def exact(loss, net, value):
    """The gradient of loss + value(‖∇L‖²), by torch alone."""
    params = list(net.parameters())
    y = loss()
    n2 = sum(g.square().sum() for g in torch.autograd.grad(y, params, create_graph=True))
    return torch.autograd.grad(y + value(n2), params)


@pytest.mark.parametrize("side", ["forward", "backward", "central"])
@pytest.mark.parametrize("form", ["squared", "norm"])
@pytest.mark.parametrize("together", [True, False])
def test_the_gradient_of_loss_and_penalty(side, form, together):
    net, _, loss = setting()
    penalty = gpkit.weight_grad_norm(
        0.3, form=form, estimator=gpkit.finite_difference(H, side=side)
    )
    total = penalty.with_loss(loss, net) if together else loss() + penalty(loss, net)
    found = torch.autograd.grad(total, list(net.parameters()))
    true = exact(loss, net, lambda n2: 0.3 * (n2 if form == "squared" else n2.sqrt()))
    for g, t in zip(found, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-5)


def test_a_form_with_a_graph_of_its_own_keeps_it():
    net, _, loss = setting()
    c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    penalty = gpkit.weight_grad_norm(
        0.3, form=gpkit.two_sided(c), estimator=gpkit.finite_difference(H)
    )
    grads = torch.autograd.grad(loss(), list(net.parameters()))
    n = sum(g.square().sum() for g in grads).sqrt()
    for _ in range(3):
        (g,) = torch.autograd.grad(penalty.with_loss(loss, net), c)
        torch.testing.assert_close(g, 0.3 * 2 * (0.5 - n), rtol=1e-6, atol=0)


def test_two_penalties_share_the_gradients_of_the_loss():
    net, _, loss = setting()
    fd = gpkit.finite_difference(H)
    parts = {n: gpkit.weight_grad_norm(0.1, estimator=fd, name=n) for n in ("a", "b")}
    total = gpkit.sum(parts).with_loss(loss, net)
    found = torch.autograd.grad(total, list(net.parameters()))
    for g, t in zip(found, exact(loss, net, lambda n2: 0.2 * n2), strict=True):
        torch.testing.assert_close(g, t, rtol=1e-3, atol=1e-5)


def test_a_total_is_differentiated_twice_and_scaled():
    net, _, loss = setting()
    params = list(net.parameters())
    total = gpkit.gnp(r=H).with_loss(loss, net)
    first = torch.autograd.grad(total, params, retain_graph=True)
    again = torch.autograd.grad(3 * total, params)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_a_backward_pass_gives_the_gradient_away_once():
    net, _, loss = setting()
    total = gpkit.gnp(r=H).with_loss(loss, net)
    total.backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        total.backward()


class Shared(nn.Module):
    """Two weights have one gradient in one memory, and that of a third is one number."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(2, 3).double()) for _ in range(3))

    def forward(self, x):
        return (x @ (self.a + self.b)).tanh().sum(1).square().mean() + 0.3 * self.c.sum()


@pytest.mark.parametrize("which", ["net", "parameters"])
def test_gradients_in_one_memory(which):
    net, x, penalty = Shared(), torch.randn(5, 2).double(), gpkit.gnp(weight=0.3, r=1e-6)
    of = net if which == "net" else list(net.parameters())
    for _ in range(3):
        total = penalty.with_loss(lambda: net(x), of)
        found = torch.autograd.grad(total, list(net.parameters()))
        for g, t in zip(found, exact(lambda: net(x), net, lambda n2: 0.3 * n2.sqrt()), strict=True):
            torch.testing.assert_close(g, t, rtol=1e-4, atol=1e-7)


def test_sparse_gradients():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Embedding(7, 4, sparse=s), nn.Linear(4, 1)) for s in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    sparse, dense = (net.double() for net in nets)
    x, penalty = torch.randint(7, (6, 3)), gpkit.gnp(weight=0.3, r=1e-6)
    true = exact(lambda: dense(x).tanh().square().mean(), dense, lambda n2: 0.3 * n2.sqrt())
    for _ in range(3):
        sparse.zero_grad()
        penalty.with_loss(lambda: sparse(x).tanh().square().mean(), sparse).backward()
        for p, t in zip(sparse.parameters(), true, strict=True):
            torch.testing.assert_close(p.grad, t, rtol=1e-4, atol=1e-7)


def test_no_gradient_is_zero_and_not_a_number():
    net, x, _ = setting()
    total = gpkit.gnp().with_loss(lambda: 0 * net(x).mean(), net)
    assert all(not g.any() for g in torch.autograd.grad(total, list(net.parameters())))


def test_weights_come_back_as_they_were():
    whole = torch.arange(6.0)
    tied = nn.Parameter(whole[:3]), nn.Parameter(whole[:3])  # they share memory
    own = nn.Parameter(torch.ones(2))
    assert [owns_memory(p) for p in (*tied, own)] == [False, False, True]
    for params in ([own], [own, *tied]):
        places = [p.data_ptr() for p in params]
        with perturbed(params, [torch.full_like(p, 0.5) for p in params], swap=True):
            assert own.tolist() == [1.5, 1.5]
        assert [p.data_ptr() for p in params] == places
        assert own.tolist() == [1, 1]
        assert whole.tolist() == [0, 1, 2, 3, 4, 5]


def peak_of(step):
    """Return the peak of what a step allocates beyond what there was, by torch's own count."""
    with torch.profiler.profile(profile_memory=True) as prof:
        step()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", ["sam", "gnp", "weight_grad_norm"])
def test_a_step_needs_one_copy_of_the_weights(name):
    """Beside .grad: the moved weights. The gradient there is added to the one here in place.

    SAM's is the gradient there alone, so that before is let go of.
    """
    layers = [nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256, bias=False), nn.ReLU()]
    net = nn.Sequential(*[copy.deepcopy(layer) for _ in range(4) for layer in layers])
    x, weights = torch.randn(2, 256), 8 * 256 * 256 * 4
    differences = {"estimator": "finite_difference"} if name == "weight_grad_norm" else {}
    penalty = getattr(gpkit, name)(**differences)

    def step():
        net.zero_grad()
        penalty.with_loss(lambda: net(x).square().mean(), net).backward()

    first = peak_of(step)
    net.zero_grad()
    assert weights < peak_of(step) < 2.05 * weights  # .grad is one
    compares = name == "weight_grad_norm"  # two differences
    assert first < (4.3 if compares else 3.3) * weights


@pytest.mark.parametrize("how", ["closure", "with_loss"])
def test_within_autocast_which_keeps_the_casts_of_weights(how):
    """Its cache holds the weights before the move; with them the difference was zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 3))
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    params = list(net.parameters())

    def closure():
        return nn.functional.cross_entropy(net(x).float(), y)

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, params)])

    loss = closure()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    wanted = sum(g.square().sum() for g in grads) + (loss if how == "with_loss" else 0)
    penalty = gpkit.weight_grad_norm(1.0, estimator="finite_difference")
    with torch.autocast("cpu", torch.bfloat16):
        found = penalty(closure, net) if how == "closure" else penalty.with_loss(closure, net)
        assert torch.is_autocast_cache_enabled()
    wanted = gradient(wanted)
    assert (gradient(found) - wanted).norm() < 0.15 * wanted.norm()
