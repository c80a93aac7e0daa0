"""Points: on the segment, of the stated moments, cut off their graph, from their own generator."""

import pytest
import torch
from scenes import B
from torch import nn

import gpkit
from gpkit.axes.at import POINTS, as_points, computed, data, fake, real

SHAPES = pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)], ids=str)
MANY = 4096


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(*shape, n=B):
    return torch.randn(2, n, *shape, generator=rng(9), dtype=torch.float64).unbind()


@pytest.mark.parametrize(("at", "which"), [(data, 0), (real, 0), (fake, 1)])
@pytest.mark.parametrize("detach", [True, False])
def test_the_samples_themselves(at, which, detach):
    # catches real and fake exchanged, and a requires_grad that is set on the user's tensor
    xs = samples(2, 3)
    (z,) = at(detach=detach)((xs[0],), (xs[1],), rng())
    assert torch.equal(z, xs[which])
    assert z.requires_grad
    assert z.is_leaf
    assert not any(x.requires_grad for x in xs)


@SHAPES
def test_interpolates_have_one_alpha_a_sample(shape):
    x, y = samples(*shape)
    (z,) = gpkit.interpolate()((x,), (y,), rng())
    alpha = ((z - y) / (x - y)).detach().reshape(B, -1)
    torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))
    assert alpha[:, 0].unique().numel() == B


def test_alpha_is_uniform():
    # Kolmogorov-Smirnov: catches U[-1, 1], a normal, and a square root
    x, y = torch.ones(MANY, 1), torch.zeros(MANY, 1)
    (z,) = gpkit.interpolate()((x,), (y,), rng())
    alpha = z.detach().flatten().sort().values
    assert (alpha - torch.linspace(0, 1, MANY)).abs().max() < 1.63 / MANY**0.5  # 1 in 100


def test_several_inputs_share_alpha():
    (x1, y1), (x2, y2) = samples(3), [2 * s for s in samples(2, 2)]
    z1, z2 = gpkit.interpolate()((x1, x2), (y1, y2), rng())
    alphas = [((z - y) / (x - y)).flatten(1)[:, 0] for z, x, y in ((z1, x1, y1), (z2, x2, y2))]
    torch.testing.assert_close(*alphas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_is_the_samples(dtype):
    x, y = (s.to(dtype) for s in samples(3))
    for at in (gpkit.interpolate(), gpkit.perturb(relative=True, along=True)):
        (z,) = at((x,), (y,), rng())
        assert z.dtype == dtype


@pytest.mark.parametrize("noise", ["normal", "uniform", "positive"])
@pytest.mark.parametrize("relative", [False, True])
def test_perturbation_moments(noise, relative):
    x = samples(2, 3, n=MANY)[0] * 4 + 1
    (z,) = gpkit.perturb(0.5, noise=noise, relative=relative)((x,), None, rng())
    delta = ((z - x).detach() / 0.5) / (x.std(correction=0) if relative else 1)
    count, variance = delta.numel(), {"normal": 1, "uniform": 1 / 3, "positive": 1 / 12}[noise]
    mean = 0.5 if noise == "positive" else 0.0
    assert abs(delta.mean() - mean) < 4 * (variance / count) ** 0.5
    assert delta.var().item() == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)
    assert (delta.abs().max() <= 1) == (noise != "normal")
    assert (delta.min() >= 0) == (noise == "positive")


def test_perturbation_along_has_one_alpha_a_sample():
    # of a thousand uniform entries the largest is nearly α: catches one α for all, and α per entry
    x = torch.zeros(400, 10, 100)
    (z,) = gpkit.perturb(0.5, noise="uniform", along=True)((x,), None, rng())
    delta = z.detach().flatten(1) / 0.5
    high, low = delta.amax(1), -delta.amin(1)
    torch.testing.assert_close(high, low, rtol=0.02, atol=0)
    alpha = high.sort().values
    assert (alpha - torch.linspace(0, 1, 400)).abs().max() < 1.63 / 400**0.5


def test_computed_points_get_what_the_call_got():
    x, y = samples(3)
    penalty = gpkit.GradientPenalty(at=lambda real, fake: real + 2 * fake)
    seen = []

    def f(z):
        seen.append(z.detach())
        return z.square().sum(1)

    penalty(f, real=x, fake=y)
    assert torch.equal(seen[0], x + 2 * y)
    (z,) = computed(lambda real, fake: real if fake is None else fake)((x,), None, rng())
    assert torch.equal(z, x)
    pair = computed(lambda real, fake: (real[0], real[1]))((x, y), None, rng())
    assert torch.equal(torch.stack(pair), torch.stack([x, y]))


