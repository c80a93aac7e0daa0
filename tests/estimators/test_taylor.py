"""The estimator that takes derivatives along random directions, by Taylor mode."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from compare import gradients, relative_error
from torch import nn
from torch.func import functional_call

import gpkit
import gpkit.autodiff.taylor.rules  # noqa: F401  registers them

B = 3


def mlp(act):
    return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 4), act, nn.Linear(4, 2))


def test_it_is_exact_for_one_number_and_trains():
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(B, 1).double()
    for order in (1, 2, 5):
        penalty = gpkit.GradientPenalty(order=order, estimator="taylor", weight=2.0)
        found, exact = penalty(net, x), gpkit.GradientPenalty(order=order, weight=2.0)(net, x)
        params = {n: p.detach() for n, p in net.named_parameters()}

        def expected(params, order=order):
            f = partial(functional_call, net, params)
            return 2 * oracles.along(f, order, x, torch.ones_like(x)).square().mean()

        assert relative_error(found, expected(params)) < 1e-10
        assert relative_error(found, exact) < 1e-10
        slope = torch.cat([g.flatten() for g in torch.func.grad(expected)(params).values()])
        assert relative_error(gradients(found, net), slope) < 1e-10


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("order", [1, 2])
def test_what_it_estimates(distribution, order):
    n, samples = 3, 100_000
    H = torch.randn(n, n).double()
    H = H + H.T
    g = torch.randn(n).double()
    frobenius, trace = H.square().sum(), H.trace()
    moment = 2 * frobenius + trace**2
    if distribution == "rademacher":
        moment = moment - 2 * H.diagonal().square().sum()
    elif distribution == "sphere":
        moment = moment * n / (n + 2)
    penalty = gpkit.GradientPenalty(order=order, estimator=gpkit.taylor(1, distribution), seed=1)
    # two outputs, the second three times the first: 1 + 3²
    x = torch.zeros(samples, n).double()
    f = lambda x: ((x @ H * x).sum(1) / 2 + x @ g)[:, None] * torch.tensor([1.0, 3.0]).double()  # noqa: E731
    values = penalty.terms(f, x).values / 10
    expected = moment if order == 2 else g.square().sum()
    assert abs(values.mean() - expected) < 5 * values.std() / samples**0.5
    assert values.std() > 0.01  # fresh for every sample


def test_more_directions():
    x = torch.randn(4, 3).double()
    values = [
        gpkit.GradientPenalty(order=2, estimator=gpkit.taylor(n), seed=1)
        .terms(mlp_of_3, x.repeat(2000, 1))
        .values.reshape(2000, 4)
        for n in (1, 8)
    ]
    ratio = values[0].var(0) / values[1].var(0)
    assert ((ratio > 6.5) & (ratio < 9.5)).all()


W = torch.randn(3, 5).double()


def mlp_of_3(x):
    return torch.tanh(x @ W).sum(1)


def test_no_side_effects_and_the_same_masks_as_the_forward():
    net = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
    ).double()
    x, stream = torch.randn(B, 3).double(), torch.get_rng_state()
    before = {name: (b, b.clone()) for name, b in net.named_buffers()}
    penalty = gpkit.GradientPenalty(order=2, estimator="taylor", seed=0)
    first = penalty(net, real=x)
    first.backward()
    assert torch.equal(torch.get_rng_state(), stream)
    for name, buffer in net.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])
    assert not torch.equal(penalty(net, real=x), first)
    again = gpkit.GradientPenalty(order=2, estimator="taylor", seed=0)
    assert torch.equal(again(net, real=x), first)


@pytest.mark.parametrize("of", ["output", "loss"])
def test_penalized_module(of):
    net = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(B, 1).double(), torch.randn(B, 1).double()
    options = {"of": of, "order": 3, "weight": 0.5}
    losses = [
        gpkit.PenalizedModule(
            net, nn.MSELoss(), gpkit.GradientPenalty(**options, estimator=estimator)
        ).penalized_loss((x, y))
        for estimator in ("taylor", "exact")
    ]
    assert relative_error(*losses) < 1e-10
    assert relative_error(*(gradients(loss, net) for loss in losses)) < 1e-10
    assert losses[0] > F.mse_loss(net(x), y)


def test_refuses_what_is_no_function_of_inputs():
    net, x = mlp(nn.Tanh()), torch.randn(B, 4, requires_grad=True)
    penalty = gpkit.GradientPenalty(order=2, estimator="taylor")
    with pytest.raises(ValueError, match=r"needs a callable.* use penalty\(f, x\)"):
        penalty(net(x), x)
    with pytest.raises(ValueError, match="is for inputs; got weights"):
        gpkit.weight_grad_norm(estimator="taylor")
    with pytest.raises(ValueError, match=r"`estimator=taylor\(\)` estimates the l2 norm; got"):
        gpkit.GradientPenalty(estimator="taylor", form=gpkit.norm(norm="l1"))
    with pytest.raises(ValueError, match=r"`taylor\(n=...\)` must be an integer >= 1; got 0"):
        gpkit.taylor(0)
    with pytest.raises(ValueError, match=r"`taylor\(distribution=...\)` must be one of"):
        gpkit.taylor(distribution="normal")
    with pytest.raises(NotImplementedError, match="'relu' is piecewise"):
        penalty(mlp(nn.ReLU()), x)


@pytest.mark.parametrize("order", [1, 2])
def test_through_layer_norm_at_each_order(order):
    # catches fused kernels at order 1, which have no rule
    net = nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = torch.randn(5, 1, dtype=torch.float64)
    found = gpkit.GradientPenalty(order=order, estimator="taylor")(net, x)

    z = x.clone().requires_grad_()
    h = net[0](z)
    h = h - h.mean(1, keepdim=True)  # torch's third derivative of the fused layer is wrong
    h = h / (h.square().mean(1, keepdim=True) + net[1].eps).sqrt()
    y = net[3](torch.tanh(h * net[1].weight + net[1].bias))
    for _ in range(order):
        (y,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    expected = y.square().mean()
    torch.testing.assert_close(found, expected)
    assert relative_error(gradients(found, net), gradients(expected, net)) < 1e-9


@pytest.mark.parametrize("frozen", [False, True])
def test_an_activation_keeps_its_series_where_nothing_before_it_is_trained(frozen):
    net = nn.Sequential(nn.Linear(1, 4), nn.SiLU(), nn.Linear(4, 1)).double()
    net[0].requires_grad_(not frozen)
    x = torch.randn(5, 1, dtype=torch.float64)
    penalty = gpkit.GradientPenalty(of=gpkit.activation("1"), order=2, estimator="taylor")
    bends = torch.func.vmap(torch.func.hessian(lambda z: F.silu(net[0](z))))(x)  # [5, 4, 1, 1]
    torch.testing.assert_close(penalty.terms(net, x).norms, bends.flatten(1).norm(dim=1))


@pytest.mark.parametrize("n", [1, 3])
def test_the_net_runs_once_for_each_direction(n):
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    runs, x = [], torch.randn(5, 3)
    net.register_forward_hook(lambda *_: runs.append(1))
    penalty = gpkit.curvature(estimator=gpkit.taylor(n))
    penalty(net, x)  # once more: does it repeat?
    runs.clear()
    penalty(net, x)
    assert len(runs) == n


@pytest.mark.parametrize("n", [1, 3])
def test_a_scale_changes_no_value(n):
    x = torch.randn(5, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    penalty = gpkit.GradientPenalty(order=2, estimator=gpkit.taylor(n), seed=0)
    value = penalty.terms(net, x).penalty
    torch.testing.assert_close(penalty(net, x, scale=1024.0), value)
