"""``subsample=``: the penalty of a random part of the samples is that of all of them on average."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn

import gpkit
from gpkit.axes import mixtures

B = 5


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(B, 2, 4, 4, dtype=torch.float64) * torch.arange(1, B + 1).reshape(B, 1, 1, 1)
    return net, x


def squared_slopes(net, x):
    """‖∇f(x_i)‖² ``[B]``, by torch alone."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.flatten(1).square().sum(1)


def squared_norms(net, x):
    """‖∇_θ ℓ_i‖² ``[B]``, by torch alone, one sample at a time."""
    params = list(net.parameters())
    rows = [torch.autograd.grad(y, params, create_graph=True) for y in net(x).square().unbind(0)]
    return torch.stack([sum(g.square().sum() for g in row) for row in rows])


FORMS = {"squared": lambda n2: n2, "two-sided": lambda n2: (n2.sqrt() - 1) ** 2}
AXES = {"squared": "squared", "two-sided": gpkit.two_sided(1.0)}
WAYS = {
    "inputs": (
        partial(gpkit.input_grad_norm, 1.0),
        squared_slopes,
        lambda net, x: (lambda z: net(z), x),
    ),
    "weights": (
        lambda **axes: gpkit.weight_grad_norm(1.0, scope="sample", **axes),
        squared_norms,
        lambda net, x: (lambda: net(x).square().squeeze(1), net),
    ),
    "losses": (
        lambda **axes: gpkit.weight_grad_norm(1.0, scope="sample", **axes),
        squared_norms,
        lambda net, x: (net(x).square().squeeze(1), net),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:the norms of each sample")
def test_the_mean_over_all_parts_is_the_penalty_of_all_samples(way, form, monkeypatch):
    make, n2_of, args = WAYS[way]
    net, x = setting()
    params = list(net.parameters())
    penalty = make(form=AXES[form], subsample=0.4)  # 2 of 5 samples
    totals, parts = [], list(itertools.combinations(range(B), 2))
    for rows in parts:
        monkeypatch.setattr(
            "gpkit.axes.mixtures.rows_of" if way == "inputs" else "gpkit.axes.parameters.rows_of",
            lambda *_, rows=rows: torch.tensor(rows),
        )
        value = penalty(*args(net, x))
        of_part = FORMS[form](n2_of(net, x))[list(rows)].mean()
        torch.testing.assert_close(value, of_part)
        totals.append(value)
    value, true = torch.stack(totals).mean(), FORMS[form](n2_of(net, x)).mean()
    torch.testing.assert_close(value, true)
    grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
    trues = torch.autograd.grad(true, params, allow_unused=True, materialize_grads=True)
    for g, t in zip(grads, trues, strict=True):
        torch.testing.assert_close(g, t)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 30])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 1.0])
def test_its_size_and_that_each_sample_is_as_likely(count, fraction):
    rng = torch.Generator().manual_seed(0)
    size = math.ceil(round(fraction * count, 6))
    found = [mixtures.rows_of(count, fraction, rng, torch.device("cpu")) for _ in range(400)]
    assert {(len(rows), len(set(rows.tolist()))) for rows in found} == {(size, size)}
    share = torch.bincount(torch.cat(found), minlength=count) / 400
    tolerance = 5 * (size / count * (1 - size / count) / 400) ** 0.5
    assert ((share - size / count).abs() <= tolerance + 1e-6).all()


@pytest.mark.parametrize("preset", [gpkit.r1, gpkit.wgan_gp, gpkit.dragan, gpkit.r1_r2])
def test_only_the_chosen_samples_are_run(preset):
    net, x = setting()
    seen = []
    net.register_forward_hook(lambda m, args, y: seen.append(args[0].detach()))
    penalty = preset(subsample=0.4, seed=3)
    given = {"real": x} if preset in (gpkit.r1, gpkit.dragan) else {"real": x, "fake": -x}
    before = torch.get_rng_state()
    for _ in range(4):
        penalty(net, **given)
    assert {len(z) for z in seen} == {4 if preset is gpkit.r1_r2 else 2}
    assert not all(torch.equal(z, seen[0]) for z in seen)  # a fresh part each time
    assert torch.equal(torch.get_rng_state(), before)


def test_a_restored_penalty_goes_on_with_the_same_parts():
    net, x = setting()
    penalty, again = gpkit.r1(subsample=0.4, seed=3), gpkit.r1(subsample=0.4)
    penalty(net, real=x)
    again.load_state_dict(penalty.state_dict())
    assert penalty(net, real=x) == again(net, real=x)


def test_finite_differences_and_projections_take_it():
    net, x = setting()
    for estimator in ("projection", gpkit.finite_difference(1e-6, "central")):
        value = gpkit.r1(2.0, subsample=0.4, seed=3, estimator=estimator).terms(net, real=x)
        assert len(value.norms) == 2
    exact = gpkit.r1(2.0, subsample=0.4, seed=3).terms(net, real=x)
    torch.testing.assert_close(value.norms, exact.norms, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"subsample": 0.0}, r"in \(0, 1\]; got 0"),
        ({"subsample": 1.5}, r"in \(0, 1\]; got 1.5"),
        ({"subsample": "half"}, r"`subsample=\.\.\.`"),
        ({"subsample": 0.5, "reduce": "max"}, "takes reduce='mean'; got 'max'"),
        ({"subsample": 0.5, "wrt": "weight"}, "scope='batch' has one norm.*use scope='sample'"),
        ({"subsample": 0.5, "wrt": "weight", "scope": "global"}, "scope='global' has one norm"),
    ],
)
def test_what_would_be_another_number_is_refused(axes, words):
    with pytest.raises((ValueError, TypeError), match=words) as error:
        gpkit.GradientPenalty(**axes)
    assert "\n" not in str(error.value)


def test_refusals_of_a_call():
    net, x = setting()
    penalty = gpkit.r1(subsample=0.4)
    z = x.clone().requires_grad_()
    with pytest.raises(ValueError, match="needs a callable"):
        penalty(net(z), z)
    with pytest.raises(ValueError, match=r"subsample=0\.4 draws the samples itself"):
        penalty(net, real=x, sample_weight=torch.ones(B))
    balanced = gpkit.mixture("real", "fake", balanced=True)
    with pytest.raises(ValueError, match="points that weigh the same"):
        gpkit.input_grad_norm(at=balanced, subsample=0.4)(net, real=x, fake=-x[:2])


def test_in_lightning():
    net, x = setting()
    loss = nn.MSELoss()
    with pytest.raises(ValueError, match=r"subsample=0\.4 of a penalty of the loss takes some"):
        gpkit.PenalizedModule(net, loss, gpkit.input_grad_norm(of="loss", subsample=0.4))
    with pytest.raises(ValueError, match=r"subsample=0\.4 of a penalty of the loss takes some"):
        gpkit.PenalizedModule(net, loss, gpkit.weight_grad_norm(scope="sample", subsample=0.4))
    y = torch.zeros(B, 1, dtype=torch.float64)
    module = gpkit.PenalizedModule(net, loss, gpkit.r1(3.0, subsample=0.4, seed=3))
    total = module.penalized_loss((x, y))
    alone = gpkit.r1(3.0, subsample=0.4, seed=3)(net, real=x)
    torch.testing.assert_close(total, loss(net(x), y) + alone)
    with pytest.raises(TypeError, match="is for penalties of a critic's scores"):
        gpkit.GANModule(
            setting()[0], net, latent_dim=3, generator_penalty=gpkit.path_length(subsample=0.5)
        )
