"""A step that is run again leaves no trace in buffers, random numbers, metrics and logs."""

import copy

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import CLOSE, LAMBDA, assert_trained_as, batches, callback, fit, one_rank
from loggers import Record
from modules import SGD, Traced
from nets import net, noisy
from torch import nn
from torchmetrics import CatMetric, MeanMetric

import gpkit

KINDS = ["exact", "difference", "accumulated", "accumulated-difference", "sample"]


def seeded(total):
    """A total whose every forward draws the numbers of its batch; only the first moves buffers."""
    count = iter(range(1000))

    def again(net, x, y, weight, scale):
        seed = 100 + next(count)

        class Same(nn.Module):
            """The net with the same masks in every call, and buffers that only the first moves."""

            def __init__(self):
                super().__init__()
                self.net, self.calls = net, 0

            def forward(self, x):
                torch.manual_seed(seed)
                self.calls += 1
                kept = {k: b.clone() for k, b in self.net.named_buffers()}
                y = self.net(x)
                if self.calls > 1:
                    for k, b in self.net.named_buffers():
                        b.data = kept[k]
                return y

            def __deepcopy__(self, memo):
                copied = Same.__new__(Same)
                nn.Module.__init__(copied)
                copied.net, copied.calls = copy.deepcopy(self.net, memo), self.calls
                return copied

        return total(Same(), x, y, weight, scale)

    return again


@pytest.mark.parametrize("where", ["weight", "input"])
@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_dropout_and_batch_norm(where, estimator):
    """The same masks in each forward, and statistics as if there was but one."""
    made = fit(Traced(noisy()), callback(where, estimator), batches())
    micro = one_rank(batches())
    total = seeded(by_hand.TOTALS[where, estimator])
    true = by_hand.train(noisy(), micro, total, LAMBDA, SGD, windows=[1] * 6)
    assert_trained_as(made.net, true)
    for mine, other in zip(made.net.buffers(), true.buffers(), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


def traced(kind, weight=LAMBDA):
    if kind.startswith("accumulated"):
        estimator = kind.partition("-")[2] or "exact"
        cb = callback("weight", estimator, weight, scope="accumulated")
        return cb, {"accumulate_grad_batches": 2}
    if kind == "sample":
        return gpkit.GradientPenaltyCallback(gpkit.per_sample_grad_norm(weight)), {}
    return callback("weight", kind, weight), {}


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_logs_buffers_and_random_numbers(kind):
    cb, options = traced(kind)
    net = noisy()
    if kind == "sample":  # batch norm takes no batch of one
        net.norm = nn.Identity()
    module = Traced(net)
    kept = []
    made = fit(module, [cb, Keep(kept)], batches(), **options)
    for i, drawn in enumerate(made.after):
        torch.manual_seed(100 + i)
        net.backbone(batches()[i][0])  # one forward, one mask
        assert drawn == torch.rand(()).item()
    assert kept[0]["steps"] == len(batches())
    assert kept[0]["seen"] == sum(len(x) for x, _ in batches())
    if kind != "sample":
        assert made.net.norm.num_batches_tracked == len(batches())


class Keep(pl.Callback):
    """Keep what the trainer logged, at its end."""

    def __init__(self, kept):
        self.kept = kept

    def on_fit_end(self, trainer, module):
        self.kept.append({k: v.item() for k, v in trainer.callback_metrics.items()})


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_a_metric_has_the_mean_of_the_losses_that_were_trained_on(estimator):
    """Of the losses without penalty, which here is too small to change them."""
    net, true, kept = noisy(), [], []
    optimizer = SGD(net.parameters())
    for i, (x, y) in enumerate(batches()):
        torch.manual_seed(100 + i)
        loss = F.cross_entropy(net(x), y)
        true.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tiny = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(1e-300, estimator=estimator))
    fit(Traced(noisy()), [tiny, Keep(kept)], batches())
    assert kept[0]["mean"] == pytest.approx(sum(true) / len(true), rel=1e-6)


class Reads(pl.LightningModule):
    """Reads its metrics in the step and after it, and logs one of them both times."""

    def __init__(self, net):
        super().__init__()
        self.net, self.mean, self.all = net, MeanMetric(), CatMetric()
        self.register_buffer("steps", torch.zeros(()))
        self.read = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.steps = self.steps + 1  # another tensor, where batch norm writes to its own
        self.mean(loss.detach())
        self.all.update(loss.detach())
        self.mean.compute(), self.all.compute()  # which a metric keeps until its next update
        self.log("now", self.mean, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_end(self, *_):
        self.log("after", self.mean, on_step=True, on_epoch=False)
        counts = self.steps.item(), self.mean.update_count, self.all.update_count
        self.read.append(
            (*counts, self.mean.compute().item(), self.all.compute().reshape(-1).tolist())
        )

    def configure_optimizers(self):
        return SGD(self.parameters())


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "exact"])
def test_metrics_and_buffers_that_are_read_are_those_of_the_step(kind):
    """Counts, and what a metric keeps, a step's value, a mean, a list, are of no rerun."""
    cb, options = traced(kind, weight=1e-300)  # too small to change the losses
    size, losses, record = options.get("accumulate_grad_batches", 1), [], Record()

    def total(net, x, y, *_):
        losses.append(F.cross_entropy(net(x), y))
        return losses[-1]

    windows = [size] * (len(batches()) // size)
    by_hand.train(net(), one_rank(batches()), total, None, SGD, windows=windows)
    losses = [loss.item() for loss in losses]
    made = fit(Reads(net()), cb, batches(), logger=record, **options)
    for i, (steps, of_mean, of_list, mean, values) in enumerate(made.read, 1):
        assert steps == of_mean == of_list == i
        assert values == pytest.approx(losses[:i], rel=1e-5)
        assert mean == pytest.approx(sum(losses[:i]) / i, rel=1e-5)
    logged = pytest.approx(losses[size - 1 :: size], rel=1e-5)
    assert record.columns("now", "after") == [logged, logged]
