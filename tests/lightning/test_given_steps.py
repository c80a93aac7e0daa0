"""Losses of steps [B, T] and masks of padding, in a fit, against loops over cut sequences."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.func import functional_call, grad

import gpkit

B, T, D = 4, 5, 3
RATE = 0.05
LENGTHS = (5, 2, 0, 3)
SGD = partial(torch.optim.SGD, lr=RATE)
RNG = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=RNG, dtype=torch.float64)


MASK = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).long()
BATCH = {"x": draw(B, T, D), "labels": draw(B, T), "mask": MASK, "floats": MASK.double()}
BATCH["weights"] = MASK * draw(B, T).exp()


class Recurrent(nn.Module):
    """A step depends on the earlier ones alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.RNN(D, 4, batch_first=True), nn.Linear(4, 1)
        self.double()

    def forward(self, x):
        return self.head(self.inner(x)[0]).squeeze(2)


PLAIN = Recurrent()


class Sequences(pl.LightningModule):
    """Its loss is the mean over the sequences of the mean over their steps."""

    def __init__(self, masked):
        super().__init__()
        self.net, self.masked = Recurrent(), masked

    def training_step(self, batch, batch_idx):
        losses = (self.net(batch["x"]) - batch["labels"]).square()
        if not self.masked:
            return losses.mean()
        mask = batch["mask"]
        return ((mask * losses).sum(1) / mask.sum(1).clamp(min=1)).mean()

    def configure_optimizers(self):
        return SGD(self.parameters())


class ShowsLosses(Sequences):
    """Returns its losses; they are no mean over the samples in the loss."""

    def training_step(self, batch, batch_idx):
        losses = (self.net(batch["x"]) - batch["labels"]).square()
        return {"loss": losses.mean(), "all": losses}


class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield BATCH


def by_callback(penalty, masked=False, losses=None, form=Sequences):
    module = form(masked)
    callback = gpkit.GradientPenaltyCallback(penalty, module="net", losses=losses)
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, callbacks=[callback], **QUIET
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    return [p.detach() for p in module.net.parameters()]


def step(total):
    """Return the parameters after a step on a function of them."""
    net = Recurrent()
    params = {name: p.detach() for name, p in net.named_parameters()}
    return [params[name] - RATE * g for name, g in grad(total)(params).items()]


def losses(params, i=slice(None), x=None):
    x = BATCH["x"][i] if x is None else x
    return (functional_call(PLAIN, params, (x,)) - BATCH["labels"][i][..., : x.shape[-2]]) ** 2


def of_inputs(params, weights=None):
    """Mean over the sequences with a step of ‖∇ Σ_t w_t l_t / Σ_t w_t‖²."""
    values = []
    for i in range(B):
        length = T if weights is None else LENGTHS[i]
        if length == 0:
            continue
        w = torch.ones(length) if weights is None else BATCH[weights][i, :length]

        def mean(x, i=i, w=w):
            return (w * losses(params, slice(i, i + 1), x)[0]).sum() / w.sum()

        g = grad(mean)(BATCH["x"][i : i + 1, :length])
        values.append(g.square().sum())
    return 0.7 * torch.stack(values).mean()


def assert_same(found, wanted):
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("key", [None, "mask", "weights"])
@pytest.mark.parametrize("estimator", ["exact", gpkit.finite_difference(side="central")])
def test_in_the_module(key, estimator):
    given = {"sample_weight": key} if key else {}
    penalty = gpkit.input_grad_norm(0.7, given=given, estimator=estimator)
    module = gpkit.PenalizedModule(Recurrent(), nn.MSELoss(), penalty, optimizer=SGD, inputs="x")
    total = module.penalized_loss(BATCH)
    grads = torch.autograd.grad(total, list(module.net.parameters()))
    found = [(p - RATE * g).detach() for p, g in zip(module.net.parameters(), grads, strict=True)]
    assert_same(found, step(lambda p: losses(p).mean() + of_inputs(p, key)))


