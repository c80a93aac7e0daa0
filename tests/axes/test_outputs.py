"""A slope target needs one output per sample, and a variable must be what the output came from."""

from collections import namedtuple
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

import gpkit


def net(inputs, outputs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs)).double()


TARGETS = {
    "two-sided": gpkit.two_sided(1.0),
    "one-sided": gpkit.one_sided(0.01),
    "absolute": gpkit.absolute(1.0),
    "a tensor": gpkit.two_sided(torch.tensor(0.5)),
    "a running average, still at zero": gpkit.two_sided(gpkit.running_average()),
    "a function of n": lambda n: (n - 1).abs(),
    "a hinge": lambda n: (n - 1).relu(),
    "the spread in the batch": lambda n: (n - n.mean()).square(),
}
GROWING = {
    "squared": "squared",
    "norm": "norm",
    "sixth power": gpkit.power(6),
    "centre 0": gpkit.two_sided(0.0),
    "a tensor 0": gpkit.absolute(torch.tensor(0.0)),
    "eps": gpkit.GradientPenalty(form="norm").form.__class__(eps=1e-4),
    "a function that saturates": torch.tanh,
}


@pytest.mark.parametrize("form", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3)], ids=["[B, 3]", "[B, N, 3]"])
@pytest.mark.parametrize("given", ["callable", "tensor"])
def test_a_slope_target_of_several_outputs_is_refused(form, shape, given):
    penalty = gpkit.GradientPenalty(form=form)
    f, x = net(3, 2), torch.rand(*shape, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs one output per sample; got \d+") as raised:
        penalty(f if given == "callable" else f(x), x)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("form", GROWING.values(), ids=GROWING)
def test_a_form_without_a_target_takes_the_frobenius_norm(form):
    f, x = net(3, 2), torch.rand(4, 3, dtype=torch.float64)
    n = gpkit.GradientPenalty(form=form).terms(f, x).norms
    torch.testing.assert_close(n, vmap(jacrev(f))(x).square().sum((1, 2)).sqrt())


ADVICE = {
    "one output": (lambda o: o[:, 0], lambda o: o[..., 0]),
    "the sum": (lambda s: s.flatten(1).sum(1), lambda o: o.sum()),
}


@pytest.mark.parametrize(("of", "by_hand"), ADVICE.values(), ids=ADVICE)
def test_the_advice_of_the_refusal_gives_the_slope(of, by_hand):
    f, x = net(3, 2), torch.rand(4, 3, dtype=torch.float64)
    slopes = vmap(jacrev(lambda z: by_hand(f(z))))(x).norm(dim=1)
    loss = gpkit.eikonal(weight=1.0, of=of)(f, x)
    torch.testing.assert_close(loss, (slopes - 1).square().mean())
    given = torch.autograd.grad(loss, f[0].weight)[0]
    expected = torch.autograd.grad((slopes - 1).square().mean(), f[0].weight)[0]
    torch.testing.assert_close(given, expected)


def test_points_of_shapes_are_flattened():
    f, x = net(3, 1), torch.rand(4, 5, 3, dtype=torch.float64)
    slopes = vmap(jacrev(lambda z: f(z)[0]))(x.reshape(-1, 3)).norm(dim=1)
    loss = gpkit.eikonal(weight=1.0)(f, x.reshape(-1, 3))
    torch.testing.assert_close(loss, (slopes - 1).square().mean())


def test_an_explicit_function_is_taken_at_its_word():
    f, x = net(3, 2), torch.rand(4, 3, dtype=torch.float64)
    n = vmap(jacrev(f))(x).square().sum((1, 2)).sqrt()
    loss = gpkit.GradientPenalty(form=gpkit.two_sided(1.0), of=lambda o: o)(f, x)
    torch.testing.assert_close(loss, (n - 1).square().mean())
    sigma = torch.linalg.matrix_norm(vmap(jacrev(f))(x), 2)
    spectral = gpkit.GradientPenalty(
        form=gpkit.two_sided(1.0), estimator=gpkit.power_iteration(200)
    )(f, x)
    torch.testing.assert_close(spectral, (sigma - 1).square().mean())


def test_a_slope_target_of_a_classifier_is_refused_in_a_module():
    module = gpkit.PenalizedModule(
        net(3, 2), loss=nn.CrossEntropyLoss(), penalty=gpkit.GradientPenalty(form="two_sided")
    )
    x, y = torch.rand(4, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    assert isinstance(module, pl.LightningModule)
    with pytest.raises(ValueError, match="needs one output per sample; got 2"):
        module.penalized_loss((x, y))


Out = namedtuple("Out", ["hidden", "scores"])
OUTPUTS = {
    "output['logits']": lambda y: {"features": y, "logits": y},
    "output.logits": lambda y: SimpleNamespace(features=y, logits=y),
    "output.scores": lambda y: Out(y, y),
    "output.features": lambda y: SimpleNamespace(features=y, note="no tensor"),
}


@pytest.mark.parametrize(("advice", "made"), OUTPUTS.items(), ids=OUTPUTS)
def test_an_output_that_is_no_tensor_is_told_its_names(advice, made):
    f, x = net(3, 1), torch.rand(4, 3, dtype=torch.float64)
    with pytest.raises(TypeError) as raised:
        gpkit.r1()(lambda z: made(f(z)), real=x)
    said = str(raised.value)
    assert said.endswith(f"select one with `of=lambda output: {advice}`")
    assert "note" not in said
    chosen = gpkit.r1(of=eval(said.split("`of=")[1].rstrip("`")))
    torch.testing.assert_close(chosen(lambda z: made(f(z)), real=x), gpkit.r1()(f, real=x))


def u(X):
    return (X[:, :1] ** 2 * X[:, 1:]).sum(1)


AFTERWARDS = {
    "derivative": lambda y, x: gpkit.derivative(y, x[:, :1]),
    "of order 2": lambda y, x: gpkit.derivative(y, x[:, :1], order=2),
    "a copy": lambda y, x: gpkit.derivative(y, x.clone()),
    "a penalty": lambda y, x: gpkit.input_grad_norm()(y, x[:, :1]),
    "several inputs": lambda y, x: gpkit.r1()(y, (x, x[:, :1])),
    "weights": lambda y, x: gpkit.weight_grad_norm()(y.sum(), [x[0]]),
    "weights and a closure": lambda y, x: gpkit.weight_grad_norm()(lambda: u(x).sum(), [x[0]]),
}


@pytest.mark.parametrize("use", AFTERWARDS.values(), ids=AFTERWARDS)
def test_a_slice_taken_after_the_output_is_refused(use):
    x = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="was not used to compute the output"):
        use(u(x), x)


def test_a_slice_taken_before_the_output_is_differentiated_in():
    """And a leaf that the output does not use has zero derivatives, as has a constant."""
    x = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    a, t = x.split(1, 1)
    y = a**2 * t
    torch.testing.assert_close(gpkit.derivative(y, a), 2 * a * t)
    torch.testing.assert_close(gpkit.derivative(y, a, order=2, squeeze=True), 2 * t)
    unused = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    assert not gpkit.derivative(y, unused).any()
    assert not gpkit.derivative(3 * a, a, order=2).any()
    assert not gpkit.derivative(torch.ones(4), 2 * unused).any()
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    h = 3 * unused[:, :1]
    assert not gpkit.derivative(gpkit.derivative(w * h, h), h).any()  # the constant w


def test_a_squeezed_derivative_has_the_shape_of_the_output():
    x = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    for y in (x**3, (x**3)[:, 0]):
        second = gpkit.derivative(y, x, order=2, squeeze=True)
        torch.testing.assert_close(second, (6 * x).reshape(y.shape))
    wide = torch.rand(4, 2, requires_grad=True)
    with pytest.raises(ValueError, match=r"one entry per sample.*got \[4, 2\]"):
        gpkit.derivative(wide.sum(1), wide, squeeze=True)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net(3, 1)

    def forward(self, x, scale=1.0, *, shift=0.0):
        return self.body(x) * scale + shift

    def scores(self, x):
        return self.forward(x, 2.0)


CALLABLES = {
    "a module": lambda c: (c, 1.0),
    "a bound method": lambda c: (c.scores, 2.0),
    "a partial with keywords": lambda c: (partial(c, scale=3.0, shift=1.0), 3.0),
    "functional_call": lambda c: (
        lambda x: functional_call(c, dict(c.named_parameters()), (x,), {"scale": 4.0}),
        4.0,
    ),
    "vmap": lambda c: (vmap(lambda x: c(x)[0]), 1.0),
    "an object with __call__": lambda c: (type("F", (), {"__call__": lambda s, x: c(x)})(), 1.0),
}


@pytest.mark.parametrize("made", CALLABLES.values(), ids=CALLABLES)
def test_any_callable_is_differentiated(made):
    critic, x = Critic(), torch.rand(4, 3, dtype=torch.float64)
    f, factor = made(critic)
    n = vmap(jacrev(lambda z: critic.body(z)[0]))(x).norm(dim=1) * factor
    loss, expected = gpkit.wgan_gp(weight=1.0)(f, real=x, fake=x), (n - 1).square().mean()
    torch.testing.assert_close(loss, expected)
    weight = critic.body[0].weight
    torch.testing.assert_close(
        torch.autograd.grad(loss, weight)[0], torch.autograd.grad(expected, weight)[0]
    )
