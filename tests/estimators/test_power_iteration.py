"""Power iteration is the largest singular value of each sample's Jacobian, and so its gradient."""

import pickle

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import B
from torch import nn
from torch.func import functional_call

import gpkit


def conv(outputs=4):
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, outputs)
    ).double()


def images():
    size = torch.tensor([0.05, 2.0, 0.5, 8.0, 1.0]).double().reshape(B, 1, 1, 1)
    return torch.randn(B, 2, 3, 3, dtype=torch.float64) * size


def dense(net, x):
    """Return σ_max for each sample, and the gradient of the mean of σ_max² in the parameters."""

    def formula(params):
        norms = oracles.spectral_norms(lambda z: functional_call(net, params, (z[None],))[0], x)
        return norms.square().mean(), norms

    params = {n: p.detach() for n, p in net.named_parameters()}
    grads, norms = torch.func.grad(formula, has_aux=True)(params)
    return norms, torch.cat([g.flatten() for g in grads.values()])


def diagonal(*entries, samples=B):
    """Return a linear map of known singular values, and points to take it at."""
    A = torch.diag(torch.tensor(entries, dtype=torch.float64))
    return lambda x: x @ A, torch.zeros(samples, len(entries), dtype=torch.float64)


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("route", ["callable", "graph"])
def test_is_the_largest_singular_value(outputs, route):
    # catches the Frobenius norm, one vector for all samples, the norm of the whole batch,
    # norm(dim=1) on images, and a gradient that goes through u and v or through neither
    net, x = conv(outputs), images()
    penalty = gpkit.GradientPenalty(estimator=gpkit.power_iteration(100))
    z = x.clone().requires_grad_()
    terms = penalty.terms(net, x) if route == "callable" else penalty.terms(net(z), z)
    norms, gradient = dense(net, x)
    assert norms.max() > 1.2 * norms.min()
    assert terms.norms.shape == (B,)
    assert relative_error(terms.norms, norms) < 1e-10
    assert relative_error(gradients(terms.penalty, net), gradient) < 1e-8


def test_one_step_is_power_iteration():
    # u has weights 1, t² with t = σ₂/σ₁ after a step, from a start u₁, u₂:
    # n² = (σ₁² u₁² + σ₂² u₂² t⁴) / (u₁² + u₂² t⁴). A step too few or too many is seen.
    f, x = diagonal(2.0, 1.0, samples=4096)
    penalty = gpkit.GradientPenalty(estimator=gpkit.power_iteration(1), seed=0)
    found = penalty.terms(f, x).values
    assert (found <= 4 + 1e-12).all()  # never above σ²
    ratio = (4 - found) / (found - 1)  # = (u₂/u₁)² t⁴, and |u₂/u₁| has the median 1
    assert ratio.median().sqrt().item() == pytest.approx(0.25, rel=0.06)


def test_more_iterations_are_nearer():
    net, x = conv(12), images()
    norms, _ = dense(net, x)
    found = [
        gpkit.GradientPenalty(estimator=gpkit.power_iteration(k), seed=0).terms(net, x).norms
        for k in (1, 3, 6)
    ]
    errors = [relative_error(n, norms) for n in found]
    assert errors[0] > errors[1] > errors[2]
    assert all((n <= norms + 1e-10).all() for n in found)


@pytest.mark.parametrize(("outputs", "bound"), [(3, 1e-8), (10, 1e-8), (40, 0.01)])
@pytest.mark.parametrize("seed", range(3))
def test_fresh_relu_nets_at_the_default(outputs, bound, seed):
    # their largest singular values are close: power iteration has the gradient 15 % off
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)
    ).double()
    x = torch.randn(16, 20, dtype=torch.float64)
    norms, gradient = dense(net, x)
    terms = gpkit.GradientPenalty(estimator="power_iteration", seed=seed).terms(net, x)
    assert relative_error(terms.norms, norms) < bound
    assert relative_error(gradients(terms.penalty, net), gradient) < bound


