"""A repeated step of with_loss with exact norms takes the shortcut, and is right."""

import copy
import gc
import weakref

import pytest
import torch
from exact_steps import CASES, SCOPES, built, by_hand, loss_of, require_right
from torch import nn
from torch.nn import functional as F

import gpkit


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CASES)
def test_repeated_steps_are_those_of_a_loop(name, scope, looks):
    (net, batch), penalty = built(name), SCOPES[scope][0](0.3)
    for size in (6, 6, 3, 1):
        require_right(penalty, net, *batch(size), scope)
        with torch.no_grad():  # as a step of an optimiser does
            for p in net.parameters():
                p.mul_(1.05)
    assert len(looks) == 1
    assert penalty.step == penalty.draws == 4


def test_gram_matrices_give_way_to_the_gradient_in_a_large_batch(looks, monkeypatch):
    (net, batch), penalty = built("softsign"), gpkit.weight_grad_norm(0.3)
    shapes = []
    product = gpkit.autodiff.layers.batch.gram_product
    noting = lambda left, right: shapes.append(left.shape[0]) or product(left, right)  # noqa: E731
    monkeypatch.setattr(gpkit.autodiff.layers.batch, "gram_product", noting)
    for size in (6, 500, 8):
        require_right(penalty, net, *batch(size), "batch")
    assert len(looks) == 1
    assert shapes == [6, 8]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_form_of_the_norm_and_a_third_derivative(scope, looks):
    net, batch = built("wide")
    penalty = SCOPES[scope][0](0.3, form=gpkit.two_sided(0.5))
    form = lambda n2: (n2.sqrt() - 0.5) ** 2  # noqa: E731
    for _ in range(2):
        x, t = batch(4)
        require_right(penalty, net, x, t, scope, form=form)
    assert len(looks) == 1
    params = list(net.parameters())
    total = penalty.with_loss(loss_of(net, x, t, scope), net)
    first = torch.autograd.grad(total, params, create_graph=True)
    second = torch.autograd.grad(sum(g.sum() for g in first), params)
    assert len(looks) == 1

    def gradient_at(move):
        with torch.no_grad():
            for p in params:
                p.add_(move)
        grads = by_hand(net, x, t, scope, form=form)[1]
        with torch.no_grad():
            for p in params:
                p.sub_(move)
        return sum(g.sum() for g in grads)

    expected = (gradient_at(1e-5) - gradient_at(-1e-5)) / 2e-5
    torch.testing.assert_close(sum(g.sum() for g in second), expected, rtol=1e-5, atol=0)


def frozen(net):
    net.mix.bias.requires_grad_(False)


def replaced(net):
    net.head = nn.Linear(6, 3).double()


def another_order(net):
    net.forward = lambda x: net.head(
        torch.tanh(net.norm(net.mix(net.mix(net.embedding(x))))).mean(1)
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("change", [frozen, replaced, another_order])
def test_a_net_that_changed_takes_the_long_way(change, scope, looks):
    (net, batch), penalty = built("tokens"), SCOPES[scope][0](0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), scope)
    assert len(looks) == 1
    change(net)
    for _ in range(2):
        require_right(penalty, net, *batch(4), scope)
    assert len(looks) > 1


def test_batch_norm_in_another_mode_takes_the_long_way(looks):
    (net, batch), penalty = built("images"), gpkit.per_sample_grad_norm(0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), "sample")
    assert len(looks) == 1
    net[6].train()
    with pytest.warns(UserWarning, match="backward pass for each sample"):
        require_right(penalty, net, *batch(4), "sample")
    assert len(looks) == 2


@pytest.mark.parametrize("scope", SCOPES)
def test_inputs_that_require_grad_are_not_taken_for_another_net(scope, looks):
    (net, batch), penalty = built("wide"), SCOPES[scope][0](0.3)
    for _ in range(3):
        x, t = batch(4)
        require_right(penalty, net, x.requires_grad_(), t, scope)
        assert x.grad is not None
    assert len(looks) == 1


def test_an_input_that_is_written_to_later_takes_the_long_way(looks):
    """The graph has saved the input of the second layer; a write makes it another."""
    (net, batch), penalty, writes = built("wide"), gpkit.per_sample_grad_norm(0.3), []

    def loss(x, t):
        y = net(x)
        if writes:
            x.mul_(2)
        return F.cross_entropy(y, t, reduction="none")

    for _ in range(2):
        x, t = batch(4)
        penalty.with_loss(lambda x=x, t=t: loss(x, t), net)
    assert len(looks) == 1
    writes.append(1)
    x, t = batch(4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.with_loss(lambda: loss(x, t), net).backward()


def test_copies_are_others_and_nets_are_not_kept(looks):
    (net, batch), penalty = built("wide"), gpkit.weight_grad_norm(0.3)
    for _ in range(2):
        require_right(penalty, net, *batch(4), "batch")
    other, twin = copy.deepcopy(penalty), copy.deepcopy(net)
    require_right(other, twin, *batch(4), "batch")
    require_right(penalty, twin, *batch(4), "batch")
    assert len(looks) == 3
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None
