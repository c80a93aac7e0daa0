"""A step of with_loss that repeats an earlier one takes the shortcut, and is right."""

import copy
import gc
import weakref

import pytest
import torch
from compare import gradients, relative_error
from differenced import data, fd, mlp
from repeated import PENALTIES, by_hand, closure_of
from torch import nn

import gpkit


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("act", [nn.Tanh, nn.ReLU])
def test_repeated_steps_are_those_of_a_loop(name, act, no_long_way):
    build, form = PENALTIES[name]
    net, penalty = mlp(act()), build()
    penalty.with_loss(closure_of(net, data()), net)
    no_long_way()
    for size in (5, 3, 1):
        x = data()[:size]
        found = penalty.with_loss(closure_of(net, x), net)
        total, grads = by_hand(net, net(x).square().mean(), form)
        torch.testing.assert_close(found.detach(), total)
        assert relative_error(gradients(found, net), grads) < 1e-5
        with torch.no_grad():  # as a step of an optimiser does
            for p in net.parameters():
                p.mul_(1.1)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_a_repeated_step_of_sam_is_the_gradient_at_the_moved_weights(alpha, no_long_way):
    net, x, penalty = mlp(nn.ReLU()), data(), gpkit.gnp(alpha=alpha, r=0.05)
    loss = lambda: net(x).square().mean()  # noqa: E731
    penalty.with_loss(loss, net)
    no_long_way()
    here = torch.autograd.grad(loss(), list(net.parameters()))
    n = torch.cat([g.flatten() for g in here]).norm()
    before = copy.deepcopy(net.state_dict())
    found = gradients(penalty.with_loss(loss, net), net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        for p, g in zip(net.parameters(), here, strict=True):
            p.add_(0.05 * g / n)
    there = gradients(loss(), net)
    mixed = (1 - alpha) * torch.cat([g.flatten() for g in here]) + alpha * there
    assert relative_error(found, mixed) < 1e-10


def test_a_step_leaves_the_traces_of_one_forward_pass(no_long_way):
    """Batch statistics and random numbers move as in a plain step; both passes share the mask."""
    net, x = mlp(nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh()), data()
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd(1e-5, "central"))
    loss = lambda: net(x).square().mean()  # noqa: E731
    penalty.with_loss(loss, net)
    no_long_way()
    plain, state = copy.deepcopy(net), torch.get_rng_state()
    expected, grads = by_hand(plain, plain(x).square().mean(), lambda n: n**2)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    total = penalty.with_loss(loss, net)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(dict(net.named_buffers()), dict(plain.named_buffers()))
    torch.testing.assert_close(total.detach(), expected)
    assert relative_error(gradients(total, net), grads) < 1e-6


def frozen(net):
    net[0].weight.requires_grad_(False)


def replaced(net):
    net[0] = nn.Linear(3, 6).double()


def relu(net):
    net[1] = nn.ReLU()


def added(net):
    net.append(nn.Linear(1, 1).double())


def hooked(net):
    net[0].register_forward_hook(lambda *args: args[2] * 2)


def evaluated(net):
    net.eval()


@pytest.mark.parametrize("change", [frozen, replaced, relu, added, hooked, evaluated])
def test_a_change_of_the_net_is_seen(change):
    net, x = mlp(nn.Tanh()), data()
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))
    loss = lambda: net(x).square().mean()  # noqa: E731
    for turn in range(6):
        if turn == 3:
            change(net)
        found = penalty.with_loss(loss, net)
        total, grads = by_hand(net, loss(), lambda n: n**2)
        torch.testing.assert_close(found.detach(), total)
        trained = [p for p in net.parameters() if p.requires_grad]
        mine = torch.cat([g.flatten() for g in torch.autograd.grad(found, trained)])
        assert relative_error(mine, grads) < 1e-5


def test_a_change_of_what_the_closure_does_is_seen():
    """A flag that no module holds, another net in its cell, and an input that requires grad."""
    nets, x, scale = [mlp(nn.Tanh()), mlp(nn.Tanh(), nn.Tanh())], data(), [1.0]
    penalty = gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))

    def step(net, x):
        def closure():
            y = net(x) if scale[0] == 1.0 else net(x).relu()
            return y.square().mean()

        return penalty.with_loss(closure, net), closure

    for net, scale[0] in [(n, s) for s in (1.0, 2.0, 1.0) for n in nets for _ in range(2)]:
        found, closure = step(net, x)
        total, grads = by_hand(net, closure(), lambda n: n**2)
        torch.testing.assert_close(found.detach(), total)
        assert relative_error(gradients(found, net), grads) < 1e-5
    given = x.clone().requires_grad_()
    found, closure = step(nets[0], given)
    (grad,) = torch.autograd.grad(found, given)
    loss = closure()
    grads = torch.autograd.grad(loss, list(nets[0].parameters()), create_graph=True)
    exact = loss + 0.3 * sum(g.square().sum() for g in grads)
    assert relative_error(grad, torch.autograd.grad(exact, given)[0]) < 1e-5


