"""The norm of a mean gradient: of micro-batches that came one by one."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import gpkit
from gpkit.autodiff.random import random_state
from gpkit.estimators.base import Recomputable
from gpkit.estimators.window import Window, summarised

A = 3
NORMS = {
    "l2": lambda gs: sum(g.square().sum() for g in gs),
    "l1": lambda gs: sum(g.abs().sum() for g in gs) ** 2,
    "linf": lambda gs: torch.stack([g.abs().max() for g in gs]).max() ** 2,
}


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    xs = torch.randn(A, 4, 3, dtype=torch.float64)
    ys = torch.randn(A, 4, 2, dtype=torch.float64)
    return net, list(zip(xs, ys, strict=True))


def loss_of(call, x, y):
    return (call(x) - y).square().mean()


def functional(norm, names):
    """The penalty as a function of the parameters, and its gradient, by torch.func."""
    net, micro = setting()
    params = {n: p.detach() for n, p in net.named_parameters()}

    def mean_loss(params):
        losses = [loss_of(lambda x: functional_call(net, params, (x,)), x, y) for x, y in micro]
        return sum(losses) / A

    def penalty(params):
        grads = grad(mean_loss)(params)
        return NORMS[norm]([grads[n] for n in names])

    return penalty(params), grad(penalty)(params)


def windowed(norm, match, estimator, scale=1.0):
    """The penalty of the last micro-batch, whose share of the gradient is 1/A; the whole of it."""
    net, micro = setting()
    window, state = Window(A), random_state(torch.device("cpu"))

    def again(x, y):
        return lambda: loss_of(net, x, y)

    for x, y in micro[:-1]:
        summarised(loss_of(net, x, y), scale, windows=[(window, again(x, y))])
    last = again(*micro[-1])
    penalty = gpkit.weight_grad_norm(
        1.0, match, form=gpkit.squared(norm=norm), scope="accumulated", estimator=estimator
    )
    value = penalty(Recomputable(last(), last, state, window=window), net, scale=scale)
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(value / A, list(named.values()), allow_unused=True)
    return value, dict(zip(named, grads, strict=True))


MATCHES = {"*": ["0.weight", "0.bias", "2.weight", "2.bias"], "0.*": ["0.weight", "0.bias"]}
matches = pytest.mark.parametrize(("match", "names"), MATCHES.items())


@matches
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 512.0, torch.tensor(2.0**-9)], ids=str)
def test_exact_is_the_derivative_of_the_pooled_norm(norm, match, names, scale):
    value, true = functional(norm, names)
    mine, grads = windowed(norm, match, "exact", scale)
    assert mine.item() == pytest.approx(value.item(), rel=1e-12)
    for name, want in true.items():
        torch.testing.assert_close(grads[name], want, rtol=1e-10, atol=1e-13)


@matches
@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize(("side", "power"), [("forward", 1), ("backward", 1), ("central", 2)])
def test_differences_tend_to_it(norm, match, names, side, power):
    value, true = functional(norm, names)
    errors = []
    for step in (4e-3, 2e-3):
        mine, grads = windowed(norm, match, gpkit.finite_difference(step, side))
        assert mine.item() == pytest.approx(value.item(), rel=1e-12)
        errors.append(sum((grads[n] - true[n]).norm().item() for n in true))
    assert errors[0] / errors[1] == pytest.approx(2.0**power, rel=0.1)


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_the_weights_and_their_gradients_are_left_alone(estimator):
    net, _ = setting()
    kept = [p.clone() for p in net.parameters()]
    _, grads = windowed("l2", "*", estimator)
    assert len(grads) == len(kept)
    net, micro = setting()
    window = Window(2)
    summarised(loss_of(net, *micro[0]), windows=[(window, lambda: loss_of(net, *micro[0]))])
    value = gpkit.weight_grad_norm(1.0, scope="accumulated", estimator=estimator)(
        Recomputable(
            loss_of(net, *micro[1]),
            lambda: loss_of(net, *micro[1]),
            random_state(torch.device("cpu")),
            window=window,
        ),
        net,
    )
    assert value > 0
    for p, before in zip(net.parameters(), kept, strict=True):
        assert torch.equal(p, before)
        assert p.grad is None