def test_a_zero_jacobian_is_harmless():
    net, x = conv(), images()
    with torch.no_grad():
        net[3].weight.zero_()
    penalty = gpkit.spectral_jacobian(weight=1.0)(net, x)
    assert penalty == 0
    assert gradients(penalty, net).eq(0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_the_iteration_neither_under_nor_overflows(scale):
    # squares of the entries of Jv are not float32 numbers; u must be a unit vector all the same
    A = torch.diag(torch.tensor([3.0, 1.0])) * scale
    y = torch.zeros(B, 2, requires_grad=True)
    z = y @ A
    u = gpkit.power_iteration(20).iterate(z, (y,), torch.ones(B, 2), batched=True)
    torch.testing.assert_close(u, torch.tensor([1.0, 0.0]).expand(B, 2))


def test_several_inputs_are_one_vector():
    # catches singular values input by input
    A, C = (torch.randn(3, n, dtype=torch.float64) for n in (2, 4))
    xs = tuple(torch.zeros(B, n, dtype=torch.float64) for n in (2, 4))
    penalty = gpkit.GradientPenalty(estimator=gpkit.power_iteration(200))
    terms = penalty.terms(lambda x, z: x @ A.T + z @ C.T, xs)
    true = torch.linalg.svdvals(torch.cat([A, C], 1))[0]
    torch.testing.assert_close(terms.norms, true.expand(B))


def test_an_input_that_is_not_used():
    f, x = diagonal(2.0, 1.0)
    penalty = gpkit.GradientPenalty(estimator=gpkit.power_iteration(30))
    assert penalty.terms(lambda x, z: f(x), (x, x)).norms.tolist() == pytest.approx([2.0] * B)


def test_in_the_weights():
    # the spectral norm of the Jacobian of the mean outputs in all parameters together
    net, x = conv(3), images()
    penalty = gpkit.GradientPenalty(wrt="weight", estimator=gpkit.power_iteration(200))
    found = penalty.terms(lambda: net(x), net).norms
    params = {n: p.detach() for n, p in net.named_parameters()}
    J = torch.func.jacrev(lambda p: functional_call(net, p, (x,)).mean(0))(params)
    true = torch.linalg.svdvals(torch.cat([j.flatten(1) for j in J.values()], 1))[0]
    torch.testing.assert_close(found, true[None])


@pytest.mark.parametrize(("outputs", "passes"), [(1, 1), (4, 5)])
def test_number_of_forwards_and_backward_passes(outputs, passes):
    # K steps of Jᵀu, the one that is differentiated for Jv, and the last; one output needs the last
    f, counted = conv(outputs), []

    def hooked(x):
        y = f(x)
        y.register_hook(counted.append)
        return y

    gpkit.GradientPenalty(estimator=gpkit.power_iteration(3)).terms(hooked, images())
    assert len(counted) == passes


def test_two_equal_singular_values():
    # σ² has no gradient there; ours is one of its subgradients, and finite
    W = torch.eye(3, dtype=torch.float64).requires_grad_()
    x = torch.zeros(B, 3, dtype=torch.float64)
    value = gpkit.spectral_jacobian(weight=1.0)(lambda x: x @ W.T, x)
    (gradient,) = torch.autograd.grad(value, W)
    assert value.item() == pytest.approx(1.0)
    assert gradient.trace().item() == pytest.approx(2.0)  # 2 σ tr uvᵀ, u = v


def test_named():
    assert gpkit.spectral_jacobian().estimator == gpkit.power_iteration(10)
    named = gpkit.GradientPenalty(estimator="power_iteration")
    assert named.estimator == gpkit.power_iteration(iterations=10)
    assert pickle.loads(pickle.dumps(named.estimator)) == named.estimator


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: gpkit.power_iteration(0),
            r"`power_iteration\(iterations=...\)` must be an integer >= 1; got 0",
        ),
        (lambda: gpkit.spectral_jacobian(order=2), r"a first derivative; got order=2, norm='l2'"),
        (
            lambda: gpkit.spectral_jacobian(form=gpkit.squared(norm="l1")),
            r"gives the spectral \(l2\) norm .* norm='l1': use estimator='exact'",
        ),
        (lambda: gpkit.jacobian(estimator="power"), r"did you mean 'power_iteration'\?"),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError, match=said):
        make()
