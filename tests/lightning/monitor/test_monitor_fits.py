"""Fits with the monitor train as without it, and the module is given back."""

import copy
from functools import partial

import nets
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from modules import SGD, Plain
from monitored import (
    ALL,
    OPTIONS,
    Manual,
    Validated,
    approx,
    fit,
    histograms,
    loader,
    seen_by_hand,
    size,
)
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

import gpkit


@pytest.mark.parametrize("which", [0, 2])
@pytest.mark.parametrize("penalised", [None, "first", "last"])
def test_manual_optimisation(net, which, penalised):
    module = Manual(copy.deepcopy(net))
    callbacks = [gpkit.GradientNormMonitor("group", inputs="net", manual_backward=which)]
    if penalised:
        added = gpkit.GradientPenaltyCallback(gpkit.input_grad_norm(0.5), "net", manual_backward=2)
        callbacks.insert(0 if penalised == "first" else 1, added)
    logged = fit(module, *callbacks, max_epochs=1, limit_train_batches=1)
    x, y = next(iter(loader()))
    seen, inputs = [], []
    for call, part in enumerate([net.head, net.head, net.backbone]):
        net.zero_grad()
        z = x.clone().requires_grad_()
        losses = F.cross_entropy(net(z), y, reduction="none")
        (slopes,) = torch.autograd.grad(losses.sum(), z, create_graph=True)
        inputs.append(slopes.norm(dim=1).mean().item())
        penalty = 0.5 * slopes.square().sum(1).mean() if penalised and call == 2 else 0.0
        (losses.mean() + penalty).backward()
        seen.append(size(*part.parameters()))
        with torch.no_grad():
            for p in part.parameters():
                p -= 0.5 * p.grad
    assert logged.columns("grad_norm/input") == [approx([inputs[which]])]
    assert logged.columns("grad_norm/weight/optimizer_0/group_0") == [approx([seen[1]])]
    assert logged.columns("grad_norm/weight/optimizer_1/group_0") == [approx([seen[2]])]
    total = (seen[1] ** 2 + seen[2] ** 2) ** 0.5
    assert logged.columns("grad_norm/weight") == [approx([total])]
    assert not {"training_step", "manual_backward"} & set(module.__dict__)


class Noisy(Plain):
    """Batch statistics, dropout, and a number of its own from the stream."""

    def __init__(self, manual=False):
        torch.manual_seed(0)
        net = nets.net(torch.float32)
        net.backbone.append(nn.BatchNorm1d(8)).append(nn.Dropout(0.5))
        super().__init__(net)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.loss((x + 0.1 * torch.randn_like(x), y))
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    validation_step = Validated.validation_step


def everything(**options):
    looks = {"inputs": "net", "activations": ["net.backbone", "net.backbone.2"]}
    return gpkit.GradientNormMonitor("layer", **looks, validation=True, **options)


WAYS = {
    "32": {},
    "bf16": {"precision": "bf16-mixed"},
    "16": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
    "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "manual": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_bit_for_bit_the_same(way, tmp_path):
    ends = []
    for monitored in (False, True):
        options = {k: v() if callable(v) else v for k, v in WAYS[way].items()}
        which = {"manual_backward": 0} if way == "manual" else {}
        monitors = [everything(**which)] if monitored else []
        module = Noisy(manual=way == "manual")
        torch.manual_seed(1)
        batches = loader(torch.float32)
        logger = TensorBoardLogger(tmp_path)
        trainer = pl.Trainer(logger=logger, callbacks=monitors, max_epochs=3, **OPTIONS | options)
        trainer.fit(module, batches, batches)
        momenta = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values()]
        ends.append([*module.state_dict().values(), *momenta, torch.get_rng_state()])
        assert ("grad_norm/input" in trainer.callback_metrics) == monitored
    assert len(ends[0]) == len(ends[1])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first", ["monitor", "penalty"])
@pytest.mark.parametrize("own", [False, True])
def test_the_module_is_given_back_after_an_exception_and_fits_again(net, first, own):
    class Failing(Validated):
        fails = True

        def on_train_batch_end(self, *args):
            if self.fails:
                raise RuntimeError("stop")

    def callbacks():
        penalty = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(0.1))
        both = [gpkit.GradientNormMonitor(**ALL), penalty]
        return both if first == "monitor" else both[::-1]

    module = Failing(copy.deepcopy(net))
    if own:  # a method of the object's own
        module.training_step = partial(Failing.training_step, module)
    before = dict(module.__dict__)
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, *callbacks())
    changed = {"training_step", "validation_step", "manual_backward"}
    assert {k: v for k, v in module.__dict__.items() if k in changed} == {
        k: v for k, v in before.items() if k in changed
    }
    module.fails = False
    logged = fit(module, *callbacks(), max_steps=1)
    assert {"grad_norm/input", "penalty/weight_grad_norm"} <= logged.names()
    assert {k: v for k, v in module.__dict__.items() if k in changed} == {
        k: v for k, v in before.items() if k in changed
    }


def test_the_other_lightning(net, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import TensorBoardLogger as Other

    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return SGD(self.parameters())

    logger = Other(tmp_path, name="", version="")
    monitor = gpkit.GradientNormMonitor(**ALL)
    trainer = lightning.Trainer(logger=logger, callbacks=[monitor], max_epochs=1, **OPTIONS)
    trainer.fit(Module(copy.deepcopy(net)), loader(), loader())
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()), epochs=1)
    assert trainer.callback_metrics["grad_norm/weight"].item() == approx(true[-1])
    assert {"grad_norm/input", "val/grad_norm/input"} <= set(trainer.callback_metrics)
    assert "grad_norm/input/histogram" in histograms(tmp_path)
