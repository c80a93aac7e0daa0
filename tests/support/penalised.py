"""Small PenalizedModules in float64, and how they are trained with Lightning and by hand."""

import copy
from functools import partial

import by_hand
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

B, N, LR = 4, 16, 0.1  # the samples of a batch and of an epoch; the learning rate

SGD = partial(torch.optim.SGD, lr=LR, momentum=0.9)


def mlp(*norm, outputs=3):
    layers = nn.Linear(5, 6), *norm, nn.Tanh(), nn.Linear(6, outputs)
    return nn.Sequential(*layers).double()


def classes(n=N):
    rng = torch.Generator().manual_seed(1)
    size = torch.linspace(0.2, 3, n, dtype=torch.float64)[:, None]  # slopes that differ
    x = size * torch.randn(n, 5, generator=rng, dtype=torch.float64)
    return TensorDataset(x, torch.randint(3, (n,), generator=rng))


def values(n=N):
    x, _ = classes(n).tensors
    return TensorDataset(x, x[:, :1] - x[:, 1:2] ** 2)


def trainer(**options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 2, "logger": False, "log_every_n_steps": 1, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_model_summary": False, **defaults, **options})


def fit(net, penalty, data, loss=F.cross_entropy, options=None, **kinds):
    """Train a copy of the net and return it."""
    module = gpkit.PenalizedModule(copy.deepcopy(net), loss, penalty, optimizer=SGD, **kinds)
    trainer(**(options or {})).fit(module, DataLoader(data, B))
    return module.net


def trained_by_hand(net, data, penalty, loss=F.cross_entropy, accumulate=1):
    """Train a copy of the net; `penalty(net, x, y, losses, output, step)` is added to the loss."""

    def total(net, x, y, step, scale):
        x.requires_grad_()
        output = net(x)
        losses = loss(output, y, reduction="none").reshape(len(x), -1).mean(1)
        return losses.mean() + penalty(net, x, y, losses, output, step)

    batches = [[batch] for batch in DataLoader(data, B)] * 2
    windows = [accumulate] * (len(batches) // accumulate)
    return by_hand.train(net, batches, total, lambda step: step, SGD, windows=windows)


WEIGHT = partial(gpkit.weight_grad_norm, weight=0.1)

INPUT = partial(gpkit.input_grad_norm, weight=0.5)


def whole(output):
    return output


SLOPE = partial(gpkit.GradientPenalty, of=whole, form=gpkit.two_sided(0.7), weight=2.0)


def assert_same(found, true):
    """Compare parameters and buffers."""
    torch.testing.assert_close(found.state_dict(), true.state_dict(), rtol=1e-9, atol=1e-12)


NORMS = {"grad_norm/weight", "grad_norm/input"}
