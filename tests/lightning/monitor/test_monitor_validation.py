"""The monitor at validation: gradients there, though Lightning takes none."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from monitored import (
    ALL,
    BATCHES,
    OPTIONS,
    B,
    Validated,
    approx,
    data,
    fit,
    loader,
    norms_of_samples,
    size,
)
from torchmetrics import Metric

import gpkit


def validation(net, batches=BATCHES):
    """The mean norms of the batches."""
    net, rows = copy.deepcopy(net), []
    for x, y in loader():
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        parts = net.parameters(), net.head.parameters(), net.backbone[0].parameters()
        where = ("input", "activation")
        slopes = [norms_of_samples(net, x, y, w).mean().item() for w in where]
        rows.append([*(size(*part) for part in parts), *slopes])
    return torch.tensor(rows).mean(0).tolist()


NAMES = [
    "val/grad_norm/weight",
    "val/grad_norm/weight/net.head",
    "val/grad_norm/weight/net.backbone.0",
    "val/grad_norm/input",
    "val/grad_norm/activation/net.backbone",
]


class Count(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("seen", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, x):
        self.seen.add_(len(x))

    def compute(self):
        return self.seen


class Measured(Validated):
    """A metric and a buffer; inference mode leaves what cannot be written to outside of it."""

    def __init__(self, net, **kinds):
        super().__init__(net, **kinds)
        self.count = Count()
        self.register_buffer("mean", torch.zeros(5, dtype=torch.float64))

    def validation_step(self, batch, batch_idx):
        assert torch.is_grad_enabled() == self.expected
        assert not torch.is_inference_mode_enabled() or not self.expected
        self.mean.add_(batch[0].mean(0).detach())
        output = super().validation_step(batch, batch_idx)
        self.count.update(batch[0])
        self.log("val/count", self.count)
        return output

    def on_validation_end(self):
        self.mean = self.mean.clone()

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        loss = outputs["loss"] if self.returns == "dict" else outputs
        assert not loss.requires_grad


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_validation_within_a_fit(net, returns):
    module = Measured(copy.deepcopy(net), returns=returns)
    module.expected = True
    optimizer = partial(torch.optim.SGD, lr=0.0)
    module.optimizer = optimizer
    logged = fit(module, gpkit.GradientNormMonitor("layer", **ALL), max_epochs=1)
    assert logged.columns(*NAMES) == [[approx(v)] for v in validation(net)]
    assert logged.columns("val/count") == [[float(BATCHES * B)]]
    assert "validation_step" not in module.__dict__
    assert all(p.grad is None for p in module.parameters())


def test_validation_alone_again_and_after_inference_mode(net):
    module = Measured(copy.deepcopy(net))
    for monitors in ([], [gpkit.GradientNormMonitor("layer", **ALL)], []):
        module.expected = bool(monitors)
        trainer = pl.Trainer(logger=False, callbacks=monitors, **OPTIONS)
        (found,) = trainer.validate(module, loader(), verbose=False)
        assert found["val/count"] == BATCHES * B
        if monitors:
            assert [found[name] for name in NAMES] == approx(validation(net))
        assert set(found) == {"val/count", *(NAMES if monitors else [])}
    true = 3 * data().tensors[0].mean(0) * BATCHES
    torch.testing.assert_close(module.mean, true)


def test_no_validation_unless_asked_for(net):
    module = Measured(copy.deepcopy(net))
    module.expected = False
    logged = fit(module, gpkit.GradientNormMonitor(inputs="net"), max_epochs=1)
    assert not [name for name in logged.names() if name.startswith("val/grad")]


@pytest.mark.parametrize("how", ["log", "log_dict"])
def test_a_loss_that_is_only_logged_is_taken(net, how):
    class Logs(Validated):
        def validation_step(self, batch, batch_idx):
            loss = self.loss(batch)
            if how == "log":
                self.log("val/loss", loss)
            else:
                self.log_dict({"val/loss": loss, "val/acc": loss.detach()})

    module = Logs(copy.deepcopy(net))
    module.optimizer = partial(torch.optim.SGD, lr=0.0)
    logged = fit(module, gpkit.GradientNormMonitor("layer", **ALL), max_epochs=1)
    assert logged.columns(*NAMES) == [[approx(v)] for v in validation(net)]
    assert "log" not in module.__dict__


def test_of_two_losses_that_are_logged_none_is_chosen(net):
    class Logs(Validated):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", self.loss(batch))
            self.log("val/loss_scaled", 2 * self.loss(batch))

    with pytest.raises(ValueError, match="returns is None, and it logs 2: return it"):
        fit(Logs(copy.deepcopy(net)), gpkit.GradientNormMonitor(validation=True))


@pytest.mark.parametrize(
    ("given", "said"), [(None, "is None"), (torch.zeros(()), "has no graph")], ids=str
)
def test_validation_without_a_loss_is_refused(net, given, said):
    class Silent(Validated):
        def validation_step(self, batch, batch_idx):
            return given

    module = Silent(copy.deepcopy(net))
    with pytest.raises(ValueError, match=f"the loss that validation_step returns {said}: return"):
        fit(module, gpkit.GradientNormMonitor(validation=True))
    assert "validation_step" not in module.__dict__
