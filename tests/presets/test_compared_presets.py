"""Presets that compare, weigh kinds of points, or take the trace, against closed forms."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

import gpkit

RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def params_of(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize("name", ["approximate_r1", "approximate_r2"])
def test_approximated_r1_is_the_unscaled_difference(name):
    """100 mean (D(x) - D(x + 0.01 ε))², at the points where the critic was evaluated."""
    critic, x, points = net(), draw(7, 3), []

    def f(z):
        points.append(z.detach())
        return critic(z)

    penalty = getattr(gpkit, name)(weight=100.0, sigma=0.01)
    given = {"real" if name == "approximate_r1" else "fake": x}
    penalty(f, **given)
    points.clear()
    value = penalty(f, **given)
    here, there = points
    assert torch.equal(here, x)
    assert float((there - here).std()) == pytest.approx(0.01, rel=0.5)
    wanted = 100 * (critic(here) - critic(there)).square().mean()
    torch.testing.assert_close(value, wanted)
    found = torch.autograd.grad(value, list(critic.parameters())[:3])
    wanted = torch.autograd.grad(wanted, list(critic.parameters())[:3])
    torch.testing.assert_close(found, wanted)


def test_approximated_r1_is_r1_with_gamma_002():
    critic, x = net(), draw(3, 3).repeat(40_000, 1)
    with torch.no_grad():
        value = gpkit.approximate_r1(seed=0)(critic, real=x)
        wanted = gpkit.r1(weight=0.02)(critic, real=x)
    torch.testing.assert_close(value, wanted, rtol=0.02, atol=0)


def squares(params, x, module):
    slope = torch.func.vmap(grad(lambda z: functional_call(module, params, (z[None],)).sum()))
    return slope(x).square().sum(1)


def test_amp_is_the_mean_of_each_kind_of_unequal_numbers():
    critic, x, y = net(), draw(4, 3), 3 * draw(10, 3)

    def by_hand(params):
        return 2.5 * (squares(params, x, critic).mean() + squares(params, y, critic).mean())

    value = gpkit.amp(weight=5.0)(critic, real=x, fake=y)
    torch.testing.assert_close(value, by_hand(params_of(critic)))
    found = torch.autograd.grad(value, list(critic.parameters()), allow_unused=True)
    wanted = list(grad(by_hand)(params_of(critic)).values())
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w)
    unbalanced = gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"), weight=5.0)
    assert abs(float(unbalanced(critic, real=x, fake=y).detach() / value.detach()) - 1) > 0.05


def test_amp_in_normalised_observations():
    class Normalizer(nn.Module):
        def forward(self, x):
            return (x - 2.0) / 4.0

    inner, x, y = net(), draw(4, 3), 3 * draw(10, 3)
    critic = nn.Sequential(Normalizer(), inner)
    value = gpkit.amp(wrt=gpkit.activation("0"))(critic, real=x, fake=y)
    normalised = Normalizer()
    torch.testing.assert_close(value, gpkit.amp()(inner, real=normalised(x), fake=normalised(y)))
    torch.testing.assert_close(value, 16 * gpkit.amp()(critic, real=x, fake=y))


def test_balanced_mixtures():
    f, x, y = (lambda x: (x**2).sum(1) / 2), draw(3, 2), draw(6, 2)
    w = torch.rand(9, generator=RNG, dtype=torch.float64)
    at = gpkit.mixture("real", "fake", balanced=True)
    kinds = torch.tensor([1 / 3] * 3 + [1 / 6] * 6, dtype=torch.float64)
    n2 = torch.cat([x, y]).square().sum(1)
    found = gpkit.GradientPenalty(at=at)(f, real=x, fake=y, sample_weight=w)
    torch.testing.assert_close(found, (w * kinds * n2).sum() / (w * kinds).sum())
    nested = gpkit.mixture(gpkit.mixture("real", "real"), "fake", balanced=True)
    found = gpkit.GradientPenalty(at=nested)(f, real=x, fake=y)
    torch.testing.assert_close(found, (n2[:3].mean() + n2[3:].mean()) / 2)
    with pytest.raises(ValueError, match="kinds whose number of points is known"):
        gpkit.mixture("real", lambda real, fake: real, balanced=True)


def test_the_log_probability_of_a_gaussian_policy():
    """E ‖∇_s log π‖² = ‖W‖²/σ² for a ~ N(Ws, σ²I)."""
    W, sigma = draw(2, 3), 0.7
    s = draw(1, 3).repeat(200_000, 1)
    a = s @ W.T + sigma * draw(200_000, 2)
    policy = lambda s: torch.distributions.Normal(s @ W.T, sigma)  # noqa: E731
    with torch.no_grad():
        value = gpkit.lipschitz_policy(weight=1.0)(lambda s: policy(s).log_prob(a).sum(1), s)
    torch.testing.assert_close(value, W.square().sum() / sigma**2, rtol=0.02, atol=0)


def test_right_reasons_of_a_linear_classifier():
    """∂_d Σ_k log p_k = Σ_k W_kd - K Σ_k p_k W_kd."""
    W, x, mask = draw(4, 3).requires_grad_(), draw(5, 3), (draw(5, 3) > 0).double()
    value = gpkit.right_reasons()(lambda x: x @ W.T, x, metric=mask)
    p = (x @ W.T).softmax(1)
    wanted = 1000 * (mask * (W.sum(0) - 4 * p @ W)).square().sum(1).mean()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value, W)[0], torch.autograd.grad(wanted, W)[0])
    with pytest.raises(TypeError, match="right_reasons needs metric="):
        gpkit.right_reasons()(lambda x: x @ W.T, x)


FIELDS = {
    "distance": (lambda x: x.norm(dim=1), lambda x: 2 / x.norm(dim=1)),
    "saddle": (lambda x: x[:, 0] * x[:, 1], lambda x: torch.zeros(len(x), dtype=x.dtype)),
    "cubic": (lambda x: (x**3).sum(1), lambda x: 6 * x.sum(1)),
}


@pytest.mark.parametrize("jets", [False, True])
@pytest.mark.parametrize(("f", "laplacian"), FIELDS.values(), ids=FIELDS)
def test_laplacians(f, laplacian, jets):
    x = draw(6, 3)
    wanted = laplacian(x)
    found = gpkit.laplacian(weight=1.0, estimator=gpkit.trace(jets=jets)).terms(f, x)
    torch.testing.assert_close(found.norms.detach(), wanted.abs(), atol=1e-12, rtol=1e-9)
    squares = gpkit.laplacian(weight=1.0, low=1.0, high=9.0).terms(f, x).values
    torch.testing.assert_close(
        squares.detach(), wanted.square().clamp(1.0, 9.0), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("jets", [False, True])
def test_the_laplacian_of_a_quadratic_form_and_its_gradient(jets):
    """x'Ax has 2 tr A, not the sum of all entries of the Hessian."""
    A, x = draw(3, 3).requires_grad_(), draw(4, 3)
    f = lambda x: torch.einsum("bi,ij,bj->b", x, A, x)  # noqa: E731
    value = gpkit.laplacian(weight=0.5, estimator=gpkit.trace(jets=jets))(f, x)
    wanted = 0.5 * (2 * A.trace()).abs()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(torch.autograd.grad(value, A)[0], torch.autograd.grad(wanted, A)[0])
    assert abs(float((A.sum() - A.trace()).detach())) > 0.1


