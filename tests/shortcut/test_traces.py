"""Repeated calls move no stream, and count and fail as the first one does."""

import contextlib
import functools
import random

import pytest
import torch
from critics import LABELS, X, Y, net
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import gpkit


def test_a_function_leaves_no_trace_in_a_repeated_call(no_long_way):
    critic, drawn = net(), []
    drop = nn.Dropout(0.5)

    def f(z):
        drawn.append(gpkit.in_penalty())
        return critic(drop(z), LABELS)

    penalty, found = gpkit.r1(), set()
    penalty(f, real=X)
    no_long_way()
    before = torch.get_rng_state()
    for _ in range(3):
        found.add(penalty(f, real=X).item())
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == 3  # each has masks of its own
    assert all(drawn)
    assert all(p.grad is None for p in critic.parameters())


def test_a_forward_that_is_replaced_later_moves_no_stream():
    critic = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    penalty = gpkit.r1()
    for _ in range(3):
        penalty(critic, real=X)
    critic[1].forward = lambda h: torch.tanh(h * torch.rand(h.shape[0], 1))
    before = torch.get_rng_state()
    for _ in range(3):
        penalty(critic, real=X)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_hook_on_every_module_that_draws_moves_no_stream():
    critic, penalty = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), gpkit.r1()
    for _ in range(3):
        penalty(critic, real=X.float())
    before = torch.get_rng_state()
    with register_module_forward_hook(lambda module, args, out: torch.rand(()) and None):
        for _ in range(3):
            penalty(critic, real=X.float())
    assert torch.equal(torch.get_rng_state(), before)


class StoppedError(Exception):
    pass


ACTS = []


class Acting(nn.Sequential):
    """A critic that does something else in its forward pass."""

    def forward(self, z):
        for act in ACTS:
            act()
        return super().forward(z)


def stop():
    raise StoppedError


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_counts_as_the_first_does_if_its_net_calls_the_penalty_or_fails(fails, looks):
    critic, plain = Acting(nn.Linear(5, 1), nn.Tanh()).double(), nn.Linear(5, 1).double()
    short, long = gpkit.wgan_gp(seed=1), gpkit.wgan_gp(seed=1)
    long.shortcuts.note = lambda *given: given[-1]
    found = {short: {}, long: {}}

    def nested(penalty):
        found[penalty]["nested"] = penalty(plain, real=X, fake=Y)

    for acts in (False, False, True, False):
        for penalty in (short, long):
            ACTS[:] = [stop if fails else functools.partial(nested, penalty)] * acts
            with contextlib.suppress(StoppedError):
                found[penalty]["outer"] = penalty(critic, real=X, fake=Y)
        ACTS.clear()
        assert found[short] == found[long]
        assert short.state_dict() == long.state_dict()
    assert looks.count(short) < looks.count(long)


def test_a_hook_with_the_id_of_one_that_is_gone_is_seen():
    critic, penalty = (
        nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double(),
        gpkit.r1(),
    )
    handle = critic[1].register_forward_hook(lambda module, args, out: 2 * out)
    for _ in range(3):
        penalty(critic, real=X)
    handle.remove()
    critic[1].register_forward_hook(lambda module, args, out: random.random() * out)
    before, found = random.getstate(), set()
    for _ in range(3):
        found.add(penalty(critic, real=X).item())
        assert random.getstate() == before
    assert len(found) == 3
