"""Exact is the whole norm; projections are unbiased, of the variance that theory gives."""

import pickle

import oracles
import pytest
import torch
from compare import gradients, relative_error
from torch import nn

import gpkit
from gpkit.estimators.projection import DISTRIBUTIONS

DRAWS = 4096  # samples of one batch, all alike: each has its own projections
distributions = pytest.mark.parametrize("distribution", DISTRIBUTIONS)


def estimates(f, x, order=1, estimator="projection"):
    """Return n² of many independent estimates at one point x ``[n]``: ``[DRAWS]``."""
    penalty = gpkit.GradientPenalty(order=order, estimator=estimator, seed=0)
    return penalty.terms(f, x.expand(DRAWS, *x.shape)).values


def assert_mean(draws, true, sigmas=4.0):
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - true) < sigmas * error + 1e-12 * true


def net(n, m):
    return nn.Sequential(nn.Linear(n, 5), nn.Tanh(), nn.Linear(5, m)).double()


@distributions
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("outputs", [1, 4])
def test_projections_are_unbiased(distribution, order, outputs):
    # catches a factor of the dimension, one direction for all samples, and a repeated one
    f, x = net(3, outputs), torch.randn(3, dtype=torch.float64)
    true = oracles.input_norms(lambda z: f(z[None])[0], order, x[None]).item() ** 2
    draws = estimates(f, x, order, gpkit.projection(1, distribution))
    assert_mean(draws, true)
    if order == outputs == 1:
        assert draws.std() < 1e-12 * true  # nothing is random
    else:
        assert draws.unique().numel() > 1


@distributions
def test_projections_are_unbiased_in_the_weights(distribution):
    A = torch.randn(3, 3, dtype=torch.float64)
    u, v = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (1, 2))
    w = torch.cat([u, v])
    penalty = gpkit.GradientPenalty(
        of="loss", wrt="weight", order=2, estimator=gpkit.projection(400, distribution)
    )
    draws = []
    for penalty.draws in range(2):  # each count of draws has its own
        draws.append(penalty.terms(w @ A @ w, [u, v]).values)
    draws = torch.cat(draws)
    assert_mean(draws.detach(), (A + A.T).square().sum(), sigmas=5)


@distributions
def test_a_repeated_direction_would_be_caught(distribution):
    # E (vᵀHv)² = 2‖H‖² + tr(H)² for Gaussian v, and ‖D_v D_v ∇f‖² likewise at order 3
    A = torch.randn(4, 4, dtype=torch.float64) + 2 * torch.eye(4)
    H = A + A.T
    estimator = gpkit.projection(1, distribution)
    draws = estimates(
        lambda x: torch.einsum("bi,ij,bj->b", x, A, x), torch.ones(4).double(), 2, estimator
    )
    assert_mean(draws, H.square().sum())
    wrong = 2 * H.square().sum() + H.trace() ** 2
    assert abs(draws.mean() - wrong) > 10 * draws.std() / DRAWS**0.5

    c = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)  # f = Σ c x³ / 6: T_iii = c_i
    draws = estimates(lambda x: (x**3 @ c) / 6, torch.ones(3).double(), 3, estimator)
    assert_mean(draws, c.square().sum())
    if distribution == "gaussian":  # E v⁴ = 3
        assert abs(draws.mean() - 3 * c.square().sum()) > 10 * draws.std() / DRAWS**0.5


@distributions
def test_spread_is_the_theorys(distribution):
    # ten outputs: Rademacher about 0.23 of the mean, Gaussian about 0.52
    J = torch.randn(10, 34, dtype=torch.float64)
    draws = estimates(
        lambda x: x @ J.T, torch.zeros(34).double(), 1, gpkit.projection(1, distribution)
    )
    true = oracles.projection_std(J @ J.T, distribution)
    assert (draws.std() / draws.mean()).item() == pytest.approx(true, rel=0.05)
    assert true == pytest.approx(
        {"rademacher": 0.23, "gaussian": 0.52, "sphere": 0.23}[distribution], abs=0.03
    )


def test_more_projections_are_averaged():
    J = torch.randn(10, 34, dtype=torch.float64)
    one, nine = (
        estimates(lambda x: x @ J.T, torch.zeros(34).double(), 1, gpkit.projection(n))
        for n in (1, 9)
    )
    assert_mean(nine, J.square().sum())
    assert (one.std() / nine.std()).item() == pytest.approx(3, rel=0.1)


