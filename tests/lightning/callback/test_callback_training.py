"""The callback under what Lightning does around a training step, against loops by hand."""

import copy
import math
from functools import partial

import by_hand
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from fits import LAMBDA, assert_trained_as, batches, callback, difference, fit, one_rank, penalty
from modules import SGD, Plain
from nets import net
from pytorch_lightning.callbacks import EMAWeightAveraging, WeightAveraging

import gpkit

KINDS = [(w, e) for w, e in by_hand.TOTALS if w != "activation"]
kinds = pytest.mark.parametrize(("where", "estimator"), KINDS, ids=["-".join(k) for k in KINDS])


def trained_by_hand(where="weight", estimator="exact", weight=LAMBDA, *, optimizer=SGD, **options):
    windows = options.pop("windows", [1] * 6)
    total = options.pop("total", by_hand.TOTALS[where, estimator])
    micro = one_rank(batches())
    return by_hand.train(net(), micro, total, weight, optimizer, windows=windows, **options)


@kinds
def test_gradients_are_clipped_with_the_penalty_in_them(where, estimator):
    made = fit(Plain(net()), callback(where, estimator), batches(), gradient_clip_val=0.2)
    assert_trained_as(made, trained_by_hand(where, estimator, clip=0.2))
    assert difference(made, trained_by_hand(where, estimator)) > 1e-2


@kinds
def test_adam(where, estimator):
    adam = partial(torch.optim.Adam, lr=0.02)
    made = fit(Plain(net(), optimizer=adam), callback(where, estimator), batches())
    assert_trained_as(made, trained_by_hand(where, estimator, optimizer=adam))


def averaged_by_hand(decay):
    """The average of the weights after every step: exponential, or with None of all alike."""
    net_, average = net(), None
    for i, batch in enumerate(one_rank(batches())):
        # Without momentum a step can be made alone.
        plain = partial(torch.optim.SGD, lr=0.2)
        net_ = by_hand.train(net_, [batch], by_hand.weight_exact, LAMBDA, plain, windows=[1])
        if average is None:
            average = copy.deepcopy(net_)
        share = 1 / (i + 1) if decay is None else 1 - decay
        for a, p in zip(average.parameters(), net_.parameters(), strict=True):
            a.data += share * (p.data - a.data)
    return average


@pytest.mark.parametrize("decay", [None, 0.7])
def test_weight_averaging(decay):
    averaging = WeightAveraging() if decay is None else EMAWeightAveraging(decay=decay)
    module = Plain(net(), optimizer=partial(torch.optim.SGD, lr=0.2))
    made = fit(module, [callback(), averaging], batches())
    assert_trained_as(made, averaged_by_hand(decay))


