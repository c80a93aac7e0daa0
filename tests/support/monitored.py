"""Fits that the monitor looks into, and what it must find there by plain torch."""

from functools import partial

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from loggers import Record
from modules import QUIET, SGD, Plain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

B, BATCHES = 4, 3

OPTIONS = {"accelerator": "cpu", "log_every_n_steps": 1, **QUIET}


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        return self.result(self.loss(batch), batch)


def data(dtype=torch.float64, batches=BATCHES):
    rng = torch.Generator().manual_seed(1)
    size = torch.linspace(0.2, 3, batches * B, dtype=torch.float64)[:, None]  # slopes that differ
    x = size * torch.randn(batches * B, 5, generator=rng, dtype=torch.float64)
    return TensorDataset(x.to(dtype), torch.randint(3, (len(x),), generator=rng))


def loader(dtype=torch.float64):
    return DataLoader(data(dtype), B)


def fit(module, *monitors, logger=None, batches=None, **options):
    """Train, and return what was logged."""
    logger = logger or Record()
    options = {"max_epochs": 2, **OPTIONS, **options}
    trainer = pl.Trainer(logger=logger, callbacks=list(monitors), **options)
    val = [batches or loader()] if isinstance(module, Validated) else []
    trainer.fit(module, batches or loader(), *val)
    return logger


def seen_by_hand(net, look, optimizer=SGD, accumulate=1, epochs=2, clip=None):
    """Train a copy of the net in plain torch; return ``look(net, x, y)`` of each optimiser step."""

    def total(net, x, y, weight, scale):
        return F.cross_entropy(net(x), y)

    whole, rest = divmod(BATCHES, accumulate)
    windows = ([accumulate] * whole + [rest] * (rest > 0)) * epochs
    batches, seen = [[batch] for batch in loader()] * epochs, []
    by_hand.train(
        net,
        batches,
        total,
        None,
        optimizer,
        windows=windows,
        clip=clip,
        look=lambda *args: seen.append(look(*args)),
        divide=accumulate,
    )
    return seen


def size(*parameters):
    """The norm of the gradients of parameters."""
    return torch.cat([p.grad.flatten() for p in parameters]).norm().item()


def norms_of_samples(net, x, y, where):
    """‖∂ℓ_i/∂z_i‖, each from a graph of its own."""
    norms = []
    for i in range(len(x)):
        z = (x if where == "input" else net.backbone(x))[i : i + 1].detach().requires_grad_()
        losses = F.cross_entropy(net(z) if where == "input" else net.head(z), y[i : i + 1])
        norms.append(torch.autograd.grad(losses, z)[0].norm())
    return torch.stack(norms)


def approx(values):
    return pytest.approx(values, rel=1e-6)  # a log has float32


class Manual(pl.LightningModule):
    """Two optimisers, of which the first steps twice, then the other."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        head, backbone = self.optimizers()
        for optimizer in (head, head, backbone):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(x), y))
            optimizer.step()

    def configure_optimizers(self):
        sgd = partial(torch.optim.SGD, lr=0.5)
        return [sgd(self.net.head.parameters()), sgd(self.net.backbone.parameters())]


ALL = {"inputs": "net", "activations": "net.backbone", "validation": True}


def histograms(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    return {name: events.Histograms(name) for name in events.Tags()["histograms"]}
