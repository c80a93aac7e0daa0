"""What is averaged before the norm is taken: a sample's, a micro-batch's, a step's gradient."""

from functools import partial

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fits import (
    LAMBDA,
    assert_trained_as,
    batches,
    callback,
    difference,
    fit,
    grouped,
    one_rank,
    penalty,
    train_pooled,
)
from modules import SGD, Plain, Traced
from nets import net, noisy
from pytorch_lightning.callbacks import GradientAccumulationScheduler

import gpkit

estimators = pytest.mark.parametrize("estimator", ["exact", "difference"])


@estimators
def test_sample_is_the_mean_over_samples_alone(estimator):
    def total(net, x, y, weight, scale):
        one = by_hand.TOTALS["weight", estimator]
        parts = [one(net, x[i : i + 1], y[i : i + 1], weight, scale) for i in range(len(x))]
        return sum(parts) / len(x)

    true = by_hand.train(net(), one_rank(batches()), total, LAMBDA, SGD, windows=[2, 2, 2])
    cb = callback("weight", estimator, scope="sample")
    assert_trained_as(fit(Plain(net()), cb, batches(), accumulate_grad_batches=2), true)


@estimators
@pytest.mark.parametrize("count", [6, 5], ids=["", "incomplete"])
def test_accumulated_is_the_gradient_of_the_whole_step(estimator, count):
    """A last step of fewer micro-batches is divided by A as well, in training as in the norm."""
    micro = batches(count)
    cb = callback("weight", estimator, scope="accumulated")
    made = fit(Plain(net()), cb, micro, accumulate_grad_batches=2)
    assert_trained_as(made, train_pooled(net(), grouped(micro, 2), estimator=estimator))
    batch = fit(Plain(net()), callback("weight", estimator), micro, accumulate_grad_batches=2)
    assert difference(made, batch) > 1e-3


@estimators
def test_accumulated_equals_one_large_batch(estimator):
    micro = batches()
    large = [
        tuple(torch.cat(parts) for parts in zip(*micro[i : i + 3], strict=True)) for i in (0, 3)
    ]
    cb = callback("weight", estimator, scope="accumulated")
    made = fit(Plain(net()), cb, micro, accumulate_grad_batches=3)
    true = by_hand.train(
        net(), one_rank(large), by_hand.TOTALS["weight", estimator], LAMBDA, SGD, windows=[1, 1]
    )
    assert_trained_as(made, true)


@estimators
def test_accumulated_under_a_schedule_of_accumulation(estimator):
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})
    cb = callback("weight", estimator, scope="accumulated")
    made = fit(Plain(net()), [cb, scheduler], batches(), epochs=2)
    windows = grouped(batches(), 1) + grouped(batches(), 3)
    assert_trained_as(made, train_pooled(net(), windows, estimator=estimator))


@estimators
def test_accumulated_with_a_schedule_of_the_weight(estimator):
    schedule = gpkit.warmup(LAMBDA, steps=3)
    cb = callback("weight", estimator, schedule, every=2, scope="accumulated")
    made = fit(Plain(net()), cb, batches(8), accumulate_grad_batches=2)

    def weight(t):
        return 0.0 if t % 2 else 2 * LAMBDA * min(1.0, (t + 1) / 3)

    assert_trained_as(made, train_pooled(net(), grouped(batches(8), 2), weight, estimator))


@estimators
@pytest.mark.parametrize("other", ["input", "weight"])
@pytest.mark.parametrize("kind", ["exact", "difference"])
def test_accumulated_beside_a_penalty_of_each_micro_batch(estimator, other, kind):
    parts = {
        "whole": penalty("weight", estimator, scope="accumulated"),
        "micro": penalty(other, kind, 2 * LAMBDA),
    }
    cb = gpkit.GradientPenaltyCallback(parts, "net")
    made = fit(Plain(net()), cb, batches(), accumulate_grad_batches=2)

    def extra(net, x, y):
        total = by_hand.TOTALS[other, kind](net, x, y, 2 * LAMBDA, 1.0)
        return total - F.cross_entropy(net(x), y)

    windows = grouped(batches(), 2)
    assert_trained_as(made, train_pooled(net(), windows, estimator=estimator, extra=extra))


@estimators
def test_dropout_and_batch_norm_of_the_earlier_micro_batches(estimator):
    """They are run again at the end with the masks that they had, and move no statistics."""
    cb = callback("weight", estimator, scope="accumulated")
    made = fit(Traced(noisy()), cb, batches(), accumulate_grad_batches=3)
    true = train_pooled(
        noisy(),
        grouped(batches(), 3),
        estimator=estimator,
        start=lambda i: torch.manual_seed(100 + i),
    )
    assert_trained_as(made.net, true)
    if estimator == "exact":  # the other runs the net by hand again
        for mine, other in zip(made.net.buffers(), true.buffers(), strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@estimators
def test_global_in_one_process_is_accumulated(estimator):
    cb = callback("weight", estimator, scope="global")
    made = fit(Plain(net()), cb, batches(), accumulate_grad_batches=2)
    assert_trained_as(made, train_pooled(net(), grouped(batches(), 2), estimator=estimator))


def test_lbfgs_takes_the_scope_accumulated_of_one_micro_batch():
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
    made, true = (
        fit(Plain(net(), optimizer=lbfgs), callback("weight", scope=scope), batches())
        for scope in ("accumulated", "batch")
    )
    assert difference(made, true) < 1e-9


@pytest.mark.parametrize("scope", ["accumulated", "global"])
@pytest.mark.parametrize("axes", [{"order": 2}, {"estimator": "projection"}], ids=str)
def test_pooled_scopes_take_first_derivatives_alone(scope, axes):
    with pytest.raises(ValueError, match=f"scope='{scope}' takes order=1 with estimator='exact'"):
        gpkit.weight_grad_norm(scope=scope, **axes)


def test_accumulated_without_the_callback_is_refused():
    loss = F.cross_entropy(net()(batches()[0][0]), batches()[0][1])
    with pytest.raises(ValueError, match="needs the micro-batches of an optimiser step"):
        gpkit.weight_grad_norm(scope="accumulated")(loss, net())
