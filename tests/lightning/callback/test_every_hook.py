"""Every hook that a LightningModule may override, and how it may be built and optimised."""

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from twin import DATA, KINDS, LAMBDA, Twin, assert_trained_as_by_hand, fitted, net

import gpkit


class AfterTransfer(Twin):
    """Augments, also at random, and makes soft labels."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return 2 * x + 0.1 * torch.randn_like(x), F.one_hot(y, 3).double()


class BeforeTransfer(Twin):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] - 1, batch[1]


class Transfer(Twin):
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return [part.to(device) for part in batch]


class BatchStart(Twin):
    def on_train_batch_start(self, batch, batch_idx):
        batch[0].mul_(1.5)
        return -1 if batch_idx == 2 else None


class AfterBackward(Twin):
    def on_after_backward(self):
        for p in self.parameters():
            p.grad.mul_(0.5)


class BeforeStep(Twin):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_value_(self.parameters(), 0.1)


class Clips(Twin):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_):
        nn.utils.clip_grad_norm_(self.parameters(), 0.3)


class OptimizerStep(Twin):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + self.global_step)
        optimizer.step(closure=optimizer_closure)


class StepsLater(Twin):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer_closure()
        if batch_idx != 1:
            optimizer.step()


class ZeroGrad(Twin):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        optimizer.zero_grad(set_to_none=False)


class Backward(Twin):
    def backward(self, loss, *args, **kwargs):
        (2 * loss).backward(*args, **kwargs)


class BeforeBackward(Twin):
    def on_before_backward(self, loss):
        assert loss.requires_grad


class BuiltByConfigureModel(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = net()


class BuiltBySetup(BuiltByConfigureModel):
    configure_model = Twin.configure_model

    def setup(self, stage):
        self.net = net()


class ConfiguresCallbacks(Twin):
    def configure_callbacks(self):
        return [pl.callbacks.LambdaCallback()]


class ChangesWeights(Twin):
    def on_train_start(self):
        self.net[0].weight.data.mul_(0.9)

    def on_train_epoch_start(self):
        self.net[0].bias.data.zero_()
        self.net.eval()


class Validates(Twin):
    def validation_step(self, batch, batch_idx):
        self.log("val", self.criterion(self.net(batch[0]), batch[1]))

    def val_dataloader(self):
        return DataLoader(DATA, batch_size=8)


class Schedules(Twin):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}


class StepsSchedulers(Schedules):
    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class Groups(Twin):
    def configure_optimizers(self):
        first, last = self.net[0].parameters(), self.net[2].parameters()
        return torch.optim.AdamW([{"params": first, "lr": 0.01}, {"params": last}], 0.02)


class APartOnly(Twin):
    def configure_optimizers(self):
        return torch.optim.SGD(self.net[2].parameters(), 0.1)


class Lbfgs(Twin):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


HOOKS = [
    *(AfterTransfer, BeforeTransfer, Transfer, BatchStart, AfterBackward, BeforeStep, Clips),
    *(OptimizerStep, StepsLater, ZeroGrad, Backward, BeforeBackward, BuiltByConfigureModel),
    *(BuiltBySetup, ConfiguresCallbacks, ChangesWeights, Validates, Schedules, StepsSchedulers),
    *(Groups, APartOnly, Lbfgs),
]


@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("form", HOOKS)
def test_a_hook(form, where, estimator):
    assert_trained_as_by_hand(form, where, estimator)


TRAINERS = {
    "accumulates": {"accumulate_grad_batches": 2},
    "clips": {"gradient_clip_val": 0.3},
    "looks for anomalies": {"detect_anomaly": True},
    "overfits": {"overfit_batches": 1},
    "in double precision": {"precision": "64-true"},
    "profiles": {"profiler": "simple"},
}


@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("options", TRAINERS.values(), ids=TRAINERS)
def test_a_trainer(options, where, estimator):
    assert_trained_as_by_hand(Twin, where, estimator, **options)


BUILT = (BuiltByConfigureModel, BuiltBySetup, Validates)  # by a PenalizedModule itself


def penalised(form, penalty):
    """Return a PenalizedModule with the hooks of a form."""
    kinds = form.__mro__[: form.__mro__.index(Twin)]
    hooks = {name: f for kind in kinds for name, f in vars(kind).items() if callable(f)}
    taken = {name: vars(Twin)[name] for name in ("configure_optimizers", "train_dataloader")}
    made = type(form.__name__, (gpkit.PenalizedModule,), {**taken, **hooks})
    return made(net(), loss=nn.CrossEntropyLoss(), penalty=penalty)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("form", [form for form in HOOKS if form not in BUILT])
def test_a_hook_of_a_penalised_module(form, where, estimator):
    make = gpkit.weight_grad_norm if where == "weight" else gpkit.input_grad_norm
    found = fitted(lambda _: penalised(form, make(LAMBDA, estimator=estimator)))
    close = 1e-12 if estimator == "exact" else 1e-4
    assert (found - fitted(form, where)).abs().max() < close
