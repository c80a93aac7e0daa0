"""Single steps of a GANModule with penalties, and the Dirac-GAN, against closed forms."""

import copy
import math
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from gan_by_hand import slope
from gans import R1, B, Witness, assert_same, critic, data, generator, module, trainer
from torch import nn
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.gan import GANModule


def test_random_penalties_of_a_generator_train_it_and_leave_the_critic_alone():
    G, C = generator(), critic()
    penalty = {"path": gpkit.path_length(2.0, every=1), "weight": gpkit.weight_grad_norm(0.1)}
    fits = []
    for chosen in (None, penalty["path"], penalty["weight"], penalty):
        made = module(copy.deepcopy(G), copy.deepcopy(C), generator_penalty=chosen, critic_steps=1)
        trainer(max_steps=2).fit(made, DataLoader(data(), B))  # one step of each
        fits.append(made)
    assert [made.counts for made in fits] == [{"critic": 1, "generator": 1, "draws": 1}] * 4
    plain, *penalised = fits
    for made in penalised:
        assert_same(made.critic, plain.critic)
        difference = made.generator.layers[0].weight - plain.generator.layers[0].weight
        assert difference.abs().max() > 1e-6


def test_a_generators_weight_penalty_is_its_gradient_norm():
    G, C = Witness(nn.Linear(3, 2)), critic()
    before = copy.deepcopy(G)
    made = module(G, C, generator_penalty=gpkit.weight_grad_norm(0.7), critic_steps=1)
    made.make_optimizer["critic"] = partial(torch.optim.SGD, lr=0.0)
    trainer(max_steps=2).fit(made, DataLoader(data(), B))
    z, params = made.generator.seen[1], list(before.parameters())
    loss = -C(before(z)).mean()
    grads = torch.autograd.grad(loss, params, create_graph=True)
    total = loss + 0.7 * sum(g.square().sum() for g in grads)
    for p, q, g in zip(params, G.parameters(), torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(q, p - 0.1 * g)


def first_step(penalty):
    """Return a critic before its first step, after it, and its loss and R1 with γ 1 by hand."""
    C = critic()
    before = copy.deepcopy(C)
    sgd = partial(torch.optim.SGD, lr=0.1)
    made = module(generator(), C, penalty=penalty, critic_optimizer=sgd)
    trainer(limit_train_batches=1, max_epochs=1).fit(made, DataLoader(data(), B))
    real, fake = C.seen
    params = list(before.parameters())
    parts = before(fake).mean() - before(real).mean(), slope(before, real, None).mean() / 2
    grads = [
        torch.autograd.grad(part, params, retain_graph=True, allow_unused=True) for part in parts
    ]
    return (
        params,
        list(C.parameters()),
        *(
            [torch.zeros_like(p) if g is None else g for p, g in zip(params, of, strict=True)]
            for of in grads
        ),
    )


def test_a_weight_that_rescales_the_whole_loss():
    for p, q, of_loss, of_penalty in zip(*first_step(gpkit.r1(gpkit.rescaled(4.0))), strict=True):
        torch.testing.assert_close(q, p - 0.1 * (of_loss + 4 * of_penalty) / 4)


def test_a_weight_that_adapts_to_the_gradient_of_the_loss():
    weight = gpkit.gradient_share(0.1, weight=3.0)
    *_, of_loss, of_penalty = first_step(gpkit.r1(weight))
    ratio = sum(g.square().sum() for g in of_penalty) / sum(g.square().sum() for g in of_loss)
    assert weight(1) == pytest.approx(0.1 / ratio.sqrt().item())


def test_a_step_of_one_net_leaves_no_gradient_in_the_other():
    for steps, net in ((2, "generator"), (1, "critic")):
        made = module(generator(), critic(), critic_steps=steps, penalty=R1())
        kept = []
        made.critic.register_forward_hook(
            lambda net, x, y, made=made, kept=kept: kept.append(made.critic.layers[0].weight.grad)
        )
        trainer(limit_train_batches=1, max_epochs=1).fit(made, DataLoader(data(), B))
        if net == "generator":
            assert all(p.grad is None for p in made.generator.parameters())
        else:
            assert torch.equal(kept[-1], made.critic.layers[0].weight.grad)
        assert made.counts["generator"] == 2 - steps


class Dirac(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, z):
        return self.theta.expand(len(z), 1)


class Path(pl.Callback):
    """Keep (ψ, θ) after every step."""

    def __init__(self):
        self.points = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.points.append((module.critic.weight.item(), module.generator.theta.item()))


def sigmoid(t):
    return 1 / (1 + math.exp(-t))


@pytest.mark.parametrize(
    ("loss", "penalty", "slope", "distance"),
    [
        ("minimax", None, lambda psi: 0.0, 3.0969),
        ("wasserstein", gpkit.wgan_gp(0.35), lambda psi: 0.7 * (psi - math.copysign(1, psi)), 1.80),
        ("minimax", gpkit.r1(0.3), lambda psi: 0.3 * psi, 2.6e-6),
        ("minimax", gpkit.r1(1.0), lambda psi: psi, 9.5e-22),
    ],
    ids=["none", "wgan_gp", "r1", "critical r1"],
)
def test_dirac_gan_is_the_recurrence(loss, penalty, slope, distance):
    C, path = nn.Linear(1, 1, bias=False).double(), Path()
    nn.init.constant_(C.weight, -1.0)  # in the paper's signs, where fakes score high, ψ is 1
    sgd = partial(torch.optim.SGD, lr=0.2)
    made = GANModule(
        Dirac(),
        C,
        latent_dim=1,
        loss=loss,
        penalty=penalty,
        critic_optimizer=sgd,
        generator_optimizer=sgd,
        critic_steps=1,
        simultaneous=True,
    )
    real = torch.zeros(1000, 1, dtype=torch.float64)
    trainer(max_epochs=1, callbacks=[path]).fit(made, DataLoader(real, 2))
    psi, theta = -1.0, 1.0
    for found in path.points:
        slow = 1.0 if loss == "wasserstein" else sigmoid(psi * theta)
        psi, theta = psi - 0.2 * (slow * theta + slope(psi)), theta + 0.2 * slow * psi
        assert found == pytest.approx((psi, theta), abs=1e-9)
    assert len(path.points) == 500
    assert math.hypot(*path.points[-1]) == pytest.approx(distance, rel=0.02)


def test_points_of_a_mixture_share_the_labels_of_their_samples():
    penalty = gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"), weight=2.0)
    nets = []
    for chosen in (penalty, {"a": gpkit.r1(2.0), "b": gpkit.r2(2.0)}):  # half of each: 2·½
        torch.manual_seed(0)
        made = module(generator(2), critic(2), penalty=chosen, conditional=True, seed=1)
        trainer().fit(made, DataLoader(data(), B))
        nets.append(made)
    assert_same(nets[0].critic, nets[1].critic)
