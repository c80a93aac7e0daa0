"""Finite differences of samples of which only the mean loss is known: one number, B samples."""

import pytest
import torch
from torch import nn

import gpkit
from gpkit.autodiff.random import random_state
from gpkit.estimators.base import Recomputable

B, SLOPES = 5, torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)  # unequal


def average(use):
    """A centre that is ½·0.2 + ½·mean n in this call, or 0.2 before it."""
    return lambda **o: gpkit.two_sided(gpkit.running_average(0.5, 0.2, use=use), **o)


FORMS = {
    "squared": (gpkit.squared, lambda n: n**2),
    "two_sided": (lambda **o: gpkit.two_sided(0.3, **o), lambda n: (n - 0.3) ** 2),
    "norm": (gpkit.norm, lambda n: n),
    "constant": (average("constant"), lambda n: (n - 0.1 - n.detach().mean() / 2) ** 2),
    "graph": (average("graph"), lambda n: (n - 0.1 - n.mean() / 2) ** 2),
    "before": (average("before"), lambda n: (n - 0.2) ** 2),
    "one_sided": (lambda **o: gpkit.one_sided(0.3, **o), lambda n: (n - 0.3).relu() ** 2),
}
NORMS = {
    "l2": lambda g: g.norm(dim=1),
    "l1": lambda g: g.abs().sum(1),
    "linf": lambda g: g.abs().amax(1),
}
REDUCE = {"mean": torch.mean, "max": torch.max}


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return net, torch.randn(B, 3, dtype=torch.float64)


def mean_loss(net, x):
    return (SLOPES * net(x).squeeze(1).sin()).mean()


def exact(form, norm, reduce="mean"):
    """The value and its gradient, by double backprop in plain torch: of B·L in each sample."""
    net, x = setting()
    x.requires_grad_()
    (g,) = torch.autograd.grad(B * mean_loss(net, x), x, create_graph=True)
    value = REDUCE[reduce](FORMS[form][1](NORMS[norm](g)))
    return value, torch.cat(
        [p.flatten() for p in torch.autograd.grad(value, [*net.parameters()])[:3]]
    )


def difference(form, norm, step, side, reduce="mean", factor=1.0):
    net, x = setting()
    x.requires_grad_()
    estimator = gpkit.finite_difference(step, side)
    penalty = gpkit.input_grad_norm(
        1.0, form=FORMS[form][0](norm=norm), estimator=estimator, reduce=reduce
    )

    def again(z):
        return mean_loss(net, z)

    given = Recomputable(again(x), again, random_state(x.device), mean=True)
    value = penalty(given, x)
    grads = torch.autograd.grad(factor * value, [*net.parameters()][:3])
    return value, torch.cat([g.flatten() for g in grads])


kinds = [(f, n, "mean") for f in FORMS for n in NORMS] + [("two_sided", "l2", "max")]


@pytest.mark.parametrize(("form", "norm", "reduce"), kinds)
@pytest.mark.parametrize(("side", "power"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_the_gradient_tends_to_the_exact_one(form, norm, reduce, side, power):
    """The value is that of double backprop whatever h; the gradient's error falls as h or h²."""
    true_value, true = exact(form, norm, reduce)
    errors = []
    for step in (4e-3, 2e-3):
        value, grad = difference(form, norm, step, side, reduce)
        assert value.item() == pytest.approx(true_value.item(), rel=1e-12)
        errors.append((grad - true).norm().item())
    assert errors[0] < 0.02 * true.norm()
    assert errors[0] / errors[1] == pytest.approx(2.0**power, rel=0.15)


def test_the_gradient_scales_with_the_factor_of_the_penalty():
    _, once = difference("two_sided", "l2", 1e-3, "forward")
    _, thrice = difference("two_sided", "l2", 1e-3, "forward", factor=3.0)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=0)


def test_a_sample_without_a_slope_is_zero_and_finite():
    net, x = setting()
    x.requires_grad_()

    def again(z):
        return (torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]).double() * net(z).squeeze(1)).mean()

    given = Recomputable(again(x), again, random_state(x.device), mean=True)
    penalty = gpkit.input_grad_norm(form="norm", estimator="finite_difference")
    terms = penalty.terms(given, x)
    grads = torch.autograd.grad(terms.penalty, [*net.parameters()][:3])
    assert terms.norms[0] == 0
    assert (terms.norms[1:] > 0).all()
    assert all(g.isfinite().all() for g in grads)
