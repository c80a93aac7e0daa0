"""PenalizedModule trains as a hand-written loop does."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from nets import Witness
from penalised import (
    INPUT,
    SGD,
    SLOPE,
    WEIGHT,
    B,
    assert_same,
    classes,
    fit,
    mlp,
    trained_by_hand,
    trainer,
    values,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import gpkit
from gpkit.models import ViT


def grads(y, xs):
    return torch.autograd.grad(y, xs, create_graph=True)


def weight_term(net, x, y, losses, output, step, factor=0.1):
    squares = [g.square().sum() for g in grads(losses.mean(), list(net.parameters()))]
    return factor * sum(squares)


def input_term(net, x, y, losses, output, step, factor=0.5):
    (g,) = grads(losses.sum(), x)
    return factor * g.flatten(1).square().sum(1).mean()


def squared_jacobian(net, x, y, losses, output, step):
    rows = [grads(column.sum(), x)[0] for column in output.T]
    return torch.stack(rows).square().sum((0, 2))  # [B]


def jacobian_term(*args):
    return 0.2 / 2 * squared_jacobian(*args).mean()


def slope_term(*args):
    return 2.0 * (squared_jacobian(*args).sqrt() - 0.7).square().mean()


def sample_term(net, x, y, losses, output, step):
    return sum(weight_term(net, x, y, loss, output, step) for loss in losses) / len(losses)


def on_steps(every, term):
    """Return a term on every k-th step, k times as large."""
    return lambda *args: every * term(*args) if args[-1] % every == 0 else 0.0


def rising(net, x, y, losses, output, step):
    return weight_term(net, x, y, losses, output, step, factor=0.05 * (step + 1))


def both(*args):
    return weight_term(*args) + input_term(*args)


def nothing(*args):
    return 0.0


ACCUMULATE = {"accumulate_grad_batches": 2}

EQUALS = {  # penalty, the same by hand, the trainer's options
    "none": (gpkit.none, nothing, {}),
    "no penalty": (lambda: None, nothing, {}),
    "weight": (WEIGHT, weight_term, {}),
    "input": (INPUT, input_term, {}),
    "jacobian": (lambda: gpkit.jacobian(0.2, estimator="exact"), jacobian_term, {}),
    "slope": (SLOPE, slope_term, {}),
    "dict": (lambda: {"a": WEIGHT(), "b": INPUT()}, both, {}),
    "sum": (lambda: gpkit.sum({"a": WEIGHT(), "b": INPUT()}), both, {}),
    "weights of samples": (lambda: WEIGHT(scope="sample"), sample_term, {}),
    "every": (lambda: WEIGHT(every=2), on_steps(2, weight_term), {}),
    "schedule": (lambda: gpkit.weight_grad_norm(lambda t: 0.05 * (t + 1)), rising, {}),
    "accumulate": (WEIGHT, weight_term, ACCUMULATE),
    "accumulate, input": (INPUT, input_term, ACCUMULATE),
    "accumulate, every": (lambda: WEIGHT(every=3), on_steps(3, weight_term), ACCUMULATE),
    "accumulate, schedule": (
        lambda: gpkit.weight_grad_norm(lambda t: 0.05 * (t + 1)),
        rising,
        ACCUMULATE,
    ),
}


@pytest.mark.parametrize("case", EQUALS)
@pytest.mark.parametrize("task", ["classes", "values"])
def test_trains_as_a_hand_written_loop_does(case, task):
    penalty, term, options = EQUALS[case]
    data, loss, net = classes(), F.cross_entropy, mlp()
    if task == "values":
        data, loss, net = values(), F.mse_loss, mlp(outputs=1)
    found = fit(net, penalty(), data, loss, options)
    true = trained_by_hand(net, data, term, loss, options.get("accumulate_grad_batches", 1))
    assert_same(found, true)
    if term is not nothing:
        assert not torch.allclose(
            found[0].weight, trained_by_hand(net, data, nothing, loss)[0].weight
        )


def test_interpolates_of_a_sample_and_the_one_before_it():
    net, data = Witness(*mlp(outputs=1)), values()
    penalty = gpkit.wgan_gp(weight=2.0, center=0.7)
    found = fit(net, penalty, data, F.mse_loss)
    batches, points = found.seen[::2], found.seen[1::2]
    assert len(batches) == len(points) == 8
    for x, point in zip(batches, points, strict=True):
        fake = x.roll(1, 0)
        alpha = (point - fake) / (x - fake)  # [B, 5]
        torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # one for all entries
        assert 0 < alpha.min() < alpha.max() < 1
        assert len(alpha[:, 0].unique()) == B  # and one for each sample
    assert not torch.allclose(batches[0] - points[0], batches[4] - points[4])  # drawn every step

    def term(net, x, y, losses, output, step):
        point = points[step].requires_grad_()
        return slope_term(net, point, y, None, net(point), step)

    assert_same(found, trained_by_hand(Witness(*net), data, term, F.mse_loss))


@pytest.mark.parametrize("penalty", [WEIGHT, SLOPE, partial(SLOPE, at="interpolate")])
def test_batch_statistics_are_those_of_one_forward_a_step(penalty):
    net, data = mlp(nn.BatchNorm1d(6)), classes()
    module = gpkit.PenalizedModule(net, F.cross_entropy, penalty(), optimizer=partial(SGD, lr=0))
    true = copy.deepcopy(net)
    trainer().fit(module, DataLoader(data, B))
    for _ in range(2):
        for x, _y in DataLoader(data, B):
            true(x)
    assert_same(net, true)
    assert net[1].num_batches_tracked == 8


def test_batch_norm_trains_as_by_hand():
    net, data = mlp(nn.BatchNorm1d(6)), classes()
    assert_same(fit(net, WEIGHT(), data), trained_by_hand(net, data, weight_term))


def test_frozen_parameters_stay_and_do_not_count():
    net, data = mlp(), classes()
    net[0].requires_grad_(False)

    def term(net, *args):
        return weight_term(net[2], *args)

    found = fit(net, WEIGHT(), data)
    assert_same(found, trained_by_hand(net, data, term))
    assert torch.equal(found[0].weight, net[0].weight)


def encoder():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (-1, 4)), layer, nn.Flatten(), nn.Linear(16, 3)
    )


def vit():
    return ViT((1, 4, 4), 3, dim=8, depth=1, heads=2)


@pytest.mark.parametrize(("penalty", "term"), [(WEIGHT, weight_term), (INPUT, input_term)])
@pytest.mark.parametrize("make", [encoder, vit])
def test_attention_without_dropout_trains(make, penalty, term):
    net = make().double()  # torch's fused attention, which this would take, has no double backward
    data = TensorDataset(torch.randn(8, 1, 4, 4, dtype=torch.float64), torch.arange(8) % 3)
    with sdpa_kernel(SDPBackend.MATH):
        true = trained_by_hand(net, data, term)
    assert_same(fit(net, penalty(), data), true)


def test_a_penalty_that_trains_nothing_ends_training():
    net = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(RuntimeError, match="order 2 of a piecewise-linear net"):
        fit(net, gpkit.curvature(), classes())
