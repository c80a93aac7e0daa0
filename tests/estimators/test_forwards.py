"""Estimators without a gradient in x: closed forms, the points that were evaluated, refusals."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit
from gpkit.estimators.projection import projection

MANY = 200_000
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


W = draw(3)
H = draw(3, 3)
H = H + H.T
X = draw(3)


def mean_of(f, estimator, count=MANY, **given):
    """Return the mean of n² over many samples at X, and its standard error."""
    penalty = gpkit.GradientPenalty(estimator=estimator, seed=0)
    n2 = penalty.terms(f, X.repeat(count, 1), **given).squared_norms.detach()
    return float(n2.mean()), float(n2.std()) / count**0.5, float(n2.var())


def test_random_difference_of_a_linear_function():
    mean, error, variance = mean_of(lambda x: x @ W, gpkit.random_difference(0.01))
    n2 = float(W.square().sum())
    assert abs(mean - n2) < 4 * error
    assert variance == pytest.approx(2 * n2**2, rel=0.05)


def test_random_difference_of_a_quadratic_function():
    """σ²‖Hx‖² + σ⁴/4 (2‖H‖_F² + (tr H)²) before the division by σ²."""
    f = lambda x: torch.einsum("bi,ij,bj->b", x, H, x) / 2  # noqa: E731
    for sigma in (0.5, 1.0):
        mean, error, _ = mean_of(f, gpkit.random_difference(sigma))
        bias = sigma**2 / 4 * (2 * H.square().sum() + H.trace() ** 2)
        wanted = float((H @ X).square().sum() + bias)
        assert abs(mean - wanted) < 4 * error
        assert float(bias) > 20 * error  # the bias is seen


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


def test_jvp_of_a_linear_function():
    n2, n4 = float(W.square().sum()), float(W.pow(4).sum())
    for distribution, wanted in (("rademacher", n2**2 - n4), ("gaussian", n2**2)):
        mean, error, variance = mean_of(lambda x: x @ W, gpkit.jvp(1, distribution))
        assert abs(mean - n2) < 4 * error
        assert variance == pytest.approx(2 * wanted, rel=0.05)


class Seen:
    """A function that keeps the points at which it was evaluated."""

    def __init__(self, f):
        self.f, self.points = f, []

    def __call__(self, x):
        self.points.append(x.detach().clone())
        return self.f(x)


def conv(*middle):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(27, 1)
    )
    return net.double()


def params_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads])


IMAGES = draw(5, 2, 3, 3) * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0]).reshape(5, 1, 1, 1)


@pytest.mark.parametrize("n", [1, 3])
def test_random_difference_is_the_difference_at_its_points(n):
    net = conv()
    f = Seen(net)
    penalty = gpkit.GradientPenalty(estimator=gpkit.random_difference(0.05, n), weight=0.7)
    penalty(f, IMAGES)
    f.points.clear()
    value = penalty(f, IMAGES)
    assert len(f.points) == 1 + n
    torch.testing.assert_close(f.points[0], IMAGES)

    def by_hand(params):
        here, *there = [functional_call(net, params, (x,))[:, 0] for x in f.points]
        return 0.7 * sum(((y - here) / 0.05).square() for y in there).mean() / n

    torch.testing.assert_close(value, by_hand(params_of(net)))
    found = flat(torch.autograd.grad(value, list(net.parameters())))
    torch.testing.assert_close(found, flat(grad(by_hand)(params_of(net)).values()))
    steps = (f.points[1] - IMAGES).flatten(1)
    assert steps.std() == pytest.approx(0.05, rel=0.3)
    assert len(steps.unique()) == steps.numel()


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


MIDDLES = {
    "conv": [],
    "group norm": [nn.GroupNorm(1, 3)],
    "batch norm": [nn.BatchNorm2d(3)],
    "softmax": [nn.Softmax(1)],
    "relu": [nn.ReLU()],
    "pool": [nn.MaxPool2d(1)],
}


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_jvp_is_the_derivative_along_its_direction(middle):
    net, v = conv(*middle), draw(5, 18)
    before = {name: b.clone() for name, b in net.named_buffers()}
    with mock.patch.object(projection, "draw", return_value=[v]):
        value = gpkit.GradientPenalty(estimator=gpkit.jvp())(net, IMAGES)
    for name, b in net.named_buffers():
        torch.testing.assert_close(b, before[name])
    x = IMAGES.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    along = (g.flatten(1) * v).sum(1)
    if isinstance(middle[0] if middle else None, nn.BatchNorm2d):  # samples see each other
        y = net(x)[:, 0]
        rows = [torch.autograd.grad(y[i], x, create_graph=True)[0] for i in range(5)]
        along = torch.stack([(row.flatten() * v.flatten()).sum() for row in rows])
    wanted = along.square().mean()
    torch.testing.assert_close(value, wanted)
    parameters = list(net.parameters())
    found, wanted = (
        flat(
            torch.zeros_like(p) if g is None else g
            for g, p in zip(
                torch.autograd.grad(t, parameters, allow_unused=True), parameters, strict=True
            )
        )
        for t in (value, wanted)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("embed", [8])
def test_jvp_through_attention(embed):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(embed, 2, 16, dropout=0.0, batch_first=True).double()
    f = lambda x: layer(x).flatten(1).sum(1)  # noqa: E731
    x, v = draw(3, 4, embed).requires_grad_(), draw(3, 4 * embed)
    with mock.patch.object(projection, "draw", return_value=[v]):
        value = gpkit.GradientPenalty(estimator=gpkit.jvp())(f, x)
    (g,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(value, (g.flatten(1) * v).sum(1).square().mean().detach())
    value.backward()
    assert all(p.grad is not None for p in layer.parameters() if p.ndim > 1)


class Backward(nn.Module):
    """Tanh with a backward formula alone."""

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = torch.tanh(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx, g):
            (y,) = ctx.saved_tensors
            return g * (1 - y * y)

    def forward(self, x):
        return self.Tanh.apply(x)


def test_jvp_needs_forward_mode():
    with pytest.raises(RuntimeError, match=r"forward-mode derivative of every operation.*exact"):
        gpkit.GradientPenalty(estimator="jvp")(conv(Backward()), IMAGES)


@pytest.mark.parametrize(("taps", "degree"), [(2, 2), (4, 4)])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_stencil_is_exact_for_polynomials(taps, degree, norm):
    a, x, g = draw(3).requires_grad_(), draw(5, 3), draw(5, 3)
    f = lambda x: (a * x**degree).sum(1)  # noqa: E731
    penalty = gpkit.GradientPenalty(form=gpkit.norm(norm=norm), estimator=gpkit.stencil(0.3, taps))
    value = penalty(f, x, target=g, metric=2.0)
    e = 2 * (degree * a * x ** (degree - 1) - g)
    n = {"l2": e.norm(dim=1), "l1": e.abs().sum(1), "linf": e.abs().amax(1)}[norm].mean()
    torch.testing.assert_close(value, n)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], torch.autograd.grad(n, a)[0])


def test_a_stencil_of_a_cubic_function_and_its_schedule():
    """(3x² + h²)² with 2 taps, h of the optimiser step."""
    x = draw(4, 1)
    penalty = gpkit.GradientPenalty(estimator=gpkit.stencil(lambda step: 0.8 / 2**step))
    for h in (0.8, 0.4, 0.2):
        wanted = (3 * x**2 + h**2).square().mean()
        torch.testing.assert_close(penalty.terms(lambda x: (x**3).sum(1), x).reduced, wanted)
        torch.testing.assert_close(penalty(lambda x: (x**3).sum(1), x), wanted)
    torch.testing.assert_close(
        penalty(lambda x: (x**3).sum(1), x, step=4), (3 * x**2 + 0.05**2).square().mean()
    )


def test_a_stencil_of_images_patches_and_several_inputs():
    net = conv()
    net[-1] = nn.Linear(27, 2).double()
    exact = gpkit.GradientPenalty().terms(net, IMAGES)
    found = gpkit.GradientPenalty(estimator=gpkit.stencil(1e-3, 4)).terms(net, IMAGES)
    torch.testing.assert_close(found.norms, exact.norms, rtol=1e-8, atol=0)
    for parts in ({"scope": "pixel", "of": lambda y: y[:, 0]}, {"form": gpkit.squared(norm="l1")}):
        exact = gpkit.GradientPenalty(**parts).terms(net, IMAGES)
        found = gpkit.GradientPenalty(estimator=gpkit.stencil(1e-3, 4), **parts).terms(net, IMAGES)
        torch.testing.assert_close(found.norms, exact.norms, rtol=1e-8, atol=0)
    pair = draw(4, 2), draw(4, 3)
    f = lambda x, c: (x.sum(1) * c.square().sum(1)).sin()  # noqa: E731
    exact = gpkit.GradientPenalty().terms(f, pair)
    for estimator in (gpkit.stencil(1e-3, 4), gpkit.jvp(4000), gpkit.random_difference(1e-3, 4000)):
        found = gpkit.GradientPenalty(estimator=estimator, seed=0).terms(f, pair)
        rtol = 1e-7 if isinstance(estimator, gpkit.stencil) else 0.15
        torch.testing.assert_close(found.squared_norms, exact.squared_norms, rtol=rtol, atol=0)


class Grid(nn.Module):
    """Values at the integers, interpolated linearly: its gradient jumps at every integer."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.arange(9.0, dtype=torch.float64) ** 2)

    def forward(self, x):
        i = x.detach().floor().long().clamp(0, 7)
        return (self.values[i] * (i + 1 - x) + self.values[i + 1] * (x - i)).sum(1)


