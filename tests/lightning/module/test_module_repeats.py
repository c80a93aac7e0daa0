"""Steps of a module with weight penalties that repeat an earlier one are right, and are short."""

import copy
import warnings
from functools import partial

import by_hand
import pytest
import torch
from penalised import SGD, classes, mlp, trainer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gpkit

LAMBDA = 0.3
ESTIMATORS = {
    "exact": (lambda: "exact", by_hand.weight_exact),
    "difference": (lambda: gpkit.finite_difference(by_hand.STEP), by_hand.weight_difference),
}


def wide():
    torch.manual_seed(0)
    layers = nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 80), nn.SiLU(), nn.Linear(80, 3)
    return nn.Sequential(*layers).double()


def loss_and_norm(net, x, y):
    loss = F.cross_entropy(net(x), y)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return loss.detach(), by_hand.squares(grads).sqrt()


def gradients(total, net, x, y, weight):
    params = list(net.parameters())
    return torch.autograd.grad(total(net, x, y, weight, 1.0), params)


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("make", [mlp, wide])
def test_steps_that_repeat_an_earlier_one_are_right(make, estimator, looks):
    net, (of, total) = make(), ESTIMATORS[estimator]
    penalty = gpkit.weight_grad_norm(LAMBDA, estimator=of())
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)
    x, y = classes(12).tensors
    params = list(net.parameters())
    for size in (6, 6, 12, 1):
        net.zero_grad()
        batch = x[:size], y[:size]
        value = module.penalized_loss(batch)
        value.backward()
        loss, norm = loss_and_norm(net, *batch)
        torch.testing.assert_close(value.detach(), loss + LAMBDA * norm**2)
        close([p.grad for p in params], gradients(total, net, *batch, LAMBDA))
        with torch.no_grad():
            for p in params:
                p.mul_(1.03)
    assert len(looks) == (1 if estimator == "exact" else 2)
    assert penalty.step == 4


def grows(step):
    return 0.1 * min(step, 4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_fit_trains_and_logs_as_the_loop_by_hand(estimator):
    of, total = ESTIMATORS[estimator]
    penalty = gpkit.weight_grad_norm(grows, estimator=of())
    net, seen = wide(), []
    module = gpkit.PenalizedModule(copy.deepcopy(net), F.cross_entropy, penalty, optimizer=SGD)

    class Look(gpkit.lightning.compat.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append({n: float(v) for n, v in module.latest_step.scalars.items()})

    data = classes(10)
    options = {"callbacks": [Look()], "log_every_n_steps": 4}  # of which norms are logged
    trainer(**options).fit(module, DataLoader(data, 4))  # the last of an epoch has two samples
    batches, optimizer = [*DataLoader(data, 4)] * 2, SGD(net.parameters())
    assert len(seen) == len(batches)
    for step, (x, y) in enumerate(batches):
        weight, (loss, norm) = grows(step), loss_and_norm(net, x, y)
        got = seen[step]
        assert got["train/loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert got["penalty/weight_grad_norm"] == pytest.approx(weight * float(norm) ** 2, rel=1e-6)
        if weight:
            assert got["penalty/weight_grad_norm/norm"] == pytest.approx(float(norm), rel=1e-6)
        optimizer.zero_grad()
        (total(net, x, y, weight, 1.0) if weight else F.cross_entropy(net(x), y)).backward()
        optimizer.step()
    close(module.net.parameters(), net.parameters())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_rescaled_weight_divides_the_total(estimator):
    net, (of, total) = wide(), ESTIMATORS[estimator]
    penalty = gpkit.weight_grad_norm(gpkit.rescaled(4.0), estimator=of())
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)
    x, y = classes(6).tensors
    params = list(net.parameters())
    for _ in range(3):
        net.zero_grad()
        module.penalized_loss((x, y)).backward()
        close([p.grad for p in params], [g / 4.0 for g in gradients(total, net, x, y, 4.0)])


def norms_by_hand(net, x, y):
    """Return the losses, and the mean of the squared norms of each one's gradient."""
    losses = F.cross_entropy(net(x), y, reduction="none")
    every = [torch.autograd.grad(own, list(net.parameters()), create_graph=True) for own in losses]
    return losses, sum(map(by_hand.squares, every)) / len(x)


def with_norms():
    torch.manual_seed(0)
    layers = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 3)
    net = nn.Sequential(*layers).double()
    net(torch.randn(20, 5).double())
    return net


@pytest.mark.parametrize("make", [wide, with_norms])
def test_norms_of_samples_in_both_modes(make, looks):
    net, penalty = make(), gpkit.per_sample_grad_norm(LAMBDA)
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty)
    (x, y), params = classes(12).tensors, list(net.parameters())
    for training in (False, True, False):  # in training mode the samples of batch norm are no rows
        net.train(training)
        for size in (6, 12, 5):
            kept = copy.deepcopy(net.state_dict())
            losses, n2 = norms_by_hand(net, x[:size], y[:size])
            expected = losses.mean() + LAMBDA * n2
            grads = torch.autograd.grad(expected, params)
            net.load_state_dict(kept)
            net.zero_grad()
            with warnings.catch_warnings(action="ignore"):
                value = module.penalized_loss((x[:size], y[:size]))
            value.backward()
            torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-10, atol=0)
            close([p.grad for p in params], grads)
    assert len(looks) == (3 if make is wide else 4)  # the first in each mode; all without rows


