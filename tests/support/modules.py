"""LightningModules that know nothing of gpkit, and how they are trained."""

from functools import partial

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

SGD = partial(torch.optim.SGD, lr=0.2, momentum=0.5)
QUIET = {
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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
