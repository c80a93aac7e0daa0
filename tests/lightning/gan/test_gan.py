"""GANModule under the Trainer: it trains as a hand-written loop does."""

import copy
import math
import pickle
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit
from gpkit.data.arrays import ArrayDataModule
from gpkit.lightning.gan import GANModule
from gpkit.lightning.gan.losses import GANLoss
from gpkit.lightning.gan.stepping import require_support

B, N, D = 4, 28, 2  # samples of a batch and of an epoch, and their length
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Witness(nn.Module):
    """Layers that keep a record of what they are given in training."""

    def __init__(self, *layers, labels=0):
        super().__init__()
        self.layers = nn.Sequential(*layers).double()
        self.labels = labels
        self.seen = []

    def forward(self, x, y=None):
        if self.training:
            self.seen.append(x.detach().clone())
        if self.labels:
            x = torch.cat([x, F.one_hot(y, self.labels).to(x.dtype)], 1)
        return self.layers(x)


def critic(labels=0):
    return Witness(nn.Linear(D + labels, 6), nn.Tanh(), nn.Linear(6, 1), labels=labels)


def generator(labels=0):
    layers = nn.Linear(3 + labels, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, D)
    return Witness(*layers, labels=labels)


def data(n=N):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(n, D, generator=rng, dtype=torch.float64) * torch.linspace(0.2, 3, n)[:, None]
    return TensorDataset(x, torch.arange(n) % 2)


