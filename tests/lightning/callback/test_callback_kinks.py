"""Finite differences under the callback keep the units of a ReLU net on their pieces."""

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from compare import relative_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

B, STEP = 64, 0.01  # many units change sides within it


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def change(module, callback, data, micro_batches):
    """The change of the parameters by one step of SGD."""
    before = [p.detach().clone() for p in module.parameters()]
    trainer = pl.Trainer(
        callbacks=[callback] if callback else [],
        max_steps=1,
        accumulate_grad_batches=micro_batches,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, B))
    after = module.parameters()
    return torch.cat([(b - a.detach()).flatten() for b, a in zip(before, after, strict=True)])


def by_hand(net, x, y, kind, micro_batches):
    """The gradient of the penalty, in plain torch."""
    parameters, total = [*net.parameters()], 0.0
    if kind == "input":
        x = x.clone().requires_grad_()
        losses = F.cross_entropy(net(x), y, reduction="none")
        (g,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        total = g.square().sum() / len(x)
    else:
        halves = zip(x.chunk(micro_batches), y.chunk(micro_batches), strict=True)
        loss = sum(F.cross_entropy(net(a), b) for a, b in halves) / micro_batches
        total = sum(
            g.square().sum() for g in torch.autograd.grad(loss, parameters, create_graph=True)
        )
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])


@pytest.mark.parametrize(
    ("kind", "scope", "micro_batches"),
    [("weight", "batch", 1), ("weight", "accumulated", 2), ("input", "sample", 1)],
)
def test_the_step_is_that_of_double_backprop(kind, scope, micro_batches):
    x = torch.randn(B * micro_batches, 16, dtype=torch.float64)
    y = torch.randint(10, (len(x),))
    module = Classifier().double()
    penalty = gpkit.GradientPenalty(
        of="loss", wrt=kind, scope=scope, estimator=gpkit.finite_difference(STEP)
    )
    data = TensorDataset(x, y)
    plain = change(copy.deepcopy(module), None, data, micro_batches)
    true = by_hand(copy.deepcopy(module).net, x, y, kind, micro_batches)
    found = change(module, gpkit.GradientPenaltyCallback(penalty), data, micro_batches) - plain
    assert relative_error(found, true) < 0.1