def test_the_trace_by_two_independent_draws():
    A, x = draw(3, 3), draw(1, 3).repeat(100_000, 1)
    f = lambda x: torch.einsum("bi,ij,bj->b", x, A, x)  # noqa: E731
    for n in (2, 3):
        penalty = gpkit.laplacian(form="squared", estimator=gpkit.trace(n), seed=0)
        n2 = penalty.terms(f, x).squared_norms.detach()
        error = float(n2.std()) / len(x) ** 0.5
        assert abs(float(n2.mean() - (2 * A.trace()) ** 2)) < 4 * error
        off = (A + A.T).square().sum() - (A + A.T).diagonal().square().sum()
        assert float(2 * off) > 20 * error  # the bias of the square of one draw would be seen


def test_the_trace_of_several_inputs_and_outputs():
    x, c = draw(4, 2), draw(4, 3)
    f = lambda x, c: torch.stack([(x**2).sum(1) * c[:, 0], (c**3).sum(1)], 1)  # noqa: E731
    for estimator in (gpkit.trace(), gpkit.trace(jets=True)):
        found = gpkit.GradientPenalty(order=2, estimator=estimator).terms(f, (x, c)).squared_norms
        torch.testing.assert_close(found, (4 * c[:, 0]) ** 2 + (6 * c.sum(1)) ** 2)


