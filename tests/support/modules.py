"""LightningModules that know nothing of gpkit, and how they are trained."""

from contextlib import nullcontext
from functools import partial

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from torchmetrics import MeanMetric, MetricCollection, SumMetric

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.5)
QUIET = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def first(batch):
    """Return the first entry of a batch."""
    return batch[0]


class Plain(pl.LightningModule):
    """A module that knows nothing of gpkit."""

    def __init__(self, net, returns="tensor", optimizer=SGD):
        super().__init__()
        self.net = net
        self.returns = returns
        self.optimizer = optimizer

    def loss(self, batch):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def result(self, loss, batch):
        return loss if self.returns == "tensor" else {"loss": loss, "extra": len(batch[0])}

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss.detach())
        return self.result(loss, batch)

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class ScaledOnly(MixedPrecision):
    """A gradient scaler, without autocast: its powers of two leave every gradient as it is."""

    def __init__(self, scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
        super().__init__("16-mixed", "cpu", scaler)

    def forward_context(self):
        return nullcontext()


class Traced(pl.LightningModule):
    """Counts what it logs and measures; every batch has random numbers of its own."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.mean, self.loss_sum = MeanMetric(), SumMetric()
        self.metrics = MetricCollection({"seen": SumMetric()})
        self.after = []

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 + batch_idx)

    def on_train_batch_end(self, *_):
        self.after.append(torch.rand(()).item())

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.mean(loss.detach())
        self.loss_sum.update(loss.detach())
        self.metrics["seen"].update(len(x))
        self.log("steps", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict({"seen": self.metrics["seen"]}, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return SGD(self.parameters())