def test_a_stencil_of_a_cell_trains_the_cells_around_it():
    grid, x = Grid(), torch.full((1, 1), 4.5, dtype=torch.float64)
    value = gpkit.GradientPenalty(estimator=gpkit.stencil(1.0))(grid, x)
    assert value.item() == pytest.approx(((36 + 25) / 2 - (16 + 9) / 2) ** 2 / 4)  # f(5.5), f(3.5)
    value.backward()
    assert grid.values.grad.nonzero().flatten().tolist() == [3, 4, 5, 6]
    exact = gpkit.GradientPenalty()(grid, x)
    assert torch.autograd.grad(exact, grid.values)[0].nonzero().flatten().tolist() == [4, 5]


def test_points_that_train_a_generator():
    """With detach=False the gradient reaches the net that made the points."""
    a = draw(3).requires_grad_()
    f = lambda x: x.pow(3).sum(1)  # noqa: E731
    at = gpkit.perturb(0.0, detach=False)
    for estimator in (gpkit.stencil(1e-3), gpkit.jvp(2000), gpkit.random_difference(1e-3, 2000)):
        penalty = gpkit.GradientPenalty(at=at, estimator=estimator, seed=0)
        value = penalty(f, real=a.expand(8, 3))
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
    "estimator", [gpkit.stencil(1e-4, 4), gpkit.jvp(3000), gpkit.random_difference(1e-4, 3000)]
)
def test_the_gradient_in_the_parameters_is_that_of_double_backprop(estimator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = draw(4, 3)

    def exact(params):
        g = vmap(grad(lambda z: functional_call(net, params, (z[None],)).sum()))(x)
        return g.square().sum(1).mean()

    value = gpkit.GradientPenalty(estimator=estimator, seed=0)(net, x)
    found = torch.autograd.grad(value, [net[0].weight, net[2].weight])
    wanted = grad(exact)(params_of(net))
    rtol = 1e-7 if isinstance(estimator, gpkit.stencil) else 0.1
    for a, name in zip(found, ("0.weight", "2.weight"), strict=True):
        assert float((a - wanted[name]).norm() / wanted[name].norm()) < rtol
