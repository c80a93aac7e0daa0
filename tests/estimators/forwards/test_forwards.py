"""Estimators without a gradient in x: what all of them have in common, and refusals."""

import pytest
import torch
from forwards import IMAGES, W, X, conv, draw, flat, mean_of, params_of
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit


@pytest.mark.parametrize(
    "estimator", [gpkit.random_difference(0.1), gpkit.jvp(), gpkit.jvp(2, "gaussian")]
)
def test_a_target_and_a_metric_in_expectation(estimator):
    g, a = draw(3), draw(3)
    given = {"target": g, "metric": a}
    mean, error, _ = mean_of(lambda x: x @ W, estimator, **given)
    assert abs(mean - float((a * (W - g)).square().sum())) < 4 * error
    A, G, m = draw(3, 2), draw(1, 2, 3), draw(3)
    mean, error, _ = mean_of(lambda x: x @ A, estimator, target=G, metric=m)
    assert abs(mean - float((m * (A.T - G[0])).square().sum())) < 4 * error


class ClosedRows(nn.Module):
    """Tanh whose derivative cannot be differentiated, as in a fused kernel."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * (1 - y * y)

    def forward(self, x):
        return self.Once.apply(x)


@pytest.mark.parametrize("estimator", [gpkit.random_difference(0.05), gpkit.stencil(1e-3)])
def test_no_double_backward_is_needed(estimator):
    nets = conv(ClosedRows()), conv(nn.Tanh())
    found, wanted = (
        gpkit.GradientPenalty(estimator=estimator, seed=1)(net, IMAGES) for net in nets
    )
    (net, same) = nets
    torch.testing.assert_close(found, wanted)
    grads = [
        flat(torch.autograd.grad(v, list(m.parameters())))
        for v, m in ((found, net), (wanted, same))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "estimator", [gpkit.random_difference(1e-4), gpkit.jvp(), gpkit.stencil(1e-4)]
)
def test_all_passes_have_the_same_dropout(estimator):
    """With other masks the difference would be of order 1/σ."""
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1)).double()
    terms = gpkit.GradientPenalty(estimator=estimator).terms(net, 10 * draw(64, 8))
    assert float(terms.norms.detach().max()) < 20 * float(net[1].weight.detach().norm())
    assert float(terms.norms.detach().std()) > 0


def test_points_that_train_a_generator():
    """With detach=False the gradient reaches the net that made the points."""
    a = draw(3).requires_grad_()
    f = lambda x: x.pow(3).sum(1)  # noqa: E731
    at = gpkit.perturb(0.0, detach=False)
    for estimator in (gpkit.stencil(1e-3), gpkit.jvp(), gpkit.random_difference(1e-3)):
        penalty = gpkit.GradientPenalty(at=at, estimator=estimator, seed=0)
        value = penalty(f, real=a.expand(16_000, 3))  # each with a direction of its own
        (found,) = torch.autograd.grad(value, a)
        wanted = 36 * a.detach() ** 3
        assert float((found - wanted).norm() / wanted.norm()) < 0.05


def bf16(x):
    return x.to(torch.bfloat16).sum(1)


@pytest.mark.parametrize(
    ("estimator", "f", "x", "words"),
    [
        (
            gpkit.random_difference(0.005),
            bf16,
            X[None],
            r"below 0.0079, the spacing of the numbers",
        ),
        (gpkit.random_difference(0.01), bf16, 1000 * X[None], "is below .*use a larger sigma"),
        (gpkit.random_difference(1e-8), lambda x: x.sum(1), X[None].float(), "is below 1.2e-07"),
        (gpkit.stencil(0.005), bf16, X[None], r"below 0.0078, the spacing"),
        (gpkit.stencil(), lambda x: x.sum(1), draw(2, 501), "2 forward passes for each of 501"),
    ],
)
def test_steps_that_make_no_sense_are_refused(estimator, f, x, words):
    with pytest.raises(ValueError, match=words):
        gpkit.GradientPenalty(estimator=estimator)(f, x)


def autocast_inside(net, dtype):
    def f(x):
        with torch.autocast("cpu", dtype):
            return net(x).float()

    return f


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", [gpkit.random_difference, gpkit.stencil])
def test_half_precision_inside_of_a_function_that_returns_float32(estimator, dtype):
    sigma = torch.finfo(dtype).eps / 2
    net, x = torch.nn.Linear(5, 1), torch.zeros(3, 5)
    halves = torch.nn.Linear(5, 1).to(dtype)
    for f in (autocast_inside(net, dtype), lambda x: halves(x.to(dtype)).float()):
        with pytest.raises(ValueError, match=r"is below 0\.0.*, the spacing of the numbers"):
            gpkit.GradientPenalty(estimator=estimator(sigma))(f, x)
    gpkit.GradientPenalty(estimator=estimator(sigma))(lambda x: net(x).float(), x)


def test_a_step_near_the_spacing_is_a_warning():
    with pytest.warns(UserWarning, match=r"is less than 4 times 0.0079, the spacing"):
        gpkit.GradientPenalty(estimator=gpkit.random_difference(0.02))(bf16, X[None].float())


@pytest.mark.parametrize("name", ["random_difference", "jvp", "stencil"])
def test_what_they_cannot_do_is_refused(name):
    with pytest.raises(ValueError, match="takes order=1; got order=2"):
        gpkit.GradientPenalty(estimator=name, order=2)
    with pytest.raises(ValueError, match=r"needs wrt='input'; got weights"):
        gpkit.weight_grad_norm(estimator=name)
    if name != "stencil":
        with pytest.raises(ValueError, match="estimates the l2 norm; got norm='l1'"):
            gpkit.input_grad_norm(norm="l1", estimator=name)
    x = IMAGES.clone().requires_grad_()
    with pytest.raises(ValueError, match="needs a callable"):
        gpkit.GradientPenalty(estimator=name)(conv()(x), x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gpkit.random_difference(0.0), "must be a number > 0; got 0.0"),
        (lambda: gpkit.random_difference(n=0), "an integer >= 1"),
        (lambda: gpkit.jvp(0), "an integer >= 1"),
        (lambda: gpkit.jvp(1, "gaussan"), "did you mean 'gaussian'"),
        (lambda: gpkit.stencil(-1.0), "must be a number > 0"),
        (lambda: gpkit.stencil(taps=3), "must be 2 or 4; got 3"),
    ],
)
def test_arguments_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    "estimator", [gpkit.stencil(1e-4, 4), gpkit.jvp(), gpkit.random_difference(1e-4)]
)
def test_the_gradient_in_the_parameters_is_that_of_double_backprop(estimator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = draw(4, 3).repeat(3000, 1)  # each with a direction of its own

    def exact(params):
        g = vmap(grad(lambda z: functional_call(net, params, (z[None],)).sum()))(x)
        return g.square().sum(1).mean()

    value = gpkit.GradientPenalty(estimator=estimator, seed=0)(net, x)
    found = torch.autograd.grad(value, [net[0].weight, net[2].weight])
    wanted = grad(exact)(params_of(net))
    rtol = 1e-7 if isinstance(estimator, gpkit.stencil) else 0.1
    for a, name in zip(found, ("0.weight", "2.weight"), strict=True):
        assert float((a - wanted[name]).norm() / wanted[name].norm()) < rtol