def test_each_sequence_in_the_weights_in_the_module():
    def value(params):
        values = []
        for i in (0, 1, 3):
            w = BATCH["weights"][i]
            g = grad(lambda p, i=i, w=w: (w * losses(p)[i]).sum() / w.sum())(params)
            values.append(sum(part.square().sum() for part in g.values()))
        return 0.7 * torch.stack(values).mean()

    penalty = gpkit.per_sample_grad_norm(0.7, given={"sample_weight": "weights"})
    module = gpkit.PenalizedModule(Recurrent(), nn.MSELoss(), penalty, optimizer=SGD, inputs="x")
    total = module.penalized_loss(BATCH)
    grads = torch.autograd.grad(total, list(module.net.parameters()))
    found = [(p - RATE * g).detach() for p, g in zip(module.net.parameters(), grads, strict=True)]
    assert_same(found, step(lambda p: losses(p).mean() + value(p)))


@pytest.mark.parametrize("key", [None, "mask", "floats"])
def test_in_the_callback(key):
    given = {"sample_weight": key} if key else {}
    found = by_callback(gpkit.input_grad_norm(0.7, given=given), key is not None)

    def total(params):
        found = losses(params)
        if key is None:
            return found.mean() + of_inputs(params)
        mean = ((MASK * found).sum(1) / MASK.sum(1).clamp(min=1)).mean()
        return mean + of_inputs(params, "mask")

    assert_same(found, step(total))


def of_output(output, batch):
    return (output - batch["labels"]).square()


def of_each(params, key):
    """Mean over the sequences with a step of ‖∇_θ Σ_t w_t l_t / Σ_t w_t‖²."""
    values = []
    for i in (0, 1, 3):
        w = BATCH[key][i]
        g = grad(lambda p, i=i, w=w: (w * losses(p)[i]).sum() / w.sum())(params)
        values.append(sum(part.square().sum() for part in g.values()))
    return 0.7 * torch.stack(values).mean()


def of_mean(params, key):
    """‖∇_θ of the weighted mean over the sequences with a step‖²."""

    def mean(params):
        w = BATCH[key][[0, 1, 3]]
        return ((w * losses(params)[[0, 1, 3]]).sum(1) / w.sum(1)).mean()

    return 0.7 * sum(part.square().sum() for part in grad(mean)(params).values())


GIVEN = {"sample_weight": "weights"}
CENTRAL = gpkit.finite_difference(side="central")
SHOWN = {
    "inputs": (gpkit.input_grad_norm(0.7, given=GIVEN), of_inputs),
    "differences": (gpkit.input_grad_norm(0.7, given=GIVEN, estimator=CENTRAL), of_inputs),
    "each": (gpkit.per_sample_grad_norm(0.7, given=GIVEN), of_each),
    "weights": (gpkit.weight_grad_norm(0.7, given=GIVEN), of_mean),
    "by differences": (gpkit.weight_grad_norm(0.7, given=GIVEN, estimator=CENTRAL), of_mean),
}


@pytest.mark.parametrize(("shown", "form"), [("all", ShowsLosses), (of_output, Sequences)])
def test_any_weights_where_the_step_shows_its_losses(shown, form):
    penalties = {name: penalty for name, (penalty, _) in SHOWN.items()}
    found = by_callback(penalties, losses=shown, form=form)

    def total(params):
        return losses(params).mean() + sum(own(params, "weights") for _, own in SHOWN.values())

    assert_same(found, step(total))


def test_weights_of_steps_need_losses_in_a_callback():
    penalty = gpkit.input_grad_norm(given=GIVEN)
    with pytest.raises(ValueError, match=r"no mask of zeros and ones needs.*losses=lambda"):
        by_callback(penalty, True)
    for shown, words in (
        ("al", r"which is a dict with \['loss', 'all'\] \(did you mean 'all'\?\): return"),
        (lambda output, _: output.mean(), r"of each sample, \[B\], or step, \[B, T\]; got \[\]"),
        (lambda output, _: output.detach(), "has no graph: return the losses before"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            by_callback(penalty, losses=shown, form=ShowsLosses)


def test_weights_of_steps_need_losses_in_the_module():
    penalty = gpkit.input_grad_norm(given=GIVEN)
    loss = lambda out, y: (out - y).square().mean()  # noqa: E731
    module = gpkit.PenalizedModule(Recurrent(), loss, penalty, inputs="x")
    with pytest.raises(ValueError, match=r"needs the loss of each step; got weights \[4, 5\] and"):
        module.penalized_loss(BATCH)