def counted(module, _):
    module.calls += 1


def test_a_state_that_a_module_gets_later_moves_once_a_step():
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.sam()
    for _ in range(3):
        penalty.with_loss(closure_of(net, x), net)
    net[1].register_buffer("calls", torch.zeros(()))
    net[1].register_forward_pre_hook(counted)
    for calls in (1, 2, 3):
        penalty.with_loss(closure_of(net, x), net)
        assert net[1].calls == calls


def test_a_generator_that_a_closure_gets_later_repeats_its_numbers():
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))

    def closure_with(rng):
        def closure():
            noise = torch.zeros_like(x) if rng is None else torch.rand(x.shape, generator=rng)
            return net(x + noise).square().mean()

        return closure

    for _ in range(3):
        penalty.with_loss(closure_with(None), net)
    rng = torch.Generator().manual_seed(0)
    found = penalty.with_loss(closure_with(rng), net)
    total, grads = by_hand(net, closure_with(rng.manual_seed(0))(), lambda n: n**2)
    torch.testing.assert_close(found.detach(), total)
    assert relative_error(gradients(found, net), grads) < 1e-5


def test_schedules_counts_and_modes_are_those_of_the_long_way():
    net, x = mlp(nn.Tanh()), data()
    build = lambda: gpkit.weight_grad_norm(lambda t: 0.1 * t, every=2, seed=3, estimator=fd(1e-6))  # noqa: E731
    short, long = build(), build()
    loss = lambda: net(x).square().mean()  # noqa: E731
    for _ in range(7):
        found = short.with_loss(loss, net)
        long.shortcuts.steps.found.clear()
        expected = long.with_loss(loss, net)
        torch.testing.assert_close(found, expected)
        assert relative_error(gradients(found, net), gradients(expected, net)) < 1e-9
        assert short.state_dict() == long.state_dict()
    assert short.shortcuts.steps.found
    with torch.no_grad():
        assert not short.with_loss(loss, net).requires_grad
    with pytest.raises(TypeError, match="takes a function"):
        short.with_loss(loss(), net)


def test_a_net_is_looked_at_again_and_keeps_its_shortcut(no_long_way):
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.sam()
    penalty.with_loss(closure_of(net, x), net)
    (known,) = penalty.shortcuts.steps.found.values()
    for _ in range(5):
        known.known.runs = 98
        penalty.with_loss(closure_of(net, x), net)  # the hundredth run goes the long way
        assert penalty.shortcuts.steps.found
        penalty.with_loss(closure_of(net, x), net)
    no_long_way()
    penalty.with_loss(closure_of(net, x), net)


def test_a_closure_whose_graph_differs_each_time_is_given_up():
    net, penalty = mlp(nn.Tanh()), gpkit.weight_grad_norm(0.3, estimator=fd(1e-6))
    for times in (1, 2, 3, 4, 5, 6, 7):

        def closure():
            y = net(data())
            for _ in range(times):  # noqa: B023
                y = y.sin()
            return y.square().mean()

        torch.manual_seed(0)
        found = penalty.with_loss(closure, net)
        torch.manual_seed(0)
        total, grads = by_hand(net, closure(), lambda n: n**2)
        torch.testing.assert_close(found.detach(), total)
        assert relative_error(gradients(found, net), grads) < 1e-5
    assert not penalty.shortcuts.steps.found


def test_a_closure_that_keeps_a_history_has_a_shortcut(no_long_way):
    net, x, penalty, history = mlp(nn.Tanh()), data(), gpkit.sam(), [0.0] * 98

    def closure():
        history.append(1.0)
        return net(x).square().mean()

    penalty.with_loss(closure, net)
    no_long_way()
    for _ in range(3):
        penalty.with_loss(closure, net)


def test_a_backward_pass_hands_the_gradient_out_more_than_once():
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.sam()
    once = gradients(penalty.with_loss(closure_of(net, x), net), net)
    total = penalty.with_loss(closure_of(net, x), net)
    (3 * total).backward(retain_graph=True)
    total.backward()
    both = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(both, 4 * once)


def test_a_penalty_keeps_no_net_alive_and_its_copies_know_none():
    net, x, penalty = mlp(nn.Tanh()), data(), gpkit.sam()
    for _ in range(3):
        penalty.with_loss(closure_of(net, x), net)
    assert penalty.shortcuts.steps.found
    assert not copy.deepcopy(penalty).shortcuts.steps.found
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    assert not penalty.shortcuts.steps.found
