"""float16 with a gradient scaler: tiny gradients do not vanish, and an overflow skips a step."""

import copy
import math

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, callback, fit, grouped, train_pooled
from modules import SGD, Plain, ScaledOnly
from nets import net
from pytorch_lightning.plugins import MixedPrecision
from torch import nn

import gpkit

TINY = 1e-7  # a factor of the loss: in float16 its gradients round to zero without a scale


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.backbone(x)))


class Times(Plain):
    """A loss times a factor."""

    def __init__(self, factor=1.0, spike=()):
        super().__init__(Small())
        self.factor, self.spike = factor, spike

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.net(x.float()), y) * self.factor
        return loss * (1e30 if batch_idx in self.spike else 1.0)


def half(scaler):
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def norms(factor, **options):
    """Return n of each step."""
    made = gpkit.weight_grad_norm(LAMBDA)
    seen = []
    act = made.act

    def watch(*args, **kwargs):
        terms = act(*args, **kwargs)
        seen.append(terms.norms.item())
        return terms

    made.act = watch
    fit(Times(factor), gpkit.GradientPenaltyCallback(made), batches(), **options)
    return seen


def gradient(net, x, y, factor):
    net = copy.deepcopy(net).double()
    loss = F.cross_entropy(net(x), y) * factor
    return by_hand.squares(torch.autograd.grad(loss, list(net.parameters()))).sqrt().item()


def test_tiny_gradients_do_not_round_to_zero():
    """n is that of float64 to the precision of float16, where without a scale it is far off."""
    true = [gradient(Small(), x, y, TINY) for x, y in batches()]  # steps so tiny leave the net
    scaled = norms(TINY, **half(torch.amp.GradScaler("cpu", init_scale=2.0**16)))
    assert scaled == pytest.approx(true, rel=5e-3)
    unscaled = norms(TINY, **half(torch.amp.GradScaler("cpu", init_scale=1.0)))
    assert unscaled[0] != pytest.approx(true[0], rel=5e-2)  # this is what the scale is for


def test_the_scale_is_that_of_the_step_after_an_overflow():
    """The first scale is too large for float16; with the one that follows n is right at once."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**50, backoff_factor=2.0**-30)
    first, *others = norms(TINY, **half(scaler))
    assert not math.isfinite(first)
    true = [gradient(Small(), x, y, TINY) for x, y in batches()[1:]]
    assert others == pytest.approx(true, rel=5e-3)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("scope", ["batch", "accumulated"])
def test_a_scale_of_accumulated_micro_batches_changes_nothing(scope, estimator):
    cb = callback("weight", estimator, scope=scope)
    plugin = ScaledOnly(2.0**10)
    made = fit(Plain(net()), cb, batches(8), accumulate_grad_batches=2, plugins=[plugin])
    assert plugin.scaler.get_scale() > 2.0**10  # it has grown
    again = callback("weight", estimator, scope=scope)
    true = fit(Plain(net()), again, batches(8), accumulate_grad_batches=2)
    assert_trained_as(made, true)
    if scope == "accumulated":
        assert_trained_as(made, train_pooled(net(), grouped(batches(8), 2), estimator=estimator))


@pytest.mark.parametrize("estimator", ["exact", "difference"])
@pytest.mark.parametrize("spike", [(0, 1), (1, 2)], ids=str)
def test_an_overflow_skips_a_step_and_halves_the_scale(spike, estimator):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    module, cb = Times(spike=spike), callback("weight", estimator)
    made = fit(module, cb, batches(4), **half(scaler))
    assert scaler.get_scale() == 2.0**8
    micro = [[(x.float(), y)] for i, (x, y) in enumerate(batches(4)) if i not in spike]
    total = by_hand.TOTALS["weight", estimator]
    true = by_hand.train(module.net, micro, total, LAMBDA, SGD, precision="16", windows=[1, 1])
    for a, b in zip(made.parameters(), true.parameters(), strict=True):
        # The spare scale is another one, which moves float16 roundings.
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
        assert a.isfinite().all()


def test_a_loss_that_is_in_half_precision_itself():
    """It is widened before it is scaled, and B·∂L/∂x is taken of that."""

    class Half(Times):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx).half()

    def total(net, x, y, weight, scale):
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(net(x), y).half()
        return loss + weight * by_hand.sample_norms(loss.float(), x, scale)

    module, scaler = Half(), torch.amp.GradScaler("cpu", init_scale=by_hand.SCALE)
    made = fit(module, callback("input"), batches(4), **half(scaler))
    micro = [[(x.float(), y)] for x, y in batches(4)]
    true = by_hand.train(module.net, micro, total, LAMBDA, SGD, precision="16", windows=[1] * 4)
    for a, b in zip(made.parameters(), true.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


NAMES = ("exact", "projection", "finite_difference")
CALLS = [(n, w) for n in NAMES for w in ("weight", "input", "critic")] + [("taylor", "critic")]


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
@pytest.mark.parametrize(("name", "where"), CALLS)
@pytest.mark.parametrize("scale", [2.0**-20, 1024.0, torch.tensor(2.0**16)], ids=str)
def test_the_scale_of_a_call_changes_nothing_but_roundings(name, where, scale):
    """Value and gradient in the parameters are those without a scale: powers of two are exact."""

    def call(**options):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        x = batches()[0][0]
        if where == "weight":
            made = gpkit.weight_grad_norm(LAMBDA, estimator=name, seed=1)
            value = made(lambda: net(x).square().mean(), net, **options)
        elif where == "input":
            made = gpkit.input_grad_norm(LAMBDA, estimator=name, seed=1)
            value = made(lambda x: net(x).square().squeeze(1), x, **options)
        else:
            order = 2 if name == "taylor" else 1
            made = gpkit.GradientPenalty(
                form=gpkit.two_sided(0.3), order=order, estimator=name, seed=1
            )
            value = made(net, x, **options)
        grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
        return [value, *[g for g in grads if g is not None]]

    plain, scaled = call(), call(scale=scale)
    assert len(plain) == len(scaled) >= 4
    assert plain[0] > 0
    torch.testing.assert_close(scaled, plain, rtol=1e-9, atol=1e-14)


def test_the_value_of_a_scaled_call_is_that_by_hand():
    """float16 autocast: the inner gradient of a loss of size 1e-7, against float64."""
    x, y = batches()[0]
    net = Small()
    with torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(net(x.float()), y) * TINY
        value = gpkit.weight_grad_norm(1.0)(loss, net, scale=torch.tensor(2.0**16))
    assert value.item() == pytest.approx(gradient(net, x, y, TINY) ** 2, rel=1e-2)
