"""Small GANs in float64, and how they are trained."""

from functools import partial

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from gan_by_hand import SGD, slope
from torch import nn
from torch.utils.data import TensorDataset

import gpkit
from gpkit.lightning.gan import GANModule

B, N, D = 4, 28, 2  # samples of a batch and of an epoch, and their length


class Seen(list):
    """A record that is kept: a penalty's own forward pass puts plain lists of a module back."""


class Witness(nn.Module):
    """Layers that keep a record of what they are given in training."""

    def __init__(self, *layers, labels=0):
        super().__init__()
        self.layers = nn.Sequential(*layers).double()
        self.labels = labels
        self.seen = Seen()

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


R1, R2 = partial(gpkit.r1, 3.0), partial(gpkit.r2, 1.0)


def assert_same(found, true):
    """Compare parameters and buffers."""
    torch.testing.assert_close(found.state_dict(), true.state_dict(), rtol=1e-9, atol=1e-12)


def norms(C, x):
    return slope(lambda z, _: C.layers(z), x, None).sqrt().detach()


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


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (callable(a) and callable(b))