LBFGS = partial(torch.optim.LBFGS, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")


@kinds
def test_lbfgs_sees_the_penalty_in_the_loss_and_in_its_gradient(where, estimator):
    true = net()
    optimizer = LBFGS(true.parameters())
    for x, y in batches():

        def closure(x=x, y=y):
            optimizer.zero_grad()
            if (where, estimator) == ("weight", "difference"):  # the value is that of exact, too
                value = by_hand.weight_exact(true, x, y, LAMBDA, 1.0)
            elif estimator == "difference":
                value = by_hand.input_exact(true, x, y, LAMBDA, 1.0)
            else:
                value = by_hand.TOTALS[where, estimator](true, x, y, LAMBDA, 1.0)
            by_hand.TOTALS[where, estimator](true, x, y, LAMBDA, 1.0).backward()
            return value.detach()

        optimizer.step(closure)
    made = fit(Plain(net(), optimizer=LBFGS), callback(where, estimator), batches())
    assert difference(made, true) < 1e-9  # line searches magnify roundings


def test_lbfgs_draws_the_same_numbers_in_each_closure_of_a_step():
    made = gpkit.jacobian(LAMBDA)
    fit(Plain(net(), optimizer=LBFGS), gpkit.GradientPenaltyCallback(made, "net"), batches())
    assert made.draws == len(batches())
    assert made.step == len(batches())


@kinds
def test_modules_and_trainers_of_the_lightning_package(where, estimator):
    lightning = pytest.importorskip("lightning.pytorch")

    class Unified(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        training_step, configure_optimizers = Plain.training_step, Plain.configure_optimizers
        loss, result = Plain.loss, Plain.result
        returns, optimizer = "tensor", SGD

    made = fit(Unified(net()), callback(where, estimator), batches(), lightning=lightning)
    assert_trained_as(made, trained_by_hand(where, estimator))


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_schedules_count_optimiser_steps(estimator):
    """λ·min(1, (t + 1) / 3) on every second step, twice over; a step t is of two micro-batches."""
    schedule = gpkit.warmup(LAMBDA, steps=3)
    cb = callback("weight", estimator, schedule, every=2)
    made = fit(Plain(net()), cb, batches() * 2, accumulate_grad_batches=2)

    def weight(t):
        return 0.0 if t % 2 else 2 * LAMBDA * min(1.0, (t + 1) / 3)

    total = by_hand.TOTALS["weight", estimator]
    micro = one_rank(batches() * 2)
    true = by_hand.train(net(), micro, total, weight, SGD, windows=[2] * 6)
    assert_trained_as(made, true)
    assert cb.penalties["weight_grad_norm"].step == 6


def three(net, x, y, weight, scale):
    """‖∇L‖² exact, and by differences, and that of the inputs, with the weights λ, 2λ and 3λ."""
    both = by_hand.weight_exact(net, x, y, weight, scale)
    both = both + by_hand.weight_difference(net, x, y, 2 * weight, scale)
    return both + by_hand.input_exact(net, x, y, 3 * weight, scale) - 2 * F.cross_entropy(net(x), y)


@pytest.mark.parametrize("kind", ["list", "dict", "sum"])
@pytest.mark.parametrize("windows", [1, 2])
def test_several_penalties_add(kind, windows):
    parts = {
        "a": penalty(name="a"),
        "b": penalty("weight", "difference", 2 * LAMBDA, name="b"),
        "c": penalty("input", weight=3 * LAMBDA, name="c"),
    }
    given = {"list": list(parts.values()), "dict": parts, "sum": gpkit.sum(parts)}[kind]
    cb = gpkit.GradientPenaltyCallback(given, "net")
    made = fit(Plain(net()), cb, batches(), accumulate_grad_batches=windows)
    true = trained_by_hand(total=three, windows=[windows] * (6 // windows))
    assert_trained_as(made, true)


def test_the_weights_of_a_submodule():
    def total(net, x, y, weight, scale):
        loss = F.cross_entropy(net(x), y)
        grads = by_hand.gradient(loss, list(net.head.parameters()), scale, create_graph=True)
        return loss + weight * by_hand.squares(grads)

    cb = gpkit.GradientPenaltyCallback(penalty(), "net.head")
    assert_trained_as(fit(Plain(net()), cb, batches()), trained_by_hand(total=total))
    cb = gpkit.GradientPenaltyCallback(penalty(match="net.head.*"))
    assert_trained_as(fit(Plain(net()), cb, batches()), trained_by_hand(total=total))


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_a_rescaled_weight_divides_the_whole_loss(estimator):
    def total(net, x, y, weight, scale):
        return by_hand.TOTALS["weight", estimator](net, x, y, weight, scale) / max(1.0, weight)

    weight = gpkit.switch(0.5, 4.0, at=3)
    cb = callback("weight", estimator, gpkit.rescaled(weight))
    made = fit(Plain(net()), cb, batches())
    assert_trained_as(made, trained_by_hand(total=total, weight=weight))


def test_the_loss_is_divided_on_steps_without_the_penalty_too():
    """As in PenalizedModule: of a lazy penalty the size of the step is that of every step."""

    def total(net, x, y, weight, scale):
        return by_hand.weight_exact(net, x, y, weight, scale) / 4.0

    def lazy(step):
        return 0.0 if step % 2 else 2 * 4.0

    cb = callback("weight", "exact", gpkit.rescaled(4.0), every=2)
    assert_trained_as(fit(Plain(net()), cb, batches()), trained_by_hand(total=total, weight=lazy))


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_a_share_of_the_gradient_is_measured(estimator):
    """λ = share / u, u = ‖∇P‖ / ‖∇L‖, whose logarithm is smoothed with its trend."""
    share, rate = 0.5, 0.1
    level, trend = None, 0.0
    true, log_weight = net(), math.log(LAMBDA)
    optimizer = SGD(true.parameters())
    for x, y in batches():
        params = list(true.parameters())
        loss = F.cross_entropy(true(x), y)
        total = by_hand.TOTALS["weight", estimator](true, x, y, math.exp(log_weight), 1.0)
        whole, plain = (
            torch.cat([g.flatten() for g in torch.autograd.grad(v, params, retain_graph=True)])
            for v in (total, loss)
        )
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found = math.log((whole - plain).norm() / plain.norm()) - log_weight
        error = None if level is None else found - level - trend
        if error is None or abs(error) > math.log(2):
            level, trend = found, 0.0
        else:
            level, trend = level + trend + rate * error, trend + rate**2 / 3 * error
        log_weight = math.log(share) - level - trend
    weight = gpkit.gradient_share(share, weight=LAMBDA, rate=rate, every=1)
    cb = callback("weight", estimator, weight)
    assert difference(fit(Plain(net()), cb, batches()), true) < 1e-12
    assert weight(len(batches())) == pytest.approx(math.exp(log_weight), rel=1e-10)


class Unfreezes(pl.Callback):
    """Lets the backbone be trained from the fourth batch on."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.net.backbone.requires_grad_(batch_idx >= 3)


@pytest.mark.parametrize("estimator", ["exact", "difference"])
def test_weights_that_are_unfrozen_later_are_penalised_from_then_on(estimator):
    def total(net, x, y, step, scale):
        net.backbone.requires_grad_(step >= 3)
        trained = net if step >= 3 else net.head
        h = x if step >= 3 else net.backbone(x)
        return by_hand.TOTALS["weight", estimator](trained, h, y, LAMBDA, scale)

    frozen = net()
    frozen.backbone.requires_grad_(False)
    made = fit(Plain(frozen), [callback("weight", estimator), Unfreezes()], batches())
    assert_trained_as(made, trained_by_hand(total=total, weight=lambda step: step))


def test_no_penalty_is_plain_training():
    def total(net, x, y, *_):
        return F.cross_entropy(net(x), y)

    made = fit(Plain(net()), gpkit.GradientPenaltyCallback(gpkit.none()), batches())
    assert_trained_as(made, trained_by_hand(total=total))