def trainer(**options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    quiet |= {"enable_model_summary": False, "max_epochs": 2, "log_every_n_steps": 1000}
    return pl.Trainer(**{**quiet, "accelerator": "cpu", **options})


def module(G, C, **options):
    defaults = {"latent_dim": 3, "critic_optimizer": SGD, "generator_optimizer": SGD}
    return GANModule(G, C, **{**defaults, "critic_steps": 2, **options})


# Trained parameters. `by_hand` knows torch.autograd only; it takes latents and interpolates as the
# nets saw them, in the order of the steps.

LOSSES = {
    "wasserstein": (lambda a, b: b.mean() - a.mean(), lambda a, b: -b.mean()),
    "non_saturating": (
        lambda a, b: F.softplus(-a).mean() + F.softplus(b).mean(),
        lambda a, b: F.softplus(-b).mean(),
    ),
    "minimax": (
        lambda a, b: -torch.sigmoid(a).log().mean() - torch.sigmoid(-b).log().mean(),
        lambda a, b: torch.sigmoid(-b).log().mean(),
    ),
    "hinge": (
        lambda a, b: (1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean(),
        lambda a, b: -b.mean(),
    ),
    "relativistic": (
        lambda a, b: -torch.sigmoid(a - b).log().mean(),
        lambda a, b: -torch.sigmoid(b - a).log().mean(),
    ),
}


def slope(C, x, y):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(C(x, y).sum(), x, create_graph=True)
    return g.square().sum(1)  # [B]


def no_term(C, real, fake, y, points, step):
    return 0.0


def gp_term(C, real, fake, y, points, step):
    point = next(points)
    alpha = (point - fake) / (real - fake)
    torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # one for all entries
    assert 0 < alpha.min() < alpha.max() < 1
    return 5.0 * (slope(C, point, y).sqrt() - 1).square().mean()


def r1_term(C, real, fake, y, points, step):
    return 3.0 / 2 * slope(C, real, y).mean()


def lazy_term(C, real, fake, y, points, step):
    return 2 * r1_term(C, real, fake, y, points, step) if step % 2 == 0 else 0.0


def r1_r2_term(C, real, fake, y, points, step):
    return r1_term(C, real, fake, y, points, step) + 1.0 / 2 * slope(C, fake, y).mean()


def weight_term(C, real, fake, y, points, step):
    loss = LOSSES["non_saturating"][0](C(real, y), C(fake, y))
    grads = torch.autograd.grad(loss, list(C.parameters()), create_graph=True)
    return 0.1 * sum(g.square().sum() for g in grads)


R1, R2 = partial(gpkit.r1, 3.0), partial(gpkit.r2, 1.0)


def by_hand(
    G,
    C,
    seen,
    term,
    loss="non_saturating",
    accumulate=1,
    critic_steps=2,
    conditional=False,
    simultaneous=False,
    clip=None,
    gradient_clip=None,
    ema=None,
    decay=False,
    apart=False,
):
    """Train copies of the nets; return them and the average of the generator."""
    G, C = copy.deepcopy(G), copy.deepcopy(C)
    average = copy.deepcopy(G)
    of_critic, of_generator = LOSSES[loss]
    oC, oG = SGD(C.parameters()), SGD(G.parameters())
    latents, points = seen
    latents, points = iter(latents), iter(points)
    step = 0
    for _ in range(2):
        batches = [(x, y if conditional else None) for x, y in DataLoader(data(), B)]
        for i in range(0, len(batches), accumulate):
            window = batches[i : i + accumulate]

            def critic_gradient(window=window, step=step, only=""):
                oC.zero_grad()
                for x, y in window:
                    skip = only == "penalty" and term is lazy_term and step % 2
                    fake = x if skip else G(next(latents), y).detach()
                    total = 0.0 if only == "penalty" else of_critic(C(x, y), C(fake, y))
                    total = total + (0 if only == "loss" else term(C, x, fake, y, points, step))
                    if torch.is_tensor(total):
                        (total / len(window)).backward()

            def generator_gradient(window=window):
                oG.zero_grad()
                for x, y in window:
                    total = of_generator(C(x, y), C(G(next(latents), y), y)) / len(window)
                    grads = torch.autograd.grad(total, list(G.parameters()))
                    for p, g in zip(G.parameters(), grads, strict=True):
                        p.grad = g if p.grad is None else p.grad + g

            def take(optimizer, net):
                if gradient_clip:
                    norm = sum(p.grad.square().sum() for p in net.parameters()).sqrt()
                    for p in net.parameters():
                        p.grad *= min(1.0, gradient_clip / (norm + 1e-6))
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] *= 0.9 if decay else 1
                if clip and net is C:
                    for p in C.parameters():
                        p.data = p.data.clamp(-clip, clip)

            step += 1
            turn = step % critic_steps == 0
            critic_gradient(only="loss" if apart else "")
            if simultaneous and turn:
                generator_gradient()
            take(oC, C)
            if apart:
                critic_gradient(only="penalty")
                if any(p.grad is not None for p in C.parameters()):
                    take(oC, C)
            if turn:
                if not simultaneous:
                    generator_gradient()
                take(oG, G)
                if ema is not None:
                    for a, p in zip(average.parameters(), G.parameters(), strict=True):
                        a.data = ema * a.data + (1 - ema) * p.data
                    for a, b in zip(average.buffers(), G.buffers(), strict=True):
                        a.copy_(b)
    return G, C, average


def assert_same(found, true):
    """Compare parameters and buffers."""
    torch.testing.assert_close(found.state_dict(), true.state_dict(), rtol=1e-9, atol=1e-12)


def interpolates(C, x):
    """Return what a critic saw after real and fake samples."""
    rows = set(map(tuple, x.tolist()))
    after = zip(C.seen, C.seen[2:], strict=False)
    return [point for real, point in after if tuple(real[0].tolist()) in rows]


EQUALS = {  # penalty, the same by hand, options of both
    "none": (None, no_term, {}),
    "gp": (lambda: gpkit.wgan_gp(5.0), gp_term, {"loss": "wasserstein"}),
    "r1": (R1, r1_term, {}),
    "lazy": (lambda: R1(every=2), lazy_term, {}),
    "sum": (lambda: gpkit.sum({"r1": {"weight": 3.0}, "r2": {"weight": 1.0}}), r1_r2_term, {}),
    "by name": (lambda: {"a": R1(), "b": R2()}, r1_r2_term, {}),
    "weight": (lambda: gpkit.weight_grad_norm(0.1), weight_term, {}),
    "every step": (R1, r1_term, {"critic_steps": 1}),
    "accumulate": (R1, r1_term, {"accumulate": 2}),
    "accumulate, lazy": (lambda: R1(every=2), lazy_term, {"accumulate": 3}),
    "conditional": (lambda: gpkit.wgan_gp(5.0), gp_term, {"conditional": True}),
    "conditional, r1": (R1, r1_term, {"conditional": True}),
    "simultaneous": (R1, r1_term, {"simultaneous": True}),
    "clip": (None, no_term, {"clip": 0.05, "loss": "wasserstein"}),
    "gradient_clip": (R1, r1_term, {"gradient_clip": 0.3}),
    "ema": (None, no_term, {"ema": 0.9}),
    "penalty steps": (R1, r1_term, {"apart": True}),
    "penalty steps, lazy": (lambda: R1(every=2), lazy_term, {"apart": True, "accumulate": 2}),
    "schedulers": (R1, r1_term, {"decay": True}),
    **{loss: (None, no_term, {"loss": loss}) for loss in LOSSES},
}


@pytest.mark.parametrize("case", EQUALS)
def test_trains_as_a_hand_written_loop_does(case):
    penalty, term, options = EQUALS[case]
    labels = 2 if options.get("conditional") else 0
    G, C = generator(labels), critic(labels)
    given = {"loss": "non_saturating", **options}
    given["penalty_steps"] = given.pop("apart", False)
    if given.pop("decay", False):
        given["critic_scheduler"] = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
        given["generator_scheduler"] = given["critic_scheduler"]
    made = module(copy.deepcopy(G), copy.deepcopy(C), penalty=penalty and penalty(), **given)
    trainer().fit(made, DataLoader(data(), B))
    points = interpolates(made.critic, data().tensors[0]) if term is gp_term else []
    seen = made.generator.seen, points
    true_G, true_C, average = by_hand(G, C, seen, term, **options)
    assert_same(made.generator, true_G)
    assert_same(made.critic, true_C)
    if "ema" in options:
        assert_same(made.ema_generator, average)
        assert not torch.allclose(
            average.layers[0].weight, true_G.layers[0].weight
        )  # nor is it the generator
    moved = made.generator.layers[0].weight - G.layers[0].weight
    assert moved.abs().max() > 1e-4


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


# The Dirac-GAN: real samples at 0, fake ones at θ, and a critic ψx. Mescheder et al. (2018).


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


# Precision.


class ScaledOnly(MixedPrecision):
    """A gradient scaler, without autocast: its powers of two leave every gradient as it is."""

    def __init__(self, scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return nullcontext()


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": {"gp": gpkit.wgan_gp(5.0, seed=1), "r1": R1()}},
        {"penalty": R1(every=2), "penalty_steps": True},
        {"penalty": gpkit.weight_grad_norm(0.1), "gradient_clip": 0.3},
    ],
    ids=["both", "penalty steps", "gradient clip"],
)
def test_a_scaler_changes_nothing(options):
    G, C = generator(), critic()
    made = [module(copy.deepcopy(G), copy.deepcopy(C), seed=3, **copy.deepcopy(options))]
    made.append(module(G, C, seed=3, **options))
    trainer().fit(made[0], DataLoader(data(), B))
    plugin = ScaledOnly(1024.0)
    trainer(plugins=[plugin]).fit(made[1], DataLoader(data(), B))
    assert plugin.scaler.get_scale() > 4096  # it has grown between the steps
    assert_same(made[1].critic, made[0].critic)
    assert_same(made[1].generator, made[0].generator)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_as_float32_does(precision):
    G, C = generator().float(), critic().float()
    loader = DataLoader(TensorDataset(data().tensors[0].float()), B)
    plain, half = (
        module(copy.deepcopy(G), copy.deepcopy(C), penalty=gpkit.wgan_gp(1.0, seed=1), seed=3)
        for _ in range(2)
    )
    trainer(max_epochs=1).fit(plain, loader)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    plugin = MixedPrecision(precision, "cpu", scaler if precision == "16-mixed" else None)
    trainer(max_epochs=1, plugins=[plugin]).fit(half, loader)
    both = (half.critic, plain.critic, C), (half.generator, plain.generator, G)
    for net, true, start in both:
        for p, q, before in zip(
            net.parameters(), true.parameters(), start.parameters(), strict=True
        ):
            if (q - before).norm() > 1e-3:  # a bias before a batch norm has no gradient
                assert (p - q).norm() < 0.1 * (q - before).norm()


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_scale_does_not_reach_the_inner_gradient_so_it_is_taken_in_float32(precision):
    C, half = critic().float(), []
    C.register_forward_hook(lambda net, x, y: half.append(y.dtype != torch.float32))
    loader = DataLoader(data().tensors[0].float(), B)
    penalty = {"gp": gpkit.wgan_gp(), "r1": R1(), "weight": gpkit.weight_grad_norm()}
    made = module(generator().float(), C, penalty=penalty)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if precision == "16-mixed" else None
    plugin = MixedPrecision(precision, "cpu", scaler)
    trainer(plugins=[plugin], limit_train_batches=1, max_epochs=1).fit(made, loader)
    if precision == "16-mixed":  # real, fake, and then every penalty makes its own
        assert half == [True, True, False, False, False, False]
    else:  # R1 and the weights take the graph that is there
        assert half == [True, True, True]


