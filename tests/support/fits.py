"""Fits of small modules in float64 with Lightning, and the batches that they are given."""

import copy

import by_hand
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import QUIET, SGD
from torch.utils.data import DataLoader

import gpkit

LAMBDA = 0.3
CLOSE = {"rtol": 0, "atol": 1e-12}


def batches(count=6, size=6):
    """Return (x, y) of as many micro-batches."""
    rng = torch.Generator().manual_seed(2)
    xs = torch.randn(count, size, 5, generator=rng, dtype=torch.float64)
    return list(zip(xs, torch.randint(3, (count, size), generator=rng), strict=True))


def one_rank(micro):
    """Return micro-batches as `by_hand.train` takes them."""
    return [[batch] for batch in micro]


def fit(module, callbacks, micro, *, lightning=pl, epochs=1, ckpt_path=None, **options):
    """Fit a copy of a module, and return it."""
    module = copy.deepcopy(module)
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=callbacks,
        **{"logger": False, "log_every_n_steps": 1, **QUIET, **options},
    )
    trainer.fit(module, loader(micro), ckpt_path=ckpt_path)
    return module


def loader(micro):
    """Return micro-batches in their order; the loader's own draws leave the stream alone."""
    return DataLoader(micro, batch_size=None, generator=torch.Generator())


def difference(module, true):
    """Return the largest difference of any parameter."""
    pairs = zip(module.parameters(), true.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def assert_trained_as(module, true):
    assert difference(module, true) < 1e-12


def penalty(where="weight", estimator="exact", weight=LAMBDA, **axes):
    """Return a penalty as `by_hand` knows it: of the weights or the inputs."""
    made = gpkit.weight_grad_norm if where == "weight" else gpkit.input_grad_norm
    if estimator == "difference":
        estimator = gpkit.finite_difference(0.05)
    return made(weight, estimator=estimator, **axes)


def callback(where="weight", estimator="exact", weight=LAMBDA, **axes):
    module = None if where == "weight" else "net"
    return gpkit.GradientPenaltyCallback(penalty(where, estimator, weight, **axes), module)


def train_pooled(net, windows, weight=LAMBDA, estimator="exact", *, extra=None, start=None):
    """Train by hand with λ‖∇L‖², L the mean loss of all micro-batches of an optimiser step.

    Args:
        net: is trained in place, and returned.
        windows: for each step its micro-batches, and what the sum of their losses is divided by.
        weight: λ, or a function of the step.
        estimator: "exact" or "difference".
        extra: ``(net, x, y) -> penalty`` of each micro-batch, averaged as the losses are.
        start: called with the number of a micro-batch before each forward.
    """
    optimizer, count = SGD(net.parameters()), 0
    for step, (micro, size) in enumerate(windows):
        now = weight(step) if callable(weight) else weight

        def loss_of(net, first=count, micro=micro, size=size):
            losses = []
            for i, (x, y) in enumerate(micro, first):
                if start:
                    start(i)
                losses.append(F.cross_entropy(net(x), y))
            return sum(losses) / size

        count += len(micro)
        params, before = list(net.parameters()), copy.deepcopy(net)
        loss = loss_of(net)
        exact = estimator == "exact"
        grads = torch.autograd.grad(loss, params, create_graph=exact, retain_graph=True)
        length = by_hand.squares(grads).sqrt()
        if exact:
            total = loss + now * length**2
        else:
            with torch.no_grad():
                for p, g in zip(before.parameters(), grads, strict=True):
                    p += by_hand.STEP * g / length
            there = torch.autograd.grad(loss_of(before), list(before.parameters()))
            slopes = [
                2 * length * (b - a) / by_hand.STEP for a, b in zip(grads, there, strict=True)
            ]
            total = loss + now * by_hand.linear(params, slopes)
        if extra:
            total = total + sum(extra(net, x, y) for x, y in micro) / size
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    return net


def grouped(micro, size):
    """Return windows of as many micro-batches; the last may have fewer, and is divided alike."""
    return [(micro[i : i + size], size) for i in range(0, len(micro), size)]
