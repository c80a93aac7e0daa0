"""The slopes of a critic, its optimality and the Wasserstein estimates, against closed forms."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.gan import GANModule
from gpkit.lightning.gan.losses import LOSSES
from gpkit.lightning.gan.slopes import center, optimality, scales_with_critic, slopes, wasserstein

A = torch.tensor([1.5, -2.0], dtype=torch.float64)  # of the critic A·x, whose slope n is 2.5
N = 2.5


def linear(x):
    return x @ A


def samples(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 2, generator=rng, dtype=torch.float64) for _ in range(2)]


SIDES = {  # penalty, n times the derivative of its form, with its weight
    "wgan_gp": (gpkit.wgan_gp(5.0, center=0.7), 2 * 5 * N * (N - 0.7)),
    "lazy": (gpkit.wgan_gp(5.0, every=4), 2 * 5 * N * (N - 1)),
    "below": (gpkit.wgan_lp(5.0, center=3.0), 0.0),
    "above": (gpkit.wgan_lp(5.0), 2 * 5 * N * (N - 1)),
    "r1": (gpkit.r1(3.0), 3 * N**2),
    "r2": (gpkit.r2(3.0), 3 * N**2),
    "zero_gp": (gpkit.zero_gp(3.0), 2 * 3 * N**2),
    "dragan": (gpkit.dragan(5.0), 2 * 5 * N * (N - 1)),
    "wgan_div": (gpkit.wgan_div(2.0), 2 * 6 * N**6),
    "max_gp": (gpkit.max_gp(3.0), 2 * 3 * N**2),
    "norm": (gpkit.GradientPenalty(form="norm", weight=3.0), 3 * N),
}
GROWTH = {  # −d/ds of a loss of scores sa and sb, at s = 1
    "wasserstein": lambda a, b: a.mean() - b.mean(),
    "non_saturating": lambda a, b: (a * (-a).sigmoid()).mean() - (b * b.sigmoid()).mean(),
    "minimax": lambda a, b: (a * (-a).sigmoid()).mean() - (b * b.sigmoid()).mean(),
    "hinge": lambda a, b: a[a < 1].sum() / len(a) - b[b > -1].sum() / len(b),
    "relativistic": lambda a, b: ((a - b) * (b - a).sigmoid()).mean(),
}


@pytest.mark.parametrize("loss", GROWTH)
@pytest.mark.parametrize("case", SIDES)
def test_optimality_is_the_derivative_along_the_scale(case, loss):
    penalty, side = SIDES[case]
    real, fake = samples()
    terms = penalty.terms(linear, real=real, fake=fake)
    assert scales_with_critic(penalty)
    a, b = linear(real), linear(fake)
    found = optimality(LOSSES[loss], a, b, [(penalty, terms)])
    assert found.item() == pytest.approx(GROWTH[loss](a, b).item() - side, rel=1e-10)


def test_optimality_without_penalties_or_with_several():
    a, b = map(linear, samples())
    raw = (a.mean() - b.mean()).item()
    cases = [SIDES[name] for name in ("wgan_gp", "r1")]
    real, fake = samples()
    pairs = [(p, p.terms(linear, real=real, fake=fake)) for p, _ in cases]
    loss = LOSSES["wasserstein"]
    assert optimality(loss, a, b, []).item() == pytest.approx(raw)
    assert optimality(loss, a, b, [(cases[0][0], None)]).item() == pytest.approx(raw)
    sides = sum(side for _, side in cases)
    assert optimality(loss, a, b, pairs).item() == pytest.approx(raw - sides)


@pytest.mark.parametrize(
    "penalty",
    [
        gpkit.weight_grad_norm(),
        gpkit.contractive(of=gpkit.activation("0")),
        gpkit.r1(wrt=gpkit.activation("0")),
    ],
)
def test_penalties_whose_norms_do_not_scale_with_the_critic(penalty):
    assert not scales_with_critic(penalty)


class Still(nn.Module):
    """Fakes at zero."""

    def forward(self, z):
        return z * 0


@pytest.mark.parametrize("weight", [10.0, 0.5])
def test_two_points_at_a_distance_of_four(weight):
    """The optimum is a slope of n = 1 + 4 / 2λ and a gap of 4n; their ratio is the distance."""
    critic = nn.Linear(1, 1).double()
    nn.init.constant_(critic.weight, 0.5)
    module = GANModule(
        Still(),
        critic,
        latent_dim=1,
        penalty=gpkit.wgan_gp(weight),
        critic_optimizer=partial(torch.optim.SGD, lr=0.4 / weight),
    )
    runner = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    runner.fit(module, DataLoader(torch.full((200, 1), 4.0, dtype=torch.float64), 4))
    found = {name: float(value) for name, value in runner.callback_metrics.items()}
    n = 1 + 4 / (2 * weight)
    assert found["slope/interpolates"] == pytest.approx(n)
    assert found["wasserstein/raw"] == pytest.approx(4 * n)
    assert found["wasserstein/debiased"] == pytest.approx(4)
    assert found["critic_optimality"] == pytest.approx(0, abs=1e-5)


def test_slopes_of_a_quadratic():
    real, fake = samples()
    found = slopes(lambda x: x.square().sum(1) / 2, real, fake, seed=3)
    torch.testing.assert_close(found["real"], real.norm(dim=1))  # the gradient is x itself
    torch.testing.assert_close(found["fake"], fake.norm(dim=1))
    lowest = torch.stack(
        [((1 - t) * fake + t * real).norm(dim=1) for t in torch.linspace(0, 1, 99)]
    )
    assert (found["interpolates"] <= lowest.amax(0)).all()
    assert (found["interpolates"] >= lowest.amin(0) - 0.01).all()
    again = slopes(lambda x: x.square().sum(1) / 2, real, fake, seed=3)
    assert torch.equal(found["interpolates"], again["interpolates"])


def test_slopes_of_maps_are_those_of_the_mean_score():
    real, fake = samples()
    found = slopes(lambda x: torch.stack([x @ A, 3 * x @ A], 1)[:, None], real, fake, seed=3)
    for n in found.values():
        torch.testing.assert_close(n, torch.full((8,), 2 * N, dtype=torch.float64))


def test_slopes_leave_no_trace():
    critic = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1)
    ).double()
    before, stream = copy.deepcopy(critic.state_dict()), torch.get_rng_state()
    real, fake = samples()
    slopes(critic, real, fake, seed=3)
    for name, value in critic.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in critic.parameters())
    assert not real.requires_grad


def test_a_critic_without_a_slope_has_an_estimate_of_zero():
    flat = {"interpolates": torch.zeros(4)}
    found = wasserstein(torch.ones(4), torch.ones(4), flat)
    assert found == {"wasserstein/raw": 0, "wasserstein/debiased": 0}


def test_the_centre_is_that_of_the_first_penalty_that_has_one():
    assert center([]) == 1.0
    assert center([gpkit.r1()]) == 1.0
    assert center([gpkit.r1(), gpkit.wgan_gp(center=0.3), gpkit.wgan_lp()]) == 0.3
