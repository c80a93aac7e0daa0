"""A repeated call with a function takes the shortcut and is right."""

import functools
import weakref

import pytest
import torch
from critics import LABELS, X, Y, by_hand, net, require_right
from torch import nn
from torch.autograd.function import once_differentiable

import gpkit


class Holder:
    """An object that is no module, and calls one."""

    def __init__(self, net):
        self.net, self.scale = net, 3.0

    def __call__(self, z):
        return self.scale * self.net(z, z[:, :1])


HOLDERS = weakref.WeakKeyDictionary()
FUNCTIONS = {
    "a lambda made anew": lambda critic: lambda z: critic(z, LABELS),
    "a method": lambda critic: critic.scaled,
    "a partial": lambda critic: functools.partial(critic, label=LABELS),
    "an object": lambda critic: HOLDERS.setdefault(critic, Holder(critic)),
    "a default": lambda critic: lambda z, critic=critic: critic(z, LABELS),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_repeated_call_with_a_function_is_that_of_a_loop(name, no_long_way):
    critic = net()
    penalty = gpkit.wgan_gp(weight=1.0, at="real")
    value = lambda n2: (n2.sqrt() - 1) ** 2  # noqa: E731
    for repeated in (False, True):
        f = FUNCTIONS[name](critic)
        require_right(penalty, lambda f=f: penalty(f, real=X), critic, f, X, value)
        if not repeated:
            no_long_way()
    with torch.no_grad():
        critic.first.weight *= 1.5  # as a step does
    f = FUNCTIONS[name](critic)
    require_right(penalty, lambda: penalty(f, real=X), critic, f, X, value)


def test_labels_and_numbers_in_a_closure_may_change_at_each_step(no_long_way):
    critic, penalty = net(), gpkit.r1(weight=2.0)
    for step in range(4):
        labels, scale = LABELS * step, 1.0 + step

        def f(z, labels=labels, scale=scale):
            return scale * critic(z, labels)

        call = lambda z: f(z)  # noqa: E731
        require_right(penalty, lambda c=call: penalty(c, real=X), critic, call, X, lambda n2: n2)
        if step == 1:
            no_long_way()


def test_several_nets_behind_one_function_have_a_shortcut_each(no_long_way):
    nets, penalty = [net(), net(), net()], gpkit.r1(weight=2.0)
    for k in (0, 1):
        for i, critic in enumerate(nets):
            with torch.no_grad():
                critic.last.weight.mul_(i + 1.5)
            f = FUNCTIONS["a lambda made anew"](critic)
            require_right(penalty, lambda f=f: penalty(f, real=X), critic, f, X, lambda n2: n2)
        if k == 0:
            no_long_way()


def frozen(critic):
    critic.first.weight.requires_grad_(False)


def replaced(critic):
    critic.last = nn.Linear(8, 1).double()


def another_parameter(critic):
    critic.first.bias = nn.Parameter(torch.ones(8, dtype=torch.float64))


def frozen_in_part(critic):
    critic.first.bias.requires_grad_(False)


def evaluated(critic):
    critic.eval()


def hooked(critic):
    critic.first.register_forward_hook(lambda *_: None)


CHANGES = [frozen, replaced, another_parameter, frozen_in_part, evaluated, hooked]


@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: lambda z: net(z)])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_net_takes_the_long_way(wrap, change, looks):
    critic, penalty = net(), gpkit.r1(weight=2.0)
    critic.forward = functools.partial(critic.forward, label=LABELS)
    for _ in range(3):
        penalty(wrap(critic), real=X)
    assert len(looks) == 1
    change(critic)
    taken = []
    for _ in range(4):
        found = penalty(wrap(critic), real=X)
        torch.testing.assert_close(found, by_hand(critic, X, lambda n2: n2))
        taken.append(len(looks) - 1)
    assert taken[0] == 1
    assert taken[1] == taken[3] <= 2  # the second shows that nothing else is new


def test_another_mode_of_modules_of_torch_takes_the_long_way(looks):
    critic, penalty = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
        gpkit.r1(),
    )
    for _ in range(3):
        penalty(critic, real=X)
    critic[1].eval()
    penalty(critic, real=X)
    assert len(looks) == 2


