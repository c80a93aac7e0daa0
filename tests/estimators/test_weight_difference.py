"""In few passes over the weights: loss and penalty have one gradient, which is handed out."""

import pytest
import torch
from torch import nn

import gpkit
from gpkit.autodiff.known_gradient import owns_memory, perturbed

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
    (g,) = torch.autograd.grad(penalty.with_loss(loss, net), c)
    grads = torch.autograd.grad(loss(), list(net.parameters()))
    n = sum(g.square().sum() for g in grads).sqrt()
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


def test_a_step_needs_one_copy_of_the_weights_beside_two_gradients():
    """By torch's own count of what is allocated, in a net whose weights are all that is large."""
    net = nn.Linear(512, 512, bias=False)
    x, penalty = torch.randn(2, 512), gpkit.gnp()
    copy = net.weight.numel() * 4

    def step():
        net.weight.grad = None
        penalty.with_loss(lambda: net(x).square().mean(), net).backward()

    for _ in range(2):
        step()
    with torch.profiler.profile(profile_memory=True) as prof:
        step()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 3.2 * copy
    assert held < 1.2 * copy  # .grad


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
