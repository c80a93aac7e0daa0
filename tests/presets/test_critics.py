"""Critics with labels, of several scores, outputs or inputs; norms of pixels; the largest slope."""

from functools import partial

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import B, images
from torch import nn

import gpkit


class Conditional(nn.Module):
    """D(x, label), with scores [B]: the labels change the slope."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.label = nn.Linear(3, 4), nn.Embedding(6, 4)
        self.double()

    def forward(self, x, labels):
        return (self.body(x).tanh() * self.label(labels)).sum(1)


def vectors(n=B, seed=3):
    rng = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(2, n, 3, generator=rng, dtype=torch.float64)


def between(real, fake):
    """Return interpolates with known α, as a function of the call, for an oracle."""
    alpha = torch.linspace(0.1, 0.9, len(real), dtype=real.dtype).unsqueeze(1)
    return alpha * real + (1 - alpha) * fake


def test_a_label_is_given_and_x_is_penalised():
    # catches labels that are shuffled against the samples, or differentiated
    critic, (real, fake), labels = Conditional(), vectors(), torch.arange(B)
    penalty = gpkit.wgan_gp(weight=3.0, at=between)
    value = penalty(lambda x: critic(x, labels), real=real, fake=fake)
    params = {name: p.detach() for name, p in critic.named_parameters()}

    def true(params):
        def one(x, label):
            return torch.func.functional_call(critic, params, (x[None], label[None]))[0]

        norms = oracles.input_norms(one, 1, between(real, fake), labels)
        return 3 * (norms - 1).square().mean()

    grads, expected = torch.func.grad_and_value(true)(params)
    assert relative_error(value, expected) < 1e-12
    flat = torch.cat([g.flatten() for g in grads.values()])
    assert relative_error(gradients(value, critic), flat) < 1e-12
    value = gpkit.wgan_gp()(lambda x: critic(x, labels), real=real, fake=fake)
    assert value.requires_grad


def patch_critic():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 1)).double()  # [B, 1, 2, 2]


@pytest.mark.parametrize(
    ("of", "one"),
    [
        (lambda scores: scores.flatten(1).sum(1), torch.sum),
        (lambda scores: scores.flatten(1).mean(1), torch.mean),
        (lambda scores: scores, lambda scores: scores),
    ],
    ids=["sum", "mean", "Frobenius norm"],
)
def test_patches(of, one):
    critic, x = patch_critic(), images().real
    terms = gpkit.wgan_gp(at="data", of=of).terms(critic, x)
    norms = oracles.input_norms(lambda x: one(critic(x[None])[0].flatten()), 1, x)
    assert relative_error(terms.norms, norms) < 1e-12


def test_a_tuple_of_outputs():
    critic, x = patch_critic(), images().real

    def outputs(x):
        h = critic[:2](x)
        return critic[2](h), h

    chosen = gpkit.r1(of=lambda out: out[0])(outputs, real=x)
    assert relative_error(chosen, gpkit.r1()(critic, real=x)) < 1e-12
    z = x.clone().requires_grad_()
    assert relative_error(gpkit.r1(of=lambda out: out[0])(outputs(z), z), chosen) < 1e-12
    with pytest.raises(TypeError, match=r"got a tuple: .* `of=lambda output: output\[0\]`"):
        gpkit.r1()(outputs, real=x)


# Several inputs, at all points.

POINTS = {
    "data": "data",
    "real": "real",
    "fake": "fake",
    "interpolate": "interpolate",
    "perturb": gpkit.perturb(0.5, noise="uniform", relative=True, along=True),
    "uniform": gpkit.uniform(-3, 3),
    "mixture": gpkit.mixture("real", "interpolate", gpkit.uniform(-1, 1)),
    "computed": lambda real, fake: tuple(x + 2 * y for x, y in zip(real, fake, strict=True)),
}


@pytest.mark.parametrize("at", POINTS.values(), ids=POINTS)
def test_several_inputs_at_all_points(at):
    # one norm over both inputs, which have other shapes; catches a second input that is dropped
    critic, seen = images().net, []
    s = images()

    def f(a, b):
        seen.append(torch.cat([a.unsqueeze(1), b], 1).detach())
        return critic(torch.cat([a.unsqueeze(1), b], 1))

    real, fake = (s.real[:, 0], s.real[:, 1:]), (s.fake[:, 0], s.fake[:, 1:])
    terms = gpkit.GradientPenalty(at=at, form=gpkit.two_sided(1.0), weight=2.0).terms(
        f, real=real, fake=fake
    )
    (z,) = seen
    norms = oracles.input_norms(lambda z: s.apply(s.params, z[None])[0], 1, z)
    assert len(norms) == (3 * B if at is POINTS["mixture"] else B)
    assert relative_error(terms.norms, norms) < 1e-10
    assert relative_error(terms.penalty, 2 * (norms - 1).square().mean()) < 1e-10
    assert gradients(terms.penalty, critic).any()
    assert not any(x.requires_grad for x in (*real, *fake))


def test_inputs_that_do_not_pair():
    real, fake = vectors()
    with pytest.raises(ValueError, match=r"same shape; got \[\[5, 3\], \[5, 3\]\] and \[5, 3\]"):
        gpkit.wgan_gp()(lambda a, b: (a * b).sum(1), real=(real, real), fake=fake)


# A norm for each pixel.


def pixel_norms(f, z, norm="l2"):
    """Return the norm over channels, [B·P], of all outputs together."""
    entries = oracles.derivative(f, 1, z)  # [B, *O, C, *S]
    entries = entries.reshape(len(z), -1, z.shape[1], z[0, 0].numel())  # [B, m, C, P]
    entries = entries.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)
    return torch.linalg.vector_norm(entries, oracles.ORDS[norm], dim=1)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_norm_for_each_pixel(outputs, norm):
    # catches channels and pixels exchanged, which have the same number of entries when flattened
    s = images(outputs)
    penalty = gpkit.GradientPenalty(
        of=lambda out: out, scope="pixel", form=gpkit.two_sided(0.3, norm=norm), weight=2.0
    )
    terms = penalty.terms(s.net, s.real)
    assert terms.norms.shape == terms.values.shape == (B * 9,)

    def true(params):
        norms = pixel_norms(lambda x: s.apply(params, x[None])[0], s.real, norm)
        return 2 * (norms - 0.3).square().mean(), norms

    grads, (value, norms) = torch.func.grad_and_value(true, has_aux=True)(s.params)
    assert relative_error(terms.norms, norms) < 1e-10
    assert relative_error(terms.penalty, value) < 1e-10
    flat = torch.cat([g.flatten() for g in grads.values()])
    assert relative_error(gradients(terms.penalty, s.net), flat) < 1e-10


def test_pixels_of_several_inputs():
    s = images()
    whole = gpkit.GradientPenalty(scope="pixel").terms(s.net, s.real).norms
    pair = gpkit.GradientPenalty(scope="pixel").terms(
        lambda a, b: s.net(torch.cat([a, b], 1)), (s.real[:, :1], s.real[:, 1:])
    )
    assert relative_error(pair.norms, whole) < 1e-12


def test_projections_of_pixels_are_unbiased():
    s = images(3)
    x = s.real[1:2].expand(4096, -1, -1, -1)
    terms = gpkit.GradientPenalty(scope="pixel", estimator="projection", seed=0).terms(s.net, x)
    draws = terms.values.detach().reshape(4096, 9)
    true = pixel_norms(lambda x: s.apply(s.params, x[None])[0], s.real[1:2]).square()
    assert (abs(draws.mean(0) - true) < 4.5 * draws.std(0) / 64).all()


def test_pixels_in_a_module():
    # of="loss" at the data: each sample's loss, and the graph of the training forward
    s = images(3)
    x, y = s.real, s.target
    penalty = gpkit.input_grad_norm(weight=0.7, scope="pixel", form=gpkit.norm())
    module = gpkit.PenalizedModule(s.net, nn.MSELoss(), penalty)
    total = module.penalized_loss((x, y))

    def loss(x, y):
        return (s.apply(s.params, x[None])[0] - y).square().mean()

    entries = oracles.derivative(loss, 1, x, y).norm(dim=1)  # over channels
    true = nn.functional.mse_loss(s.net(x), y) + 0.7 * entries.mean()
    assert relative_error(total, true) < 1e-10


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ({"order": 2}, r'`scope="pixel"` takes order=1; got order=2'),
        ({"wrt": "weight"}, r"must be one of 'batch', 'sample', .*; got 'pixel'"),
    ],
    ids=str,
)
def test_pixels_refuse_axes(act, said):
    with pytest.raises(ValueError, match=said):
        gpkit.GradientPenalty(scope="pixel", **act)


@pytest.mark.parametrize("shapes", [[(3,)], [(2, 4), (2, 5)]], ids=str)
def test_pixels_need_images(shapes):
    xs = tuple(torch.ones(B, *shape) for shape in shapes)
    with pytest.raises(ValueError, match=r'`scope="pixel"` needs images \[B, C, \*S\]'):
        gpkit.GradientPenalty(scope="pixel")(
            lambda *xs: sum(x.flatten(1).square().sum(1) for x in xs), xs
        )


# The largest of the batch.


def test_max_is_the_largest_sample_alone():
    # catches a sum, a mean, and a gradient that reaches the other samples
    s = images()
    terms = gpkit.max_gp(weight=3.0, at="data").terms(s.net, s.real)
    i = terms.norms.argmax()
    assert terms.penalty == 3 * terms.values[i]
    alone = gpkit.GradientPenalty(weight=3.0)(s.net, s.real[i : i + 1])
    assert relative_error(terms.penalty, alone) < 1e-12
    assert relative_error(gradients(terms.penalty, s.net), gradients(alone, s.net)) < 1e-12
    mean = gpkit.max_gp(weight=3.0, at="data", reduce="mean")(s.net, s.real)
    assert mean < 0.9 * terms.penalty


def test_samples_that_tie_share_the_gradient():
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = torch.ones(4, 1, dtype=torch.float64)
    value = gpkit.GradientPenalty(reduce="max")(lambda x: w * x.squeeze(1), x)
    assert torch.autograd.grad(value, w)[0].tolist() == [0.5] * 4  # of w², a quarter each


def test_unknown_reduction():
    with pytest.raises(
        ValueError, match=r"`reduce=...` must be one of 'mean', 'sum', 'max'; got 'maxi'"
    ):
        gpkit.GradientPenalty(reduce="maxi")


# Presets of this kind whose one choice has a test of its own.


def test_hessian_projections_are_unbiased():
    torch.manual_seed(0)
    A = torch.randn(4, 4, dtype=torch.float64)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    penalty = gpkit.hessian(weight=0.5, seed=0)
    draws = []
    for penalty.draws in range(2000):  # each count of draws has its own
        draws.append(penalty.terms(w @ A @ w, [w]).penalty.detach())
    draws = torch.stack(draws)
    true = 0.5 * (A + A.T).square().sum()
    assert abs(draws.mean() - true) < 4 * draws.std() / 2000**0.5
    assert draws.unique().numel() > 1


def test_wgan_div_takes_its_power():
    for p in (2.0, 3.0):
        value = gpkit.wgan_div(weight=2.0, p=p, at="data")(lambda x: 3 * x, torch.ones(B, 1))
        assert value.item() == pytest.approx(2 * 3**p)


def test_dragan_takes_its_scale_and_center():
    x, seen = vectors()[0] * 5, []
    f = partial(lambda x: seen.append(x.detach()) or 3 * x[:, 0])
    value = gpkit.dragan(weight=2.0, center=1.5, scale=0.01, seed=0)(f, real=x)
    assert value.item() == pytest.approx(2 * 1.5**2)
    far = (seen[0] - x).abs().max()
    assert 0.01 < far <= 0.01 * x.std(correction=0)  # more than an absolute 0.01 could be