def test_losses_of_half_precision_scores_are_taken_in_float32():
    seen = []

    def watched(real, fake):
        seen.extend(scores.dtype for scores in (real, fake))
        return fake.mean() - real.mean()

    loss = GANLoss(watched, lambda real, fake: watched(real, fake), paired=True)
    made = module(generator().float(), critic().float(), loss=loss, critic_steps=1)
    loader = DataLoader(data().tensors[0].float(), B)
    trainer(precision="bf16-mixed", limit_train_batches=1, max_epochs=1).fit(made, loader)
    assert torch.float32 in seen
    assert torch.bfloat16 not in seen


def test_steps_that_a_scaler_skips_move_neither_parameters_nor_schedules():
    G, C = generator().float(), critic().float()
    loader = DataLoader(TensorDataset(data().tensors[0].float()), B)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    made = module(copy.deepcopy(G), copy.deepcopy(C), critic_scheduler=decay, penalty=R1())
    runner = trainer(max_epochs=1, plugins=[ScaledOnly(2.0**127)], limit_train_batches=1)
    runner.fit(made, loader)
    assert_same(made.critic, C)
    assert runner.optimizers[0].param_groups[0]["lr"] == 0.1


# What is logged.


class Record(DummyLogger):
    """A logger that keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append({k: v for k, v in metrics.items() if k != "epoch"})


def test_logging_changes_no_training():
    for options in ({}, {"accumulate": 2}, {"penalty_steps": True}):
        G, C = generator(), critic()
        penalty = {"gp": gpkit.wgan_gp(5.0, seed=1), "r1": R1(every=2)}
        made = [
            module(copy.deepcopy(G), copy.deepcopy(C), penalty=copy.deepcopy(penalty), **options)
            for _ in range(2)
        ]
        for one, every in zip(made, (1, 7), strict=True):
            torch.manual_seed(5)
            trainer(log_every_n_steps=every, logger=Record()).fit(one, DataLoader(data(), B))
        assert_same(made[0].critic, made[1].critic)
        assert_same(made[0].generator, made[1].generator)


def norms(C, x):
    return slope(lambda z, _: C.layers(z), x, None).sqrt().detach()


SHARES = ("", "/max", "/above_center")


@pytest.mark.parametrize(
    ("penalty", "center"),
    [(gpkit.wgan_gp(5.0, center=0.3), 0.3), (gpkit.wgan_lp(5.0, 0.05, every=2), 0.05), (R2(), 1.0)],
    ids=["gp", "lazy", "r2"],
)
def test_logged_values_of_training(penalty, center):
    C, record = critic(), Record()
    G = Witness(nn.Linear(3, 2)).requires_grad_(False)
    penalty, name = copy.deepcopy(penalty), penalty.name
    made = module(G, C, penalty=penalty, critic_optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(log_every_n_steps=1, logger=record).fit(made, DataLoader(data(), B))
    seen = iter(C.seen)
    assert len(record.rows) == 14
    optimality = size = None
    for t, row in enumerate(record.rows):
        real, fake = next(seen), next(seen)
        acts = t % penalty.every == 0
        point = fake if name == "r2" else next(seen) if acts else None
        torch.testing.assert_close(next(seen), real)
        torch.testing.assert_close(next(seen), fake)
        between = next(seen)
        raw = (C.layers(real).mean() - C.layers(fake).mean()).detach()
        true = {"train/critic_loss": -raw, "wasserstein/raw": raw}
        steep = {"real": norms(C, real), "fake": norms(C, fake), "interpolates": norms(C, between)}
        for where, n in steep.items():
            values = n.mean(), n.max(), (n > center).double().mean()
            true |= {f"slope/{where}{end}": v for end, v in zip(SHARES, values, strict=True)}
        true["wasserstein/debiased"] = raw / steep["interpolates"].mean()
        value, weight = 0.0, 0.0
        if acts:
            n = norms(C, point)
            if name == "r2":
                weight, value, side = 1.0, n.square().mean() / 2, n.square().mean()
            elif name == "wgan_gp":
                weight, value = 5.0, (n - 0.3).square().mean()
                side = 2 * 5.0 * (n * (n - 0.3)).mean()
            else:
                weight, value = 10.0, (n - 0.05).clamp(min=0).square().mean()
                side = 2 * 5.0 * (n * (n - 0.05).clamp(min=0)).mean()
            optimality, size = raw - side, n.mean()
        true |= {"critic_optimality": optimality, f"penalty/{name}": weight * value}
        true |= {f"penalty/{name}/weight": weight, f"penalty/{name}/norm": size}  # the latest
        assert row == pytest.approx({k: float(v) for k, v in true.items()}, rel=1e-5, abs=1e-7)


def test_tensorboard_has_the_histograms(tmp_path):
    made = module(generator(), critic(), penalty=R1(every=2), histogram_every_n_epochs=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(logger=logger, log_every_n_steps=7, max_epochs=3).fit(made, DataLoader(data(), B))
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    names = {f"slope/{where}/histogram" for where in ("real", "fake", "interpolates")}
    assert set(events.Tags()["histograms"]) == names | {"penalty/r1/norm/histogram"}
    found = [e.histogram_value.num for e in events.Histograms("penalty/r1/norm/histogram")]
    assert found == [4 * B, 4 * B]  # epochs 0 and 2, every second step of seven
    (first, _) = events.Histograms("slope/real/histogram")
    assert first.histogram_value.num == B
    assert first.histogram_value.min >= 0


def test_names_of_other_losses_and_a_generator_that_trains():
    record = Record()
    made = module(generator(), critic(), loss="hinge", generator_penalty=gpkit.path_length())
    options = {"log_every_n_steps": 1, "logger": record, "max_epochs": 1}
    trainer(**options).fit(made, DataLoader(data(), B))
    names = {name for row in record.rows for name in row}
    slopes = {f"slope/{w}{end}" for w in ("real", "fake", "interpolates") for end in SHARES}
    losses = {"train/critic_loss", "train/generator_loss", "critic_optimality"}
    path = {f"penalty/path_length{end}" for end in ("", "/weight", "/norm")}
    assert names == slopes | losses | path


@pytest.mark.parametrize(("every", "accumulate", "rows"), [(3, 1, 4), (2, 3, 6)])
def test_slopes_are_measured_on_logged_steps_alone(every, accumulate, rows):
    record, C = Record(), critic()
    made = module(generator(), C, accumulate=accumulate)
    trainer(log_every_n_steps=every, logger=record).fit(made, DataLoader(data(), B))
    logged = [row for row in record.rows if "slope/real" in row]
    assert len(record.rows) == len(logged) == rows
    if accumulate == 1:
        assert len(C.seen) == 2 * 14 + made.counts["generator"] + 3 * rows


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
def test_evaluation_equals_the_hand_written_estimate(how):
    C, still = critic(), partial(torch.optim.SGD, lr=0.0)
    made = module(generator(), C, critic_optimizer=still, generator_optimizer=still)
    loader, stage = DataLoader(data(10), B), "test" if how == "test" else "val"
    outputs = []
    C.register_forward_pre_hook(lambda net, x: outputs.append((x[0].detach(), net.training)))
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    if how == "fit":
        runner.fit(made, DataLoader(data(), B), loader)
        found = {k: float(v) for k, v in runner.callback_metrics.items() if k.startswith("val")}
    else:
        (found,) = getattr(runner, how)(made, loader, verbose=False)
        (again,) = getattr(runner, how)(made, loader, verbose=False)
        assert again == found
    evaluated = [x for x, training in outputs if not training]
    true = dict.fromkeys(found, 0.0)
    for i, (x, _) in enumerate(loader):
        real, fake, *_rest, between = evaluated[5 * i : 5 * i + 5]
        assert torch.equal(real, x)
        raw = (C.layers(x).mean() - C.layers(fake).mean()).detach()
        values = -raw, -C.layers(fake).detach().mean(), raw, raw / norms(C, between).mean()
        names = "critic_loss", "generator_loss", "wasserstein/raw", "wasserstein/debiased"
        for name, value in zip(names, values, strict=True):
            true[f"{stage}/{name}"] += float(value) * len(x) / 10
    assert found == pytest.approx(true, rel=1e-5)
    assert len(evaluated) >= 15


# Random numbers, and going on.


class Points(ArrayDataModule):
    """Samples in an order that checkpoints keep."""

    task, num_outputs = "classification", 2

    def arrays(self, generator):
        x, y = data().tensors
        empty = x[:0], y[:0]
        return [(x, y), empty, empty]


UNVALIDATED = {"limit_val_batches": 0}


def lively(seed=None):
    """Return a module in which everything draws and everything has a state."""
    torch.manual_seed(0)
    G, C = generator(2).float(), critic(2).float()
    G.layers.append(nn.Dropout(0.2))
    C.layers.insert(2, nn.Dropout(0.2))
    adam = partial(torch.optim.Adam, lr=0.01)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    return module(
        G,
        C,
        penalty={"gp": gpkit.wgan_gp(5.0), "r1": gpkit.r1(gpkit.target_norm(0.5), every=3)},
        generator_penalty=gpkit.path_length(every=2),
        critic_optimizer=adam,
        generator_optimizer=adam,
        critic_scheduler=decay,
        generator_scheduler=decay,
        conditional=True,
        ema=0.9,
        accumulate=2,
        seed=seed,
    )


def states(made, runner):
    return {
        "nets": made.state_dict(),
        "optimizers": [o.state_dict() for o in runner.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in runner.lr_scheduler_configs],
        "penalties": [p.state_dict() for p in made.penalties.values()],
        "path": made.generator_penalties["path_length"].state_dict(),
        "counts": made.counts,
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (callable(a) and callable(b))


def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path):
    whole, runner = lively(), trainer(max_epochs=4, log_every_n_steps=3, **UNVALIDATED)
    runner.fit(whole, Points(batch_size=B))
    assert whole.counts == {"critic": 16, "generator": 8, "draws": 16}

    half, first = lively(), trainer(max_epochs=2, **UNVALIDATED)
    first.fit(half, Points(batch_size=B))
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert not same(half.state_dict(), whole.state_dict())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["gpkit_gan"]
    assert saved == {"critic": 8, "generator": 4, "draws": 8, "seed": 0}

    resumed, second = lively(), trainer(max_epochs=4, log_every_n_steps=3, **UNVALIDATED)
    torch.manual_seed(99)
    second.fit(resumed, Points(batch_size=B), ckpt_path=tmp_path / "half.ckpt")
    assert same(states(resumed, second), states(whole, runner))


def test_the_seed_decides_and_the_streams_of_others_stay():
    nets = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        made = lively(seed)
        made.penalties.parts.clear()
        made.generator_penalties.parts.clear()
        torch.manual_seed(state)
        before = torch.get_rng_state()
        trainer(max_epochs=1, log_every_n_steps=3, **UNVALIDATED).fit(made, Points(batch_size=B))
        assert torch.equal(torch.get_rng_state(), before)
        nets.append(made.state_dict())
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_latents_are_standard_normal_and_fresh():
    G = generator()
    trainer().fit(module(G, critic()), DataLoader(data(1400), 100))
    z = torch.cat(G.seen)
    assert len(z.unique(dim=0)) == len(z) == 100 * (28 + 14)
    assert z.mean(0).abs().max() < 4 / math.sqrt(len(z))
    assert (z.T @ z / len(z) - torch.eye(3)).abs().max() < 4 * math.sqrt(2 / len(z))


def test_samples_are_of_the_average_in_evaluation_mode_and_leave_no_trace():
    G = generator()
    made = module(G, critic(), ema=0.5)
    trainer(max_epochs=1).fit(made, DataLoader(data(), B))
    before, state = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    modes, counts = [m.training for m in made.modules()], dict(made.counts)
    first, again, other = made.sample(6), made.sample(6), made.sample(6, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not first.requires_grad
    assert same(made.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in made.modules()]
    assert made.counts == counts
    made.ema_generator.eval()
    z = []
    made.ema_generator.register_forward_pre_hook(lambda net, x: z.append(x[0]))
    made.sample(6)
    torch.testing.assert_close(first, made.ema_generator(z[0]))
    assert not torch.allclose(first, G.eval()(z[0]))


def test_samples_of_labels():
    made = module(generator(2), critic(2), conditional=True)
    zeros, ones = made.sample(4, torch.zeros(4).long()), made.sample(4, torch.ones(4).long())
    assert zeros.shape == (4, D)
    assert not torch.allclose(zeros, ones)
    assert made(torch.zeros(4, 3).double(), torch.zeros(4).long()).shape == (4, D)


# Other nets and batches.


@pytest.mark.parametrize("shape", ["[B]", "[B, 1]", "maps"])
@pytest.mark.parametrize("loss", LOSSES)
def test_scores_of_any_shape(shape, loss):
    ends = {"[B]": nn.Flatten(0), "[B, 1]": nn.Flatten(1), "maps": nn.Identity()}
    grid = (3, 3) if shape == "maps" else (4, 4)
    C = nn.Sequential(nn.Conv2d(1, 2, 2), nn.SiLU(), nn.Conv2d(2, 1, grid[0]), ends[shape])
    G = nn.Sequential(nn.Linear(3, 25), nn.Unflatten(1, (1, 5, 5)))
    of = (lambda s: s.flatten(1).mean(1)) if shape == "maps" else "output"
    made = module(G, C, loss=loss, penalty={"gp": gpkit.wgan_gp(of=of), "r1": gpkit.r1(of=of)})
    before = copy.deepcopy(made.state_dict())
    record = Record()
    options = {"max_epochs": 1, "log_every_n_steps": 2, "logger": record}
    trainer(**options).fit(made, DataLoader(torch.rand(8, 1, 5, 5), 4))
    assert not same(made.state_dict(), before)
    assert record.rows[0]["slope/real"] > 0
    scores = C(torch.rand(4, 1, 5, 5))
    assert list(scores.shape) == {"[B]": [4], "[B, 1]": [4, 1], "maps": [4, 1, 2, 2]}[shape]


def test_batches_of_any_kind():
    x, _ = data().tensors
    kinds = [DataLoader(x, B), DataLoader(TensorDataset(x), B), DataLoader(data(), B)]
    nets = []
    G, C = generator(), critic()
    for loader in kinds:
        made = module(copy.deepcopy(G), copy.deepcopy(C), seed=1)
        trainer().fit(made, loader)
        nets.append(made.state_dict())
    assert same(nets[0], nets[1])
    assert same(nets[0], nets[2])
    assert not x.requires_grad


def test_a_generator_without_parameters_is_taken_as_it_is():
    made = module(nn.Linear(3, D).double().requires_grad_(False), critic(), penalty=R1())
    before = copy.deepcopy(made.generator)
    runner = trainer()
    runner.fit(made, DataLoader(data(), B))
    assert len(runner.optimizers) == 1
    assert made.counts["generator"] == 0
    assert runner.global_step == 14
    assert_same(made.generator, before)


def test_points_of_a_mixture_share_the_labels_of_their_samples():
    penalty = gpkit.GradientPenalty(at=gpkit.mixture("real", "fake"), weight=2.0)
    nets = []
    for chosen in (penalty, {"a": gpkit.r1(2.0), "b": gpkit.r2(2.0)}):  # half of each: 2·½
        torch.manual_seed(0)
        made = module(generator(2), critic(2), penalty=chosen, conditional=True, seed=1)
        trainer().fit(made, DataLoader(data(), B))
        nets.append(made)
    assert_same(nets[0].critic, nets[1].critic)


def test_a_loss_of_ones_own():
    def squared(real, fake):
        return (real - 1).square().mean() + fake.square().mean()

    loss = GANLoss(squared, lambda real, fake: (fake - 1).square().mean())
    C, record = critic(), Record()
    params = copy.deepcopy(C)
    made = module(generator(), C, loss=loss)
    trainer(max_epochs=1, log_every_n_steps=1, logger=record).fit(made, DataLoader(data(), B))
    true = squared(params(C.seen[0]), params(C.seen[1])).item()
    assert record.rows[0]["train/critic_loss"] == pytest.approx(true)
    assert "wasserstein/raw" not in record.rows[0]


# Refusals.

WRONG = [
    ({"generator": lambda z: z}, TypeError, r"`generator=...` must be a torch.nn.Module; got a fu"),
    ({"critic": 3}, TypeError, r"`critic=...` must be a torch.nn.Module; got a int"),
    ({"critic": nn.Tanh()}, ValueError, r"`critic=...` has no parameter that requires grad"),
    ({"latent_dim": 0}, ValueError, r"`latent_dim=...` must be an integer >= 1; got 0"),
    ({"loss": "wassertein"}, ValueError, r"`loss=...` must be.*did you mean 'wasserstein'"),
    ({"loss": F.mse_loss}, TypeError, r"`loss=...` must be a name or a GANLoss; got <function"),
    ({"penalty": "r1"}, TypeError, r"a list or dict of them; got 'r1'"),
    ({"penalty": gpkit.irm()}, TypeError, r"'irm' is on environments.*use PenalizedModule"),
    (
        {"penalty": gpkit.r1(), "generator_penalty": {"r1": gpkit.jacobian()}},
        ValueError,
        r"both have a penalty 'r1'.*generator_penalty=\{'generator_r1': \.\.\.\}",
    ),
    (
        {"generator": nn.Tanh(), "generator_penalty": gpkit.path_length()},
        ValueError,
        r"`generator_penalty=...` needs a generator to train",
    ),
    ({"critic_steps": 0}, ValueError, r"`critic_steps=...` must be an integer >= 1; got 0"),
    ({"accumulate": 1.5}, ValueError, r"`accumulate=...` must be an integer >= 1; got 1.5"),
    ({"ema": 1.0}, ValueError, r"`ema=...` must be a number in \[0, 1\); got 1.0"),
    ({"ema": -0.1}, ValueError, r"`ema=...` must be a number >= 0; got -0.1"),
    ({"clip": 0}, ValueError, r"`clip=...` must be a number > 0; got 0"),
    ({"gradient_clip": 0}, ValueError, r"`gradient_clip=...` must be a number > 0; got 0"),
    ({"seed": -1}, ValueError, r"`seed=...` must be an integer >= 0; got -1"),
    ({"simultaneous": True, "penalty_steps": True}, ValueError, r"not simultaneous"),
    ({"histogram_every_n_epochs": -1}, ValueError, r"must be an integer >= 0; got -1"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), WRONG)
def test_wrong_arguments(arguments, error, words):
    given = {"generator": generator(), "critic": critic(), "latent_dim": 3, **arguments}
    with pytest.raises(error, match=words):
        GANModule(**given)


def test_nets_that_share_parameters():
    G = generator()
    with pytest.raises(ValueError, match="share 6 parameters"):
        GANModule(G, nn.Sequential(G, nn.Linear(D, 1)), latent_dim=3)


@pytest.mark.parametrize(
    ("options", "batch", "error", "words"),
    [
        ({}, torch.ones(4, 3).double(), ValueError, r"shape of the data, \[4, 3\]; got \[4, 2\]"),
        ({}, torch.ones(4).long(), TypeError, r"floating-point samples x.*got \(torch.int64 \[4\]"),
        (
            {},
            {"x": torch.ones(4, 2)},
            TypeError,
            r"takes batches x, \(x,\) or \(x, y\).*got \(dict",
        ),
        ({"conditional": True}, torch.ones(4, 2).double(), TypeError, r"takes batches \(x, y\)"),
        ({"critic": "mean"}, torch.ones(4, 2).double(), ValueError, r"each of 4 samples.*got \[\]"),
    ],
)
def test_wrong_batches(options, batch, error, words):
    C = critic()
    if options.pop("critic", ""):
        C.register_forward_hook(lambda net, x, y: y.mean())
    made = module(generator(), C, **options)
    with pytest.raises(error, match=words):
        trainer(log_every_n_steps=1).fit(made, DataLoader([batch], batch_size=None))


def test_a_trainer_under_which_gradients_would_be_wrong():
    made = module(generator(), critic(), simultaneous=True)
    runner = trainer(plugins=[ScaledOnly(2.0)])
    with pytest.raises(RuntimeError, match="`simultaneous=True` has one scale for two steps"):
        runner.fit(made, DataLoader(data(), B))


def test_a_strategy_that_shards_nets_is_refused():
    sharded = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(RuntimeError, match="got FSDPStrategy: use strategy='ddp'"):
        require_support(sharded, simultaneous=False)


def test_a_module_goes_to_another_process():
    made = lively(seed=1)
    copied = pickle.loads(pickle.dumps(made))
    assert same(copied.state_dict(), made.state_dict())
    assert copied.loss == made.loss


def test_batches_of_an_epoch_that_was_broken_off_are_left():
    C = critic()
    made = module(generator(), C, accumulate=7)
    loader = DataLoader(data(), B)

    class BreakOff(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    trainer(max_epochs=1, callbacks=[BreakOff()]).fit(made, loader)
    assert not C.seen  # the first of seven batches alone
    trainer(max_epochs=1).fit(made, loader)
    assert made.counts["critic"] == 1
