"""`target=`, `metric=` and `sample_weight=` in the weights, against torch.func in float64."""

import pytest
import torch
from compared import (
    ESTIMATORS,
    NET,
    NORMS,
    B,
    G,
    W,
    X,
    Y,
    assert_same,
    draw,
    losses,
    losses_of_net,
    measured,
    params_of,
)
from torch import nn
from torch.func import functional_call, grad, jacrev

import gpkit


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["exact", "difference", "step"])
@pytest.mark.parametrize("scope", ["batch", "global"])
def test_a_target_in_the_weights_with_a_graph_is_trained(scope, name, norm):
    estimator, rtol = ESTIMATORS[name]
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    g, a = ([f(draw(*p.shape)) for p in NET.parameters()] for f in (torch.sin, torch.exp))
    form = gpkit.two_sided(0.7, norm=norm)
    penalty = gpkit.GradientPenalty(wrt="weight", form=form, scope=scope, estimator=estimator)
    value = penalty(lambda: losses_of_net().mean(), NET, target=[scale * t for t in g], metric=a)
    (found,) = torch.autograd.grad(value, scale)

    def by_hand(scale):
        rows = grad(lambda p: losses(p).mean())(params_of(NET)).values()
        entries = [s * (r - scale * t) for r, t, s in zip(rows, g, a, strict=True)]
        return (NORMS[norm](torch.cat([e.reshape(1, -1) for e in entries], 1))[0] - 0.7) ** 2

    wanted = grad(by_hand)(scale.detach())
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0)


class Scaled(nn.Module):
    """A parameter without dimensions, and a bias of as many entries as there are outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

    def forward(self, x):
        return (x * self.scale + self.bias).tanh() ** 2


@pytest.mark.parametrize("given", [{}, {"target": 1}, {"metric": 1}, {"target": 1, "metric": 1}])
def test_several_outputs_in_the_weights(given):
    net, x = Scaled(), X.flatten(1)[:, :3]
    of_function = given and {"metric": torch.exp}
    g = [draw(3), draw(3, 3)] if "target" in given else [0.0, 0.0]
    a = [draw(3).exp(), draw(3, 3).exp()] if "metric" in given else [1.0, 1.0]
    arguments = {"target": g, "metric": a}

    def by_hand(params, a=a):
        rows = jacrev(lambda p: functional_call(net, p, (x,)).mean(0))(params).values()
        return sum(((r - t) * s).square().sum() for r, t, s in zip(rows, g, a, strict=True))

    def compare(wanted, **arguments):
        penalty = gpkit.GradientPenalty(wrt="weight")
        value = penalty(lambda: net(x), net, **arguments)
        found = torch.autograd.grad(value, list(net.parameters()))
        torch.testing.assert_close(value.detach(), wanted(params_of(net)))
        expected = grad(wanted)(params_of(net)).values()
        torch.testing.assert_close(list(found), list(expected))

    compare(by_hand, **{name: arguments[name] for name in given})
    if of_function:
        factors = [p.detach().exp() for p in net.parameters()]
        kept = {"target": g} if "target" in given else {}
        compare(lambda p: by_hand(p, factors), **kept, **of_function)


@pytest.mark.parametrize("name", ["exact", "difference", "step"])
@pytest.mark.parametrize("scope", ["batch", "sample", "global"])
def test_gradient_matching_in_the_weights(name, scope):
    estimator, rtol = ESTIMATORS[name]
    rtol = 10 * rtol
    g = [draw(*p.shape) for p in NET.parameters()]
    a = [draw(*p.shape).exp() for p in NET.parameters()]

    def value(params):
        if scope == "sample":
            rows = [grad(lambda p, i=i: losses(p)[i])(params).values() for i in range(B)]
        else:
            rows = [grad(lambda p: losses(p).mean())(params).values()]
        squares = [
            sum((s * (r - t)).square().sum() for r, t, s in zip(row, g, a, strict=True))
            for row in rows
        ]
        return torch.stack(squares).mean()

    wanted = (
        value(params_of(NET)),
        torch.cat([v.flatten() for v in grad(value)(params_of(NET)).values()]),
    )
    penalty = gpkit.GradientPenalty(of="loss", wrt="weight", scope=scope, estimator=estimator)
    given = {"target": g, "metric": a}

    def closure():
        values = (NET(X) - Y).square().sum(1)
        return values if scope == "sample" else values.mean()

    assert_same(measured(penalty, closure, NET, **given), wanted, rtol)
    if name == "exact":
        assert_same(measured(penalty, closure(), NET.parameters(), **given), wanted)


@pytest.mark.parametrize("name", ["exact", "difference"])
@pytest.mark.parametrize("tensor", [False, True])
def test_weights_of_the_losses(name, tensor):
    """scope="batch" has the gradient of the weighted mean loss; "sample" weighs the values."""
    if tensor and name != "exact":
        pytest.skip("it needs a callable")
    estimator, rtol = ESTIMATORS[name]

    def whole(params):
        g = grad(lambda p: (W * losses(p)).sum() / W.sum())(params)
        return sum(v.square().sum() for v in g.values())

    def each(params):
        rows = [grad(lambda p, i=i: losses(p)[i])(params).values() for i in range(B)]
        values = torch.stack([sum(v.square().sum() for v in row) for row in rows])
        return (W * values).sum() / W.sum()

    for scope, value in (("batch", whole), ("sample", each)):
        penalty = gpkit.GradientPenalty(of="loss", wrt="weight", scope=scope, estimator=estimator)
        grads = grad(value)(params_of(NET)).values()
        wanted = value(params_of(NET)), torch.cat([v.flatten() for v in grads])
        closure = lambda: (NET(X) - Y).square().sum(1)  # noqa: E731
        found = measured(penalty, closure() if tensor else closure, NET, sample_weight=W)
        assert_same(found, wanted, 10 * rtol)


@pytest.mark.parametrize(
    ("scope", "given", "words"),
    [
        ("batch", {"sample_weight": W}, r"needs losses \[B\]; got one number"),
        ("global", {"sample_weight": W}, "weigh the samples in the loss"),
        ("batch", {"target": [G]}, "each of 4 parameters that require grad; got 1"),
    ],
)
def test_what_makes_no_sense_in_the_weights_is_refused(scope, given, words):
    penalty = gpkit.weight_grad_norm(scope=scope)
    with pytest.raises(ValueError, match=words):
        penalty((NET(X) - Y).square().mean(), NET, **given)