def test_samples_have_directions_of_their_own():
    J = torch.randn(10, 3, dtype=torch.float64)
    draws = estimates(lambda x: x @ J.T, torch.zeros(3).double())
    half = draws.reshape(2, -1)
    assert draws.unique().numel() > 100  # of 512
    assert abs(torch.corrcoef(half)[0, 1]) < 4 / half.shape[1] ** 0.5


@pytest.mark.parametrize("order", [1, 2])
def test_exact_with_many_outputs_and_inputs(order):
    # the norm is over all outputs and all inputs together
    f, x = net(4, 3), torch.randn(5, 4, dtype=torch.float64)
    true = oracles.input_norms(lambda z: f(z[None])[0], order, x)
    exact = gpkit.GradientPenalty(order=order)
    whole = exact.terms(f, x).norms
    pair = exact.terms(lambda a, b: f(torch.cat([a, b], 1)), (x[:, :1], x[:, 1:])).norms
    images = exact.terms(lambda x: f(x.flatten(1)).reshape(5, 1, 3), x.reshape(5, 2, 1, 2)).norms
    for norms in (whole, pair, images):
        assert relative_error(norms, true) < 1e-12


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_norms_over_several_inputs(norm):
    f, x = net(4, 3), torch.randn(5, 4, dtype=torch.float64)
    penalty = gpkit.GradientPenalty(form=gpkit.norm(norm=norm))
    norms = penalty(lambda a, b: f(torch.cat([a, b], 1)), (x[:, :1], x[:, 1:]))
    true = oracles.input_norms(lambda z: f(z[None])[0], 1, x, norm=norm)
    assert relative_error(norms, true.mean()) < 1e-12


def test_projection_of_a_scalar_gradient_is_exact():
    f, x = net(4, 1), torch.randn(5, 4, dtype=torch.float64)
    for scope in ({}, {"wrt": "weight"}):
        args = (f, x) if not scope else (lambda: f(x).square().mean(), f)
        exact, estimate = (
            gpkit.GradientPenalty(estimator=e, **scope)(*args)
            for e in ("exact", gpkit.projection(3, "gaussian"))
        )
        torch.testing.assert_close(exact, estimate, rtol=1e-14, atol=0)


@distributions
def test_gradient_of_an_estimate_is_unbiased_too(distribution):
    f, x = net(3, 4), torch.randn(1, 3, dtype=torch.float64).expand(DRAWS, 3)
    exact, estimate = (
        gradients(gpkit.jacobian(weight=1.0, estimator=e)(f, x), f)
        for e in ("exact", gpkit.projection(1, distribution))
    )
    assert relative_error(estimate, exact) < 0.1


def test_squares_do_not_overflow_in_half_precision():
    # 300² is infinite in float16
    x = torch.ones(5, 2, dtype=torch.float16)
    for estimator in ("exact", "projection"):
        terms = gpkit.GradientPenalty(estimator=estimator).terms(lambda x: 300 * x[:, 0], x)
        assert terms.norms.tolist() == [300.0] * 5


@pytest.mark.parametrize(
    ("outputs", "estimator", "passes"),
    [
        (1, "exact", 1),
        (4, "exact", 4),
        (1, gpkit.projection(2), 1),
        (4, gpkit.projection(2), 2),
    ],
)
def test_number_of_backward_passes(outputs, estimator, passes):
    f, counted = net(3, outputs), []

    def hooked(x):
        y = f(x)
        y.register_hook(counted.append)
        return y

    gpkit.GradientPenalty(estimator=estimator).terms(hooked, torch.ones(5, 3).double())
    assert len(counted) == passes


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: gpkit.projection(0), r"`projection\(n=...\)` must be an integer >= 1; got 0"),
        (lambda: gpkit.projection(2.0), "must be an integer >= 1; got 2.0"),
        (lambda: gpkit.projection(1, "gauss"), r"got 'gauss' \(did you mean 'gaussian'\?\)"),
        (
            lambda: gpkit.jacobian(form=gpkit.squared(norm="l1")),
            r"`estimator=projection\(\)` estimates the l2 norm; got norm='l1'",
        ),
        (lambda: gpkit.jacobian(estimator="projections"), r"did you mean 'projection'\?"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_is_a_value():
    assert pickle.loads(pickle.dumps(gpkit.projection(3))) == gpkit.projection(3)
    assert gpkit.exact() == gpkit.exact()