def test_the_trace_by_jets_of_a_net():
    """Value and parameter gradient, against torch.func."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)
    module = nn.Sequential(*layers).double()
    x = draw(4, 3) * torch.tensor([0.1, 1.0, 3.0, 0.5]).unsqueeze(1)

    def by_hand(params):
        f = lambda z: functional_call(module, params, (z[None],)).sum()  # noqa: E731
        return torch.stack([torch.func.jacrev(grad(f))(z).trace().abs() for z in x]).mean()

    value = gpkit.laplacian(weight=1.0, estimator=gpkit.trace(jets=True))(module, x)
    wanted, grads = by_hand(params_of(module)), grad(by_hand)(params_of(module))
    torch.testing.assert_close(value.detach(), wanted)
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    for g, w in zip(found, grads.values(), strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w)


def test_what_a_trace_cannot_do():
    with pytest.raises(ValueError, match="trace of a second derivative; got order=1"):
        gpkit.GradientPenalty(estimator="trace")
    with pytest.raises(ValueError, match=r"needs wrt='input'; got weights"):
        gpkit.weight_grad_norm(order=2, estimator="trace")
    with pytest.raises(ValueError, match="an integer >= 2; got 1"):
        gpkit.trace(1)
    with pytest.raises(ValueError, match="is exact and draws nothing; got n=2"):
        gpkit.trace(2, jets=True)
    x = draw(4, 2).requires_grad_()
    with pytest.raises(ValueError, match=r"trace\(jets=True\)` needs a callable"):
        gpkit.laplacian(estimator=gpkit.trace(jets=True))((x**3).sum(1), x)
    with pytest.raises(ValueError, match="needs both bounds, or none"):
        gpkit.laplacian(low=0.1)
    with pytest.raises(ValueError, match=r"takes no target= and no metric="):
        gpkit.laplacian()(lambda x: (x**2).sum(1), draw(4, 2), target=1.0)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sam_is_the_gradient_at_the_moved_weights(adaptive, dtype):
    x, y = draw(16, 3).to(dtype), draw(16, 1).to(dtype)
    module = net().to(dtype)
    closure = lambda: (module(x) - y).square().mean()  # noqa: E731
    rho, eta = 0.3, 0.05
    penalty = gpkit.sam(rho=rho, adaptive=adaptive, eta=eta)
    total = penalty.with_loss(closure, module)
    found = flat(torch.autograd.grad(total, list(module.parameters())))
    added = flat(
        torch.autograd.grad(closure() + penalty(closure, module), list(module.parameters()))
    )
    g = torch.autograd.grad(closure(), list(module.parameters()))
    T = [p.detach().abs() + eta if adaptive else torch.ones_like(p) for p in module.parameters()]
    n = flat(t * v for t, v in zip(T, g, strict=True)).norm()
    before = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        for p, t, v in zip(module.parameters(), T, g, strict=True):
            p += rho * t**2 * v / n
    wanted = flat(torch.autograd.grad(closure(), list(module.parameters())))
    with torch.no_grad():
        for p, b in zip(module.parameters(), before, strict=True):
            p.copy_(b)
    rtol = 1e-9 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    torch.testing.assert_close(added, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
    torch.testing.assert_close(total.detach(), closure().detach() + rho * n, rtol=rtol, atol=0)


def test_adaptive_sam_does_not_see_scales_that_cancel():
    """A ReLU net with the layers scaled by 10 and 1/10 has the same sharpness, at η = 0."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 6, bias=False), nn.ReLU(), nn.Linear(6, 1, bias=False))
    module.double()
    x, y = draw(16, 3), draw(16, 1)
    closure = lambda: (module(x) - y).square().mean()  # noqa: E731
    values = []
    for scale in (1.0, 10.0):
        with torch.no_grad():
            module[0].weight *= scale
            module[2].weight /= scale
        pair = gpkit.sam(adaptive=True, eta=0.0), gpkit.sam()
        values.append([float(p(closure, module).detach()) for p in pair])
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-9)
    assert values[0][1] != pytest.approx(values[1][1], rel=0.1)
