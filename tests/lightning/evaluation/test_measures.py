"""Attacks, Lipschitz estimates and the Hessian, against closed forms and dense references."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from gpkit.lightning.evaluation.attacks import fgsm, pgd
from gpkit.lightning.evaluation.sharpness import hessian_product, top_eigenvalue, trace
from gpkit.lightning.evaluation.smoothness import local_lipschitz, squared_jacobian


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def rng():
    return torch.Generator().manual_seed(0)


# Attacks. Of a linear score s = w·x of two classes, the worst s in the ball is s ∓ ε ‖w‖₁.


@pytest.fixture
def linear():
    """Return weights, samples, labels, and the losses of each sample."""
    w, x = torch.randn(2, 3, 4), torch.randn(50, 2, 3, 4)
    y = torch.randint(2, (50,))

    def losses(moved):
        score = (moved * w).flatten(1).sum(1)
        return F.cross_entropy(torch.stack([-score, score], 1), y, reduction="none")

    return w, x, y, losses


def margins(w, x, y):
    return (x * w).flatten(1).sum(1) * (2 * y - 1)


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
def test_an_attack_finds_the_worst_point_of_a_linear_score(attack, linear):
    w, x, y, losses = linear
    epsilon = 0.1
    if attack == "fgsm":
        moved = fgsm(losses, x, epsilon, -math.inf, math.inf)
    else:
        options = {"steps": 20, "step_size": 2.5 * epsilon / 20, "rng": rng()}
        moved = pgd(losses, x, epsilon, -math.inf, math.inf, **options)
    found = margins(w, moved, y)
    torch.testing.assert_close(found, margins(w, x, y) - epsilon * w.abs().sum())


def test_an_attack_stays_in_the_ball_and_in_the_range(linear):
    _, x, _, losses = linear
    x = x.clamp(-0.5, 0.5)
    for moved in (
        fgsm(losses, x, 0.2, -0.5, 0.5),
        pgd(losses, x, 0.2, -0.5, 0.5, steps=3, step_size=0.5, rng=rng()),
    ):
        assert (moved - x).abs().max() <= 0.2 + 1e-12
        assert moved.abs().max() <= 0.5
        assert not moved.requires_grad


def test_pgd_is_the_loop_written_by_hand():
    """A net with one hidden layer, whose gradient is written out."""
    a, b = np.random.default_rng(0).normal(size=(5, 3)), np.random.default_rng(1).normal(size=5)
    x = torch.rand(7, 3)

    def losses(z):
        return torch.tanh(z @ torch.tensor(a).T) @ torch.tensor(b)

    start = torch.rand(7, 3, generator=rng(), dtype=torch.float32).double().numpy() * 2 - 1
    moved = np.clip(x.numpy() + 0.3 * start, 0, 1)
    for _ in range(4):
        grad = (b * (1 - np.tanh(moved @ a.T) ** 2)) @ a
        moved = moved + 0.1 * np.sign(grad)
        moved = np.clip(np.clip(moved, x.numpy() - 0.3, x.numpy() + 0.3), 0, 1)
    torch.set_default_dtype(torch.float32)  # the dtype of the draws
    found = pgd(losses, x, 0.3, 0.0, 1.0, steps=4, step_size=0.1, rng=rng())
    np.testing.assert_allclose(found.numpy(), moved, atol=1e-12)


# Smoothness.


def test_the_jacobian_is_that_of_torch_func():
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(5, 2, 3, 3)
    dense = vmap(jacrev(lambda one: net(one[None])[0]))(x)
    torch.testing.assert_close(squared_jacobian(net, x), dense.flatten(1).square().sum(1))


def test_the_lipschitz_constant_of_a_linear_map_is_its_largest_singular_value():
    w, x = torch.randn(6, 2, 4), torch.randn(3, 2, 4)
    found = local_lipschitz(
        lambda x: torch.einsum("oij,bij->bo", w, x), x, 0.1, steps=300, rng=rng()
    )
    largest = torch.linalg.svdvals(w.flatten(1))[0]
    torch.testing.assert_close(found, largest.expand(3))


def test_the_lipschitz_estimate_is_the_steepest_chord():
    """In one dimension there are two directions, and ten starts meet both."""
    x = torch.linspace(-1, 1, 5)[:, None].repeat(10, 1)
    found = local_lipschitz(torch.sin, x, 0.5, steps=5, rng=rng()).reshape(10, 5)
    chords = [
        (torch.sin(x[:5, 0] + s * 0.5) - torch.sin(x[:5, 0])).abs() / 0.5 for s in (-1.0, 1.0)
    ]
    steepest = torch.stack(chords).max(0).values
    assert (found <= steepest + 1e-12).all()
    torch.testing.assert_close(found.max(0).values, steepest)


def test_a_constant_net_is_flat():
    x = torch.randn(3, 4)
    found = local_lipschitz(lambda x: 0 * x, x, 0.1, steps=3, rng=rng())
    torch.testing.assert_close(found, torch.zeros(3))


# Sharpness.


@pytest.fixture
def dense():
    """Return a loss, its parameters, and its Hessian [n, n]."""
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    names, sizes = zip(*((n, p.numel()) for n, p in net.named_parameters()), strict=True)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def loss(flat):
        parts = dict(zip(names, flat.split(sizes), strict=True))
        shaped = {n: parts[n].reshape(p.shape) for n, p in net.named_parameters()}
        return F.cross_entropy(functional_call(net, shaped, (x,)), y)

    return F.cross_entropy(net(x), y), list(net.parameters()), jacrev(jacrev(loss))(theta)


def test_products_are_those_of_the_dense_hessian(dense):
    loss, parameters, h = dense
    v = torch.randn(len(h))
    torch.testing.assert_close(hessian_product(loss, parameters)(v), h @ v)


def test_the_largest_eigenvalue(dense):
    loss, parameters, h = dense
    product, true = hessian_product(loss, parameters), torch.linalg.eigvalsh(h)
    like = torch.zeros(())
    found = [
        top_eigenvalue(product, len(h), steps=m, rng=rng(), like=like) for m in (3, 12, len(h), 100)
    ]
    assert found == sorted(found)  # a lower bound that rises
    assert found[1] == pytest.approx(true[-1].item(), rel=1e-6)
    assert found[2] == found[3] == pytest.approx(true[-1].item(), rel=1e-10)


def test_the_largest_eigenvalue_is_the_largest_not_that_of_largest_size():
    a = torch.diag(torch.tensor([-9.0, 1.0, 2.0]))
    found = top_eigenvalue(lambda v: a @ v, 3, steps=9, rng=rng(), like=torch.zeros(()))
    assert found == pytest.approx(2.0)
    zero = top_eigenvalue(torch.zeros_like, 3, steps=9, rng=rng(), like=torch.zeros(()))
    assert zero == 0.0


def test_the_trace(dense):
    loss, parameters, h = dense
    options = {"samples": 400, "rng": rng(), "like": torch.zeros(())}
    found = trace(hessian_product(loss, parameters), len(h), **options)
    off = h - h.diag().diag()
    error = math.sqrt(2 * off.square().sum().item() / 400)
    assert abs(found - h.trace().item()) < 4 * error
    assert error < 0.3 * h.trace()
    d = torch.randn(9)
    options = {"samples": 1, "rng": rng(), "like": d}
    assert trace(lambda v: d * v, 9, **options) == pytest.approx(d.sum().item())


def test_a_loss_that_is_linear_has_no_curvature():
    w = torch.randn(3, requires_grad=True)
    torch.testing.assert_close(hessian_product((2 * w).sum(), [w])(torch.ones(3)), torch.zeros(3))
