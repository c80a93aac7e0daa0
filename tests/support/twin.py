"""A module with a penalty that it adds by hand, or leaves to a callback."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import QUIET
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

LAMBDA = 0.3
KINDS = [("weight", "exact"), ("input", "finite_difference")]
RNG = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=RNG, dtype=torch.float64)
Y = torch.randint(0, 3, (24,), generator=RNG)
DATA = TensorDataset(X, Y)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


class Twin(pl.LightningModule):
    """Forms derive from it, and differ in how a step, a batch or a hook is written.

    Args:
        by_hand: "weight" or "input", what the penalty is in that `penalised` adds by hand to the
            loss, or "" for none.
    """

    def __init__(self, by_hand=""):
        super().__init__()
        self.net, self.by_hand = net(), by_hand

    def pair(self, batch):
        return batch

    def scores(self, x):
        return self.net(x)

    def criterion(self, scores, y):
        return F.cross_entropy(scores, y)

    def loss_of(self, batch):
        x, y = self.pair(batch)
        self.x = x.detach().clone().requires_grad_() if self.by_hand == "input" else x
        return self.criterion(self.scores(self.x), y)

    def penalised(self, loss):
        if self.by_hand == "weight":
            leaves = [p for p in self.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            return loss + LAMBDA * sum(g.square().sum() for g in grads if g is not None)
        if self.by_hand == "input":
            (grad,) = torch.autograd.grad(loss, self.x, create_graph=True)
            return loss + LAMBDA * (len(self.x) * grad).square().flatten(1).sum(1).mean()
        return loss

    def training_step(self, batch, batch_idx):
        return self.penalised(self.loss_of(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)

    def train_dataloader(self):
        return DataLoader(DATA, batch_size=8)


def fitted(form, by_hand="", callback=None, **options):
    """Return the parameters of a form after two epochs."""
    module = form(by_hand)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        logger=False,
        num_sanity_val_steps=0,
        callbacks=[callback] if callback else [],
        **{**QUIET, **options},
    )
    torch.manual_seed(7)
    trainer.fit(module)
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def assert_trained_as_by_hand(form, where, estimator, *, module="net", backward=None, **options):
    """Compare a callback with the penalty that is added by hand, and with none."""
    if where == "weight":
        penalty, module = gpkit.weight_grad_norm(LAMBDA, estimator=estimator), None
    else:
        penalty = gpkit.input_grad_norm(LAMBDA, estimator=estimator)
    callback = gpkit.GradientPenaltyCallback(penalty, module, manual_backward=backward)
    true = fitted(form, where, **options)
    found = fitted(form, "", callback, **options)
    assert (found - true).abs().max() < (1e-12 if estimator == "exact" else 1e-4)
    assert (found - fitted(form, **options)).abs().max() > 1e-3
