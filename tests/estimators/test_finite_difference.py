"""Finite differences tend to the exact penalty as the step shrinks."""

import copy

import oracles
import pytest
import torch
from compare import gradients, relative_error
from differenced import FORMS, data, fd, kinds, mlp, penalise, sides
from torch import nn

import gpkit


def references(net, x, loss, form=lambda n: n**2):
    """Return the weight penalty's value and gradient, by torch.func."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def total(params):
        def of(p):
            return loss(torch.func.functional_call(net, p, (x,)))

        return 0.7 * form(oracles.weight_norm(of, params)).mean()

    grads, value = torch.func.grad_and_value(total)(params)
    return value, torch.cat([g.flatten() for g in grads.values()])


@sides
@pytest.mark.parametrize("form", FORMS)
def test_converges_in_the_weights(side, form):
    # catches a factor of two, a step that is not of unit direction, and a lost form
    net, x = mlp(), data()
    axis, function = FORMS[form]
    value, true = references(net, x, lambda y: y.square().mean(), function)
    errors = []
    for h in (1e-2, 1e-3):
        found = penalise("weight", net, x, fd(h, side), form=axis)
        assert relative_error(found, value) < 1e-12  # the value is the gradient's own norm
        errors.append(relative_error(gradients(found, net), true))
    order = torch.tensor(errors[0] / errors[1]).log10()
    assert order.item() == pytest.approx(2 if side == "central" else 1, abs=0.1)
    assert errors[1] < (1e-5 if side == "central" else 1e-2)


@sides
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_converges_in_the_inputs(side, norm):
    net, x = mlp(), data()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def total(params):
        def f(x):
            return torch.func.functional_call(net, params, (x[None],)).square().sum()

        return 0.7 * oracles.input_norms(f, 1, x, norm=norm).square().mean()

    grads, value = torch.func.grad_and_value(total)(params)
    true = torch.cat([g.flatten() for g in grads.values()])
    errors = []
    for h in (1e-2, 1e-3):
        found = penalise("input", net, x, fd(h, side), form=gpkit.squared(norm=norm))
        errors.append((relative_error(found, value), relative_error(gradients(found, net), true)))
    for first, second in zip(*errors, strict=True):
        order = torch.tensor(first / second).log10()
        assert order.item() == pytest.approx(2 if side == "central" else 1, abs=0.15)
    assert errors[1][1] < (1e-4 if side == "central" else 2e-2)


@kinds
@sides
@pytest.mark.parametrize(("dtype", "bounds"), [(torch.float32, 5e-3), (torch.float64, 1e-6)])
def test_default_step_is_near_the_best(kind, side, dtype, bounds):
    net, x = mlp(), data()
    exact = gradients(penalise(kind, net, x, "exact"), net)
    twin, x = copy.deepcopy(net).to(dtype), x.to(dtype)

    def error(h):
        return relative_error(gradients(penalise(kind, twin, x, fd(h, side)), twin).double(), exact)

    default = error(None)
    assert default < bounds
    assert default < 20 * min(error(10.0**-k) for k in range(1, 9))


def test_default_step_grows_with_the_numbers():
    # pixels of 255 in float32: a step of 7e-4 would be lost in their rounding
    net, x = mlp(dtype=torch.float32), 255 * data(torch.float32)
    with torch.no_grad():
        net[0].weight /= 255
    exact = gradients(penalise("input", net, x, "exact"), net)
    found = gradients(penalise("input", net, x, "finite_difference"), net)
    assert relative_error(found, exact) < 1e-2


@sides
def test_linear_regression_is_exact(side):
    # ∇L is linear, so that the difference is 2H∇L whatever the step
    X, t = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value, gradient = oracles.regression(X, t, w.detach())
    penalty = gpkit.weight_grad_norm(weight=1.0, estimator=fd(0.5, side))
    found = penalty(lambda: (X @ w - t).square().sum() / 14, [w])
    assert relative_error(found, value) < 1e-12
    assert relative_error(torch.autograd.grad(found, w)[0], gradient) < 1e-12


@kinds
def test_piecewise_linear_value_is_right(kind):
    net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 1)).double()
    x = data()
    exact, found = (
        gpkit.GradientPenalty(wrt=kind, estimator=e)(
            net if kind == "input" else lambda: net(x).mean(), x if kind == "input" else net
        )
        for e in ("exact", "finite_difference")
    )
    assert relative_error(found, exact) < 1e-7


def test_subset_is_moved_and_all_are_trained():
    # d‖g_P‖²/dθ = 2 H[:, P] g_P: catches a step along the whole gradient, or a part of the rows
    net, x = mlp(), data()
    both = [
        gradients(
            gpkit.weight_grad_norm(match="2.*", estimator=e)(lambda: net(x).square().mean(), net),
            net,
        )
        for e in ("exact", fd(1e-5, "central"))
    ]
    assert relative_error(both[1], both[0]) < 1e-7
    assert all(part.any() for part in both[1].split([24, 28, 5]))
    by_list = gpkit.weight_grad_norm(estimator=fd(1e-5, "central"))(
        lambda: net(x).square().mean(), net[2].parameters()
    )
    torch.testing.assert_close(gradients(by_list, net), both[1])


def test_scope_sample():
    net, x = mlp(), data()
    exact, found = (
        gradients(
            gpkit.weight_grad_norm(scope="sample", estimator=e)(
                lambda: net(x).square().squeeze(1), net
            ),
            net,
        )
        for e in ("exact", fd(1e-5, "central"))
    )
    assert relative_error(found, exact) < 1e-7


def test_several_inputs_have_one_step():
    net, x = mlp(), data()
    whole = gradients(penalise("input", net, x, fd(0.1)), net)
    pair = gpkit.input_grad_norm(weight=0.7, estimator=fd(0.1))(
        lambda a, b: net(torch.cat([a, b], 1)).square().squeeze(1), (x[:, :1], x[:, 1:])
    )
    torch.testing.assert_close(gradients(pair, net), whole)


@kinds
@sides
@pytest.mark.parametrize("form", FORMS)
def test_a_zero_gradient_is_harmless(kind, side, form):
    net, x = mlp(), data()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    found = penalise(kind, net, x, fd(None, side), form=FORMS[form][0])
    assert found.item() == pytest.approx(0.7 * 0.16 if form == "two_sided" else 0.0)
    assert gradients(found, net).isfinite().all()


@kinds
def test_nan_is_not_masked(kind):
    net, x = mlp(), data()
    x[0] = torch.nan
    assert penalise(kind, net, x, "finite_difference").isnan()