@pytest.mark.parametrize("at", [gpkit.interpolate, fake], ids=lambda at: at.__name__)
@pytest.mark.parametrize("detach", [True, False])
def test_generator_is_trained_only_if_asked(at, detach):
    generator, critic = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(B, 3)
    penalty = gpkit.GradientPenalty(at=at(detach=detach))
    penalty(critic, real=x, fake=generator(x)).backward()
    assert (generator.weight.grad is None) == detach
    assert critic[0].weight.grad.any()


def test_requires_grad_and_graphs_of_the_samples_are_untouched():
    x = samples(3)[0].requires_grad_()
    y = samples(3)[1]
    (z,) = gpkit.interpolate()((x,), (y,), rng())
    z.sum().backward()
    assert x.grad is None
    assert x.requires_grad
    assert not y.requires_grad


def test_inference_tensors_are_copied():
    with torch.inference_mode():
        x, y = torch.randn(2, B, 3).unbind()
    for name, at in POINTS.items():
        (z,) = at()((x,), (y,), rng())
        assert not z.is_inference(), name
        z.square().sum().backward()


def test_only_their_own_generator_is_drawn_from():
    x, y = samples(3)
    before = torch.get_rng_state()
    for at in POINTS.values():
        first, second, other = (at()((x,), (y,), rng(seed))[0] for seed in (5, 5, 6))
        assert torch.equal(first, second)
        assert torch.equal(first, other) != at.moves
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("act", "error", "said"),
    [
        (lambda p, x: p("fake")(f, real=x), ValueError, r"`at=fake\(\)` needs fake=..., which was"),
        (lambda p, x: p("real")(f, fake=x), ValueError, r"`at=real\(\)` needs real=..., which was"),
        (lambda p, x: p("interpolate")(f, x), ValueError, r"`at=interpolate\(\)` needs fake=..."),
        (
            lambda p, x: p("interpolate")(f, real=x, fake=x[:2]),
            ValueError,
            r"needs real and fake samples of the same shape; got \[5, 3\] and \[2, 3\]",
        ),
        (
            lambda p, x: p("interpolate")(f, real=x, fake=x[:, :1]),
            ValueError,
            r"same shape; got \[5, 3\] and \[5, 1\]",  # would broadcast
        ),
        (lambda p, x: p("data")(f, x.long()), TypeError, r"got torch.int64: use their embed"),
        (lambda p, x: p("data")(f, x.to(torch.cfloat)), TypeError, "got torch.complex64"),
        (lambda p, x: p("interpolated")(f, x), ValueError, "did you mean 'interpolate'"),
        (lambda p, x: p(gpkit.perturb(-1.0))(f, x), ValueError, r"`perturb\(scale=...\)`.* >= 0"),
        (
            lambda p, x: p(gpkit.perturb(noise="unifrom"))(f, x),
            ValueError,
            r"one of 'normal', 'uniform', 'positive'; got 'unifrom' \(did you mean 'uniform'\?\)",
        ),
        (lambda p, x: p(3)(f, x), TypeError, r"`at=...` must be one of 'data', .* got 3"),
        (lambda p, x: p(lambda real, fake: None)(f, x), TypeError, "must be a tensor .* NoneType"),
    ],
)
def test_refusals(act, error, said):
    with pytest.raises(error, match=said):
        act(lambda at: gpkit.GradientPenalty(at=at), torch.zeros(B, 3))


def f(x):
    return x.square().sum(1)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.zeros(()), ValueError, r"must be \[B, ...\], with the same batch .* got \[\[\]\]"),
        ((torch.zeros(3, 1), torch.zeros(4, 1)), ValueError, r"got \[\[3, 1\], \[4, 1\]\]"),
        ((), ValueError, r"got \[\]"),
        ({"x": 1}, TypeError, r"a tensor \[B, ...\] or a tuple of them; got dict"),
        ((torch.zeros(3), "x"), TypeError, "got str"),
    ],
)
def test_what_is_no_sample(x, error, said):
    with pytest.raises(error, match=said):
        as_points(x)
