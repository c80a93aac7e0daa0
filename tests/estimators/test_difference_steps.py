"""The step of finite differences: small slopes, inputs of any scale, and steps that disagree."""

import copy
import pickle
import warnings

import pytest
import torch
from compare import gradients, relative_error
from torch import nn

import gpkit


def setting(scale=1.0, slope=1.0, dtype=torch.float32):
    """A smooth net that is used to its inputs, and inputs of that scale."""
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        net[0].weight /= scale
        net[4].weight *= slope
    return net.to(dtype), scale * torch.randn(16, 8, dtype=dtype)


def exact(net, x, offset=0.0):
    """The norms ``[B]`` and the gradient of their mean square, by double backprop in float64."""
    net, x = copy.deepcopy(net).double(), x.double().requires_grad_()
    (g,) = torch.autograd.grad((net(x) + offset).sum(), x, create_graph=True)
    return g.norm(dim=1).detach(), gradients(g.square().sum(1).mean(), net)


def found(net, x, offset=0.0, **options):
    penalty = gpkit.input_grad_norm(1.0, estimator=gpkit.finite_difference(**options))
    terms = penalty.terms(lambda z: net(z).squeeze(1) + offset, x)
    return terms.norms, gradients(terms.penalty, net).double()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("slope", [1.0, 1e-4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 255.0])
def test_inputs_of_any_scale(scale, slope, offset):
    """A difference of losses would be lost in the rounding of the offset: n 100 % off, or 0."""
    net, x = setting(scale, slope)
    norms, gradient = exact(net, x, offset)
    n, g = found(net, x, offset)
    assert relative_error(n.double(), norms) < 1e-5
    assert relative_error(g, gradient) < 0.03


def test_a_table_of_unequal_columns():
    net, x = setting()
    columns = torch.logspace(-3, 3, 8)
    with torch.no_grad():
        net[0].weight /= columns
    x = x * columns
    norms, gradient = exact(net, x)
    n, g = found(net, x)
    assert relative_error(n.double(), norms) < 1e-4
    assert relative_error(g, gradient) < 0.05


def curved(width=32):
    """A net whose gradient turns within a millionth of its weights' length."""
    x = torch.randn(64, 8)
    net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 1))
    return net, lambda: (net(x) * 2e3).sin().mean()


def by_double_backprop(loss, net):
    grads = torch.autograd.grad(loss(), [*net.parameters()], create_graph=True)
    return gradients(sum(g.square().sum() for g in grads), net)


def test_a_curved_net_gets_a_smaller_step():
    net, loss = curved()
    true = by_double_backprop(loss, net)
    fixed = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(7e-4))
    assert relative_error(gradients(fixed(loss, net), net), true) > 0.3
    adapted = gpkit.weight_grad_norm(1.0, estimator="finite_difference")
    for _ in range(2):
        assert relative_error(gradients(adapted(loss, net), net), true) < 0.15


def rough():
    """A loss whose numbers are too coarse for any step."""
    x = torch.randn(64, 8)
    net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    return net, lambda: (1e9 * net(x)).sin().mean()


def test_steps_that_disagree_are_said_once_a_net():
    net, loss = rough()
    penalty = gpkit.weight_grad_norm(1.0, estimator="finite_difference")
    with pytest.warns(
        UserWarning, match=r"at the steps h and h/2 differ by \d+%.*estimator='exact'"
    ):
        penalty(loss, net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        penalty(loss, net)
    other, loss = rough()
    with pytest.warns(UserWarning, match="h and h/2 differ"):
        penalty(loss, other)


def test_checks_at_a_pace_on_request():
    net, loss = rough()
    options = {"step": 7e-4, "check_every": 2}
    penalty = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(**options))
    for said in (True, False, True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            penalty(loss, net)
        assert bool(caught) == said
    with pytest.raises(ValueError, match=r"check_every=\.\.\.\)` must be an integer >= 0"):
        gpkit.finite_difference(check_every=-1)


def test_the_comparison_changes_no_training():
    """Random numbers and buffers are as after a step without it, and copies look for themselves."""
    x = torch.randn(16, 8)
    states = []
    for step in (None, 7e-4):
        torch.manual_seed(3)
        layers = [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)]
        net = nn.Sequential(*layers)
        penalty = gpkit.weight_grad_norm(1.0, estimator=gpkit.finite_difference(step))
        penalty.with_loss(lambda net=net: net(x).square().mean(), net)
        states.append((net.state_dict(), torch.get_rng_state()))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        assert twin.estimator == penalty.estimator
        assert not twin.estimator.factors
