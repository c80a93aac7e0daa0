"""Uniform points and mixtures: in the box, in order, one mean over all; labels where there are."""

import pickle

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import B
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.axes.at import computed, data, fake

MANY = 4096


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(*shape, n=B):
    return torch.randn(2, n, *shape, generator=rng(9), dtype=torch.float64).unbind()


def mlp(outputs=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def one_sample(net, z):
    return net(z[None])[0]


# Uniform.


def test_uniform_fills_its_box():
    # Kolmogorov-Smirnov in each dimension: catches U[0, 1], one end for all, and low exchanged
    low, high = torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([1.0, 3.0, 6.0])
    (z,) = gpkit.uniform(low, high)((samples(3, n=MANY)[0],), None, rng())
    assert z.shape == (MANY, 3)
    assert z.dtype == torch.float64
    unit = ((z.detach() - low) / (high - low)).sort(0).values
    assert (unit - torch.linspace(0, 1, MANY)[:, None]).abs().max() < 1.63 / MANY**0.5
    assert abs(torch.corrcoef(((z.detach() - low) / (high - low)).T)[0, 1]) < 4 / MANY**0.5


@pytest.mark.parametrize(
    ("low", "high", "shape"),
    [
        (-2, 3, (2, 3, 4)),
        ([-2.0, -2.0], 3, (2,)),
        ([[[-2.0]], [[0.0]]], [[[3.0]], [[1.0]]], (2, 3, 4)),  # one box for each channel
    ],
)
def test_uniform_has_the_samples_shape(low, high, shape):
    x = samples(*shape)[0].float()
    (z,) = gpkit.uniform(low, high)((x,), None, rng())
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    assert z.requires_grad
    ends = torch.as_tensor(low), torch.as_tensor(high)
    assert ((z >= ends[0]) & (z <= ends[1])).all()


def test_a_box_is_a_value():
    box = gpkit.uniform(torch.tensor([0.0, 1.0]), [2, 3])
    assert box == gpkit.uniform([0, 1], (2.0, 3.0)) == pickle.loads(pickle.dumps(box))
    assert hash(box) == hash(gpkit.uniform([0, 1], [2, 3]))


# Mixtures.


def test_mixture_is_the_concatenation():
    x, y = samples(2, 3)
    at = gpkit.mixture("real", "fake", lambda real, fake: real + 2 * fake, gpkit.uniform(8, 9))
    (z,) = at((x,), (y,), rng())
    assert torch.equal(z[: 3 * B], torch.cat([x, y, x + 2 * y]))
    assert z[3 * B :].min() >= 8
    assert z.is_leaf
    assert z.requires_grad


def test_mixture_shares_alpha_among_inputs():
    (x1, y1), (x2, y2) = samples(3), [2 * s for s in samples(2, 2)]
    z1, z2 = gpkit.mixture("real", "interpolate")((x1, x2), (y1, y2), rng())
    assert torch.equal(z1[:B], x1)
    assert torch.equal(z2[:B], x2)
    alphas = [((z[B:] - y) / (x - y)).flatten(1)[:, 0] for z, x, y in ((z1, x1, y1), (z2, x2, y2))]
    torch.testing.assert_close(*alphas)
    assert alphas[0].unique().numel() == B


def test_mean_runs_over_all_points_of_a_mixture():
    # catches a mean of means, and a mixture that is evaluated at its first part only
    net, (x, y) = mlp(), samples(3)
    y = y[:2]  # parts of different sizes
    penalty = gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"), weight=2.0)
    terms = penalty.terms(net, real=x, fake=y)
    true = oracles.input_norms(lambda z: one_sample(net, z), 1, torch.cat([x, y]))
    assert relative_error(terms.norms, true) < 1e-12
    assert relative_error(terms.penalty, 2 * true.square().mean()) < 1e-12
    again = gpkit.GradientPenalty(weight=2.0)(net, torch.cat([x, y]))
    assert relative_error(gradients(terms.penalty, net), gradients(again, net)) < 1e-12


@pytest.mark.parametrize("detach", [True, False])
def test_each_part_cuts_its_own_points(detach):
    generator, net = nn.Linear(3, 3).double(), mlp()
    x = samples(3)[0]
    at = gpkit.mixture("real", fake(detach=detach))
    gpkit.GradientPenalty(at=at)(net, real=x, fake=generator(x)).backward()
    assert (generator.weight.grad is None) == detach
    assert net[0].weight.grad.any()


def test_eikonal_in_a_box():
    net, x = mlp(), samples(3)[0]
    seen = []

    def f(z):
        seen.append(z.detach())
        return net(z)

    assert gpkit.eikonal().at == data()
    terms = gpkit.eikonal(weight=0.3, low=[5, -1, 0], high=[6, 0, 9]).terms(f, x)
    (z,) = seen
    assert torch.equal(z[:B], x)
    assert z.shape == (2 * B, 3)
    assert (z[B:] >= torch.tensor([5, -1, 0])).all()
    assert (z[B:] <= torch.tensor([6, 0, 9])).all()
    norms = oracles.input_norms(lambda z: one_sample(net, z), 1, z)
    assert relative_error(terms.penalty, 0.3 * (norms - 1).square().mean()) < 1e-12


def test_r1_r2_is_the_sum_of_both():
    net, (x, y) = mlp(), samples(3)
    both = gpkit.r1_r2(weight=3.0)(net, real=x, fake=2 * y)
    parts = gpkit.r1(weight=3.0)(net, real=x) + gpkit.r2(weight=3.0)(net, fake=2 * y)
    assert relative_error(both, parts) < 1e-12
    assert relative_error(gradients(both, net), gradients(parts, net)) < 1e-12
    summed = gpkit.sum({"r1_r2": {"weight": 3.0}})
    assert summed(net, real=x, fake=2 * y) == both
    assert list(summed.terms(net, real=x, fake=y)) == ["r1_r2"]


# In PenalizedModule: labels belong to samples, points may be more.


def at_data_twice():
    return gpkit.mixture("data", computed(lambda real, fake: 2 * real))


@pytest.mark.parametrize("reduction", ["mean", "own"])
def test_labels_are_repeated_for_a_mixture(reduction):
    net, x, y = mlp(3), samples(3)[0], torch.arange(B) % 3
    loss = nn.CrossEntropyLoss() if reduction == "mean" else lambda o, t: F.cross_entropy(o, t)
    penalty = gpkit.input_grad_norm(weight=0.7, at=at_data_twice())
    module = gpkit.PenalizedModule(net, loss, penalty)
    total = module.penalized_loss((x, y))

    def risk(z, y):
        return F.cross_entropy(net(z[None]), y[None])

    norms = oracles.input_norms(risk, 1, torch.cat([x, 2 * x]), torch.cat([y, y]))
    true = F.cross_entropy(net(x), y) + 0.7 * norms.square().mean()
    assert relative_error(total, true) < 1e-12


@pytest.mark.parametrize("preset", ["duq", "eikonal", "jacobian", "r1_r2", "dragan", "max_gp"])
def test_outputs_need_no_labels(preset):
    net, x, y = mlp(2), samples(3)[0], samples(2)[0]
    at = {"at": gpkit.mixture("data", gpkit.uniform(-1, 1))} if preset == "duq" else {}
    box = {"low": -1, "high": 1.0} if preset == "eikonal" else {}
    one = {"of": lambda out: out[:, 0]} if preset in ("eikonal", "dragan") else {}
    penalty = getattr(gpkit, preset)(**at, **box, **one)
    module = gpkit.PenalizedModule(net, nn.MSELoss(), penalty)
    module.penalized_loss((x, y)).backward()
    assert net[0].weight.grad.any()


def test_labels_that_do_not_fit_the_points():
    penalty = gpkit.input_grad_norm(at=lambda real, fake: real[:2])
    module = gpkit.PenalizedModule(mlp(), nn.MSELoss(), penalty)
    said = "a target for each point; got 2 points, which is no multiple of the 5 samples"
    with pytest.raises(ValueError, match=said):
        module.penalized_loss((samples(3)[0], torch.zeros(B, 1).double()))


# Refusals.

X = torch.zeros(B, 3)


def f(x):
    return x.square().sum(1)


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (
            lambda: gpkit.uniform("a", 1),
            ValueError,
            r"`uniform\(low=...\)` must be a finite",
        ),
        (lambda: gpkit.uniform(0, float("inf")), ValueError, r"`uniform\(high=...\)` .* got inf"),
        (lambda: gpkit.uniform(1, 0), ValueError, r"needs low <= high; got 1.0, 0.0"),
        (lambda: gpkit.uniform([0, 0], [1, 1, 1]), ValueError, r"broadcast; got \[2\] and \[3\]"),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.uniform([0, 0], 1))(f, X),
            ValueError,
            r"has bounds of shape \[2\], which does not broadcast to a sample \[3\]",
        ),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.uniform([[0, 0, 0]] * B, 1))(f, X),
            ValueError,
            r"bounds of shape \[5, 3\], which does not broadcast",  # would broadcast with the batch
        ),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.uniform())(f, X.long()),
            TypeError,
            "got torch.int64: use their embedding",
        ),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.uniform())(f, fake=X),
            ValueError,
            r"`at=uniform\(\)` needs real=...",
        ),
        (gpkit.mixture, ValueError, "needs at least one kind of points"),
        (lambda: gpkit.mixture("date"), ValueError, r"got 'date' \(did you mean 'data'\?\)"),
        (lambda: gpkit.mixture(3), TypeError, r"`mixture\(...\)` must be one of .* got 3"),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"))(
                f, real=X, fake=X[:, :2]
            ),
            ValueError,
            r"samples of the same shape from each part; got \[3\] and \[2\]",
        ),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"))(f, real=X),
            ValueError,
            r"`at=fake\(\)` needs fake=...",
        ),
        (
            lambda: gpkit.GradientPenalty(at=gpkit.mixture("real", "fake", equal=True))(
                f, real=X, fake=X[:2]
            ),
            ValueError,
            r"needs the same number of points from each part; got 5 and 2",
        ),
        (
            lambda: gpkit.r1_r2()(f(X), real=X, fake=X),
            ValueError,
            r"`at=mixture\(\)` needs a callable",
        ),
        (
            lambda: gpkit.eikonal(low=0.0),
            ValueError,
            r"needs both ends of the box, or none; got 0.0, None",
        ),
    ],
)
def test_refusals(act, error, said):
    with pytest.raises(error, match=said):
        act()
