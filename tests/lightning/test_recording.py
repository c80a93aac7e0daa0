"""What is logged of penalties is the same whichever way they come in, also when a run diverges."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

B = 8


class Regression(pl.LightningModule):
    """A module of a user's own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def wrapped(lr=0.1, **options):
    sgd = partial(torch.optim.SGD, lr=lr)
    penalty = gpkit.weight_grad_norm(name="p")
    return gpkit.PenalizedModule(nn.Linear(2, 1), nn.MSELoss(), penalty, optimizer=sgd, **options)


def gan(lr=0.1, **options):
    nets = nn.Linear(3, 2), nn.Linear(2, 1)
    sgd = partial(torch.optim.SGD, lr=lr)
    optimizers = {"critic_optimizer": sgd, "generator_optimizer": sgd}
    penalty = gpkit.r1(name="p", weight=1.0)
    return gpkit.GANModule(*nets, latent_dim=3, penalty=penalty, **optimizers, **options)


def fit(module, folder, callbacks=(), epochs=1):
    """Fit, and return the trainer and the events."""
    x, y = torch.randn(2 * B, 2), torch.randn(2 * B, 1)
    x = x[:, :2]
    batches = TensorDataset(x) if isinstance(module, gpkit.GANModule) else TensorDataset(x, y)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=list(callbacks),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, B))
    return trainer, EventAccumulator(str(folder), {"histograms": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize("way", ["wrapped", "gan", "callback"])
def test_a_penalty_has_the_same_names_in_the_log_whichever_way_it_comes_in(way, tmp_path):
    penalty = gpkit.weight_grad_norm(name="p")
    callbacks = [gpkit.GradientPenaltyCallback(penalty)] if way == "callback" else []
    module = {"wrapped": wrapped, "gan": gan, "callback": Regression}[way]()
    _, events = fit(module, tmp_path, callbacks)
    of_penalty = {tag for tag in events.Tags()["scalars"] if tag.startswith("penalty/")}
    assert of_penalty == {"penalty/p", "penalty/p/weight", "penalty/p/norm"}
    # penalty = weight · norm² at a mean over one group; for R1 the ½ is inside, over B groups
    weight, norm, value = (
        [e.value for e in events.Scalars(f"penalty/p{end}")] for end in ("/weight", "/norm", "")
    )
    assert len(value) == 2
    if way != "gan":
        assert value == pytest.approx([w * n**2 for w, n in zip(weight, norm, strict=True)])
    assert all(n > 0 for n in norm)


@pytest.mark.parametrize("make", [wrapped, gan], ids=["PenalizedModule", "GANModule"])
def test_a_run_whose_norms_are_not_finite_ends_without_a_histogram(make, tmp_path):
    """TensorBoard refuses a histogram of nothing; the run must not die of it at an epoch's end."""
    module = make(lr=1e30, histogram_every_n_epochs=1)
    trainer, events = fit(module, tmp_path, epochs=4)
    assert trainer.current_epoch == 4
    assert not all(torch.isfinite(p).all() for p in module.parameters())
    if make is wrapped:  # its first epoch begins with finite norms
        assert "penalty/p/norm/histogram" in events.Tags()["histograms"]
        counts = [e.histogram_value.num for e in events.Histograms("penalty/p/norm/histogram")]
        assert sum(counts) < 8  # of 4 epochs with 2 steps: only the finite ones
