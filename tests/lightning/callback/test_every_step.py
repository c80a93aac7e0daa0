"""Every way to write a training step: the callback trains as a penalty by hand."""

import functools

import pytest
import torch
import torchmetrics
from refused import refusal
from torch import nn
from twin import KINDS, LAMBDA, Twin, assert_trained_as_by_hand

import gpkit


def passed_on(step):
    @functools.wraps(step)
    def wrapper(self, *args, **kwargs):
        return step(self, *args, **kwargs)

    return wrapper


class OnlyTheBatch(Twin):
    def training_step(self, batch):
        return self.penalised(self.loss_of(batch))


class OtherNames(Twin):
    def training_step(self, data, i):
        return self.penalised(self.loss_of(data))


class AnyArguments(Twin):
    def training_step(self, *args, **kwargs):
        return self.penalised(self.loss_of(args[0] if args else kwargs["batch"]))


class AnIndexByKeyword(Twin):
    def training_step(self, batch, *, batch_idx=0):
        return self.penalised(self.loss_of(batch))


class Decorated(Twin):
    @torch.enable_grad()
    @passed_on
    def training_step(self, batch, batch_idx=0):
        return self.penalised(self.loss_of(batch))


class OfTheInstance(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.training_step = functools.partial(OfTheInstance.step, self)

    def step(self, batch, batch_idx):
        return self.penalised(self.loss_of(batch))


class ADict(Twin):
    def training_step(self, batch, batch_idx):
        loss = self.penalised(self.loss_of(batch))
        return {"loss": loss, "mean": loss.detach(), "name": "a", "count": len(batch[0])}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        assert outputs["count"] == len(batch[0])
        assert outputs["loss"].ndim == 0


class SometimesNothing(Twin):
    def training_step(self, batch, batch_idx):
        return None if batch_idx == 1 else self.penalised(self.loss_of(batch))


class Logs(Twin):
    def training_step(self, batch, batch_idx):
        loss = self.loss_of(batch)
        self.log("a", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log_dict({"b": loss, "c": 2.0})
        return self.penalised(loss)


class Measures(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch, batch_idx):
        loss = self.loss_of(batch)
        self.accuracy(torch.eye(3)[batch[1]], batch[1])
        self.log("accuracy", self.accuracy)
        return self.penalised(loss)


class Counts(Twin):
    """Has a number and a list of its own, of six steps in two epochs."""

    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.count, self.losses = 0, []

    def training_step(self, batch, batch_idx):
        loss = self.loss_of(batch)
        self.count += 1
        self.losses.append(loss.detach())
        return self.penalised(loss * (1 + self.count / 10))

    def on_fit_end(self):
        assert (self.count, len(self.losses)) == (6, 6)


class LooksInside(Twin):
    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.mean = self.net[0](batch[0]).mean()
        with torch.autocast("cpu", enabled=False):
            return self.penalised(self.loss_of(batch))


class ByForward(Twin):
    def forward(self, x):
        return self.net(input=x)

    def scores(self, x):
        return self(x)


class AParameterOfItsOwn(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def scores(self, x):
        return self.net(x) * self.scale


class Tied(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), self.net[2]).double()
        self.net[3] = nn.Linear(4, 3).double()
        self.net[2].weight = self.net[0].weight


class PartlyFrozen(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.net[0].requires_grad_(False)
        self.unused = nn.Linear(2, 2).double()


class Parametrised(Twin):
    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        torch.manual_seed(3)
        nn.utils.parametrizations.orthogonal(self.net[0])


STEPS = [
    *(OnlyTheBatch, OtherNames, AnyArguments, AnIndexByKeyword, Decorated, OfTheInstance),
    *(ADict, SometimesNothing, Logs, Measures, Counts, LooksInside, ByForward),
    *(AParameterOfItsOwn, Tied, PartlyFrozen, Parametrised),
]


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("form", STEPS)
def test_a_step(form, where, estimator):
    assert_trained_as_by_hand(form, where, estimator)


class AnIterator(Twin):
    def training_step(self, dataloader_iter):
        return self.penalised(self.loss_of(next(dataloader_iter)[0]))


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
@pytest.mark.parametrize("where", ["weight", "input"])
def test_a_step_that_takes_the_iterator(where):
    assert_trained_as_by_hand(AnIterator, where, "exact")
    penalty = gpkit.weight_grad_norm(LAMBDA, estimator="finite_difference")
    line = refusal(AnIterator(), gpkit.GradientPenaltyCallback(penalty))
    assert "`dataloader_iter` gives another: write training_step(self, batch, batch_idx)" in line


class Outer(Twin):
    """Its net is that of another LightningModule."""

    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.net = None
        self.inner = Twin()

    def scores(self, x):
        return self.inner.net(x)


@pytest.mark.parametrize(("where", "estimator"), KINDS)
def test_a_module_in_a_module(where, estimator):
    assert_trained_as_by_hand(Outer, where, estimator, module="inner.net")


class ByHand(Twin):
    """Optimises manually."""

    def __init__(self, by_hand=""):
        super().__init__(by_hand)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.penalised(self.loss_of(batch)), retain_graph=True)
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()


@pytest.mark.parametrize("where", ["weight", "input"])
def test_manual_optimisation(where):
    assert_trained_as_by_hand(ByHand, where, "exact", backward=0)