class Once(torch.autograd.Function):
    """A function of the user's own without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad


def test_a_function_that_comes_to_have_no_second_derivative_is_refused():
    critic, penalty, hard = net(), gpkit.r1(), []

    def f(z):
        y = critic(z, LABELS)
        return Once.apply(y) if hard else y

    for _ in range(3):
        penalty(f, real=X)
    hard.append(True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(f, real=X)


def test_a_function_that_comes_to_train_nothing_is_refused():
    critic, penalty = net(), gpkit.r1()
    f = lambda z: critic(z, LABELS)  # noqa: E731
    for _ in range(3):
        penalty(f, real=X)
    critic.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        penalty(f, real=X)


PENALTIES = {
    "wgan_lp": gpkit.wgan_lp,
    "zero_gp": gpkit.zero_gp,
    "dragan": gpkit.dragan,
    "normal noise": lambda **k: gpkit.wgan_gp(at=gpkit.perturb(0.5, noise="normal"), **k),
    "noise along": lambda **k: gpkit.dragan(noise="positive", **k),
    "wgan_div": gpkit.wgan_div,
    "max_gp": gpkit.max_gp,
    "absolute": lambda **k: gpkit.wgan_gp(form=gpkit.absolute(0.3), **k),
    "scaled": lambda **k: gpkit.wgan_gp(form=gpkit.two_sided(0.3, scale=0.7, eps=0.1), **k),
    "scaled squares": lambda **k: gpkit.zero_gp(form=gpkit.squared(scale=0.3), **k),
    "l1": lambda **k: gpkit.wgan_gp(form=gpkit.two_sided(0.3, norm="l1"), **k),
    "average": lambda **k: gpkit.wgan_gp(form=gpkit.two_sided(gpkit.running_average()), **k),
    "a part": lambda **k: gpkit.wgan_gp(subsample=0.5, **k),
    "schedule": lambda **k: gpkit.wgan_gp(**k | {"weight": lambda step: 1.0 + step}),
    "adaptive": lambda **k: gpkit.wgan_gp(**k | {"weight": gpkit.target_norm(1.0)}),
    "lazy": lambda **k: gpkit.wgan_gp(every=2, **k),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PENALTIES)
def test_it_is_the_long_way_to_the_last_bit(name, dtype, looks, monkeypatch):
    critic = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 1)).to(dtype)
    x, y = X.to(dtype), Y.to(dtype)
    short, long = (PENALTIES[name](weight=3.0, seed=5) for _ in range(2))
    monkeypatch.setattr(long.shortcuts, "note", lambda *given: given[-1])
    for _ in range(6):
        found = [p(critic, real=x, fake=y) for p in (short, long)]
        assert torch.equal(*found)
        if found[1].requires_grad:
            parameters = list(critic.parameters())
            grads = [torch.autograd.grad(t, parameters, allow_unused=True) for t in found]
            for a, b in zip(*grads, strict=True):
                assert (a is b is None) or torch.equal(a, b)
    assert short.state_dict() == long.state_dict()
    assert [p is short for p in looks].count(True) == 1


def test_a_function_that_comes_to_be_complex_is_refused():
    critic, penalty = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), gpkit.r1()
    f = lambda z: critic(z.to(critic[0].weight.dtype))  # noqa: E731
    critic.double()
    for _ in range(3):
        penalty(f, real=X.float())
    with pytest.warns(UserWarning, match="Complex modules"):
        critic.to(torch.complex64)
    with pytest.raises(RuntimeError, match="complex64"):
        penalty(f, real=X.float())


def test_fakes_with_a_graph_and_samples_of_another_size_or_dtype():
    critic, make = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), nn.Linear(5, 5)
    short, long = gpkit.wgan_gp(seed=1), gpkit.wgan_gp(seed=1)
    long.shortcuts.note = lambda *given: given[-1]
    for size, dtype in ((6, torch.float32), (4, torch.float32), (4, torch.float64)) * 2:
        critic.to(dtype)
        x, y = X[:size].to(dtype), make.to(dtype)(X[:size].to(dtype))
        found = [p(critic, real=x, fake=y) for p in (short, long)]
        assert torch.equal(*found)
        assert torch.autograd.grad(found[0], make.weight, allow_unused=True) == (None,)
    assert short.shortcuts.found