def test_two_penalties_of_one_loss(looks):
    net = wide()
    penalties = gpkit.weight_grad_norm(LAMBDA), gpkit.per_sample_grad_norm(LAMBDA)
    module = gpkit.PenalizedModule(net, F.cross_entropy, [*penalties])
    (x, y), params = classes(6).tensors, list(net.parameters())
    losses, n2 = norms_by_hand(net, x, y)
    both = losses.mean() + LAMBDA * n2
    both = both + LAMBDA * by_hand.squares(
        torch.autograd.grad(losses.mean(), params, create_graph=True)
    )
    grads = torch.autograd.grad(both, params)
    for _ in range(3):
        net.zero_grad()
        module.penalized_loss((x, y)).backward()
        close([p.grad for p in params], grads)
    assert len(looks) == 2


LOSSES = {  # whose mean is not that of the losses of the samples
    "weights of classes": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()),
    "ignored labels": partial(F.cross_entropy, ignore_index=1),
    "smooth labels": nn.CrossEntropyLoss(label_smoothing=0.1),
    "of one's own": lambda z, y: (z - F.one_hot(y, 3)).square().sum(1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_norms_of_samples_beside_a_mean_of_another_kind(name, looks):
    """What is trained on is the loss itself; the norms are those of each sample's loss."""
    net, loss, penalty = wide(), LOSSES[name], gpkit.per_sample_grad_norm(LAMBDA, every=2)
    module = gpkit.PenalizedModule(net, loss, penalty)
    (x, y), params = classes(12).tensors, list(net.parameters())
    for step, size in enumerate((6, 6, 12, 12, 4, 4, 6)):
        mean = loss(net(x[:size]), y[:size])
        expected = mean = mean.mean()
        if step % 2 == 0:
            for i in range(size):
                if name == "of one's own":
                    own = loss(net(x[i : i + 1]), y[i : i + 1]).sum()
                else:
                    own = F.cross_entropy(
                        net(x[i : i + 1]),
                        y[i : i + 1],
                        weight=getattr(loss, "weight", None),
                        label_smoothing=getattr(loss, "label_smoothing", 0.0),
                        ignore_index=1 if name == "ignored labels" else -100,
                        reduction="sum",
                    )
                grads = torch.autograd.grad(own, params, create_graph=True)
                expected = expected + 2 * LAMBDA * by_hand.squares(grads) / size
        net.zero_grad()
        value = module.penalized_loss((x[:size], y[:size]))
        value.backward()
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-10, atol=0)
        close([p.grad for p in params], torch.autograd.grad(expected, params))
        with torch.no_grad():
            for p in params:
                p.mul_(1.03)
    assert len(looks) == 1
