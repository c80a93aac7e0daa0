"""A submodule whose rows are not the samples: its rows count as samples, and that is said once."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn

import gpkit


class Sets(pl.LightningModule):
    """Samples of several points each: the encoder sees them all as rows."""

    def __init__(self, flat):
        super().__init__()
        torch.manual_seed(0)
        self.flat = flat
        self.encoder, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def training_step(self, batch, _):
        (x,) = batch
        h = self.encoder(x.flatten(0, 1) if self.flat else x).tanh()
        h = h.reshape(*x.shape[:2], -1)
        return self.head(h.mean(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("flat", [True, False])
def test_rows_that_are_not_samples_are_said_once(flat):
    x = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    callback = gpkit.GradientPenaltyCallback(gpkit.input_grad_norm(weight=0.1), module="encoder")
    trainer = pl.Trainer(
        max_epochs=2, callbacks=[callback], logger=False, accelerator="cpu", **QUIET
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Sets(flat), data)
    found = [str(w.message) for w in said if "rows" in str(w.message)]
    assert len(found) == flat
    if flat:
        assert "encoder" in found[0]
        assert "an input of 20 rows, and the batch has 4 samples" in found[0]
