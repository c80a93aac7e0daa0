"""Penalties in inputs by name in a callback, against loops by hand in torch alone."""

from collections import namedtuple
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit

B = 5
RATE = 0.05
RNG = torch.Generator().manual_seed(0)
draw = partial(torch.randn, generator=RNG, dtype=torch.float64)
KEYS = ("columns", "image")
BATCH = {
    "category": torch.tensor([0, 2, 1, 1, 0]),
    "columns": draw(B, 3) * torch.tensor([0.1, 2.0, 0.5, 3.0, 1.0]).unsqueeze(1),
    "image": draw(B, 1, 3, 3),
    "y": draw(B),
    "slopes": draw(B, 3),
    "w": torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64),
}
OTHERS = ("category", "columns", "image")
Named = namedtuple("Named", BATCH)
Fitted = namedtuple("Fitted", "parameters logged")


class Net(nn.Module):
    """A table's columns, an image and a category."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.category, self.conv = nn.Embedding(3, 2), nn.Conv2d(1, 2, 2)
        self.columns, self.head = nn.Linear(3, 4), nn.Linear(14, 1)
        self.double()

    def forward(self, category, columns, image):
        h = [self.category(category), self.columns(columns), self.conv(image).flatten(1)]
        return self.head(torch.tanh(torch.cat(h, 1))).squeeze(1)


class OfADict(Net):
    def forward(self, batch):
        return super().forward(batch["category"], batch["columns"], batch["image"])


class Step(pl.LightningModule):
    """Knows nothing of gpkit."""

    batch, net_type, factor = BATCH, Net, 1.0

    def __init__(self):
        super().__init__()
        self.net = self.net_type()

    def scores(self, batch):
        return self.net(**{key: batch[key] for key in OTHERS})

    def training_step(self, batch, batch_idx):
        return (self.scores(batch) - batch["y"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE)

    def train_dataloader(self):
        return torch.utils.data.DataLoader([self.batch], batch_size=None)


class Positional(Step):
    def scores(self, batch):
        return self.net(*[batch[key] for key in OTHERS])


class ADict(Step):
    net_type = OfADict

    def scores(self, batch):
        return self.net(batch)


class Nested(Step):
    """A tuple with a dict, whose entries the step changes."""

    batch, factor = ({**BATCH}, 1), 3.0

    def training_step(self, batch, batch_idx):
        (entries, _) = batch
        changed = {key: 3 * entries[key] if key in KEYS else entries[key] for key in OTHERS}
        return (self.scores(changed) - entries["y"]).square().mean()


class OtherNames(Step):
    """The net has other names for them, or none; and the batch is written to in place."""

    batch = Named(**BATCH)

    def __init__(self):
        super().__init__()
        self.net.forward = lambda a, b, c: Net.forward(self.net, a, b, c)

    def training_step(self, batch, batch_idx):
        batch.columns.mul_(1)
        scores = self.net(batch.category, batch.columns, batch.image)
        return (scores - batch.y).square().mean()


class ItsOwnForward(Step):
    def forward(self, batch):
        return self.net(**{key: batch[key] for key in OTHERS})

    def scores(self, batch):
        return self(batch)


PLAIN = Net()


def n2(params, of_loss, keys=KEYS, shift=0.0, target=0.0, factor=1.0):
    """Return Σ_keys ‖∂f_i/∂x_i‖² of each sample, at x + shift, for a net at factor·x."""

    def one(varied, fixed, y):
        x = {**{k: factor * v if k in KEYS else v for k, v in fixed.items()}}
        x |= {key: factor * v for key, v in varied.items()}
        out = functional_call(PLAIN, params, (), {k: v.unsqueeze(0) for k, v in x.items()})[0]
        return (out - y).square() if of_loss else out

    varied = {key: BATCH[key] + shift for key in keys}
    fixed = {key: BATCH[key] for key in OTHERS if key not in keys}
    slopes = vmap(grad(one))(varied, fixed, BATCH["y"])
    return sum((g - target).flatten(1).square().sum(1) for g in slopes.values())


def fitted(form, penalty, module):
    model = form()
    callback = gpkit.GradientPenaltyCallback(penalty, module)
    options = {"accelerator": "cpu", "logger": False, "log_every_n_steps": 1, **QUIET}
    trainer = pl.Trainer(max_steps=1, callbacks=[callback], **options)
    trainer.fit(model)
    return Fitted([p.detach() for p in model.net.parameters()], trainer.callback_metrics)


def step(penalty, factor):
    params = {name: p.detach() for name, p in Net().named_parameters()}

    def total(params):
        x = {k: factor * BATCH[k] if k in KEYS else BATCH[k] for k in OTHERS}
        out = functional_call(PLAIN, params, (), x)
        return (out - BATCH["y"]).square().mean() + penalty(params)

    return [params[name] - RATE * g for name, g in grad(total)(params).items()]


CENTRAL = gpkit.finite_difference(side="central")
build = partial(gpkit.GradientPenalty, wrt=gpkit.inputs(*KEYS))
moved = partial(build, at=lambda x, _: tuple(t + 0.3 for t in x))
PENALTIES = {
    "loss": build(of="loss", weight=0.7),
    "differences": build(
        of="loss",
        estimator=CENTRAL,
        weight=0.2,
        given={"sample_weight": lambda batch: BATCH["w"]},
    ),
    "moved": moved(of="loss", weight=0.1),
}
OF_OUTPUTS = {
    "one": build(
        wrt=gpkit.inputs("columns"),
        given={"target": "slopes", "sample_weight": "w"},
        weight=0.3,
    ),
    "stencil": build(wrt=gpkit.inputs("columns"), estimator=gpkit.stencil(1e-3, 4), weight=0.5),
    "elsewhere": moved(weight=0.4),
    "twice": gpkit.GradientPenalty(
        wrt=gpkit.inputs("image"), at=gpkit.mixture("data", lambda x, _: x + 0.3), weight=0.6
    ),
}


def weighted(values):
    return (BATCH["w"] * values).sum() / BATCH["w"].sum()


def of_losses(params, factor):
    own = partial(n2, params, True, factor=factor)
    return 0.7 * own().mean() + 0.2 * weighted(own()) + 0.1 * own(shift=0.3).mean()


def of_outputs(params, factor):
    own = partial(n2, params, False, factor=factor)
    image = (own(keys=("image",)).mean() + own(keys=("image",), shift=0.3).mean()) / 2
    columns = weighted(own(keys=("columns",), target=BATCH["slopes"]))
    columns = 0.3 * columns + 0.5 * own(keys=("columns",)).mean()
    return columns + 0.4 * own(shift=0.3).mean() + 0.6 * image


def both(params, factor):
    return of_losses(params, factor) + of_outputs(params, factor)


FORMS = {
    "by keyword": (Step, "net", PENALTIES | OF_OUTPUTS, both),
    "by position": (Positional, "net", PENALTIES, of_losses),
    "in a dict": (ADict, "net", PENALTIES | OF_OUTPUTS, both),
    "of the batch, changed": (Nested, None, PENALTIES, of_losses),
    "of the batch, other names": (OtherNames, "net", PENALTIES | OF_OUTPUTS, both),
    "own forward": (ItsOwnForward, None, OF_OUTPUTS, of_outputs),
}


@pytest.mark.parametrize(("form", "module", "penalties", "oracle"), FORMS.values(), ids=FORMS)
def test_the_step_is_that_of_a_loop(form, module, penalties, oracle):
    before = {key: v.clone() for key, v in BATCH.items()}
    wanted, found = partial(oracle, factor=form.factor), fitted(form, penalties, module)
    for p, q in zip(found.parameters, step(wanted, form.factor), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    value = sum(found.logged[f"penalty/{name}"] for name in penalties)
    start = {name: p.detach() for name, p in Net().named_parameters()}
    torch.testing.assert_close(value, wanted(start), check_dtype=False)
    assert not any(v.requires_grad for v in BATCH.values())
    assert all(torch.equal(v, BATCH[key]) for key, v in before.items())


class Twice(Step):
    def scores(self, batch):
        return super().scores(batch) - super().scores(batch) / 2


class Pairs(Step):
    batch = ({"x": BATCH["image"]}, {"x": BATCH["image"]})

    def training_step(self, batch, batch_idx):
        return self.net.conv(batch[0]["x"]).mean()


REFUSED = {
    "a typo": (
        Step,
        "colums",
        "names 'colums', and the submodule 'net' is called with .*'columns'",
    ),
    "integers": (
        Step,
        "category",
        "'category', which must be a floating-point tensor; got torch.i",
    ),
    "two calls": (Twice, "image", "calls the submodule 'net' 2 times"),
    "two entries": (Pairs, "x", "several tensors of that name, 0.x, 1.x: give them different"),
}


@pytest.mark.parametrize(("form", "name", "words"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused_in_one_line(form, name, words):
    penalty = gpkit.input_grad_norm(wrt=gpkit.inputs(name))
    with pytest.raises(ValueError, match=words):
        fitted(form, penalty, "net")
