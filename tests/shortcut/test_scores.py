"""A repeated call with scores takes the shortcut and is right."""

import warnings

import pytest
import torch
from critics import LABELS, X, by_hand, net, require_right
from torch import nn

import gpkit


def test_scores_of_the_same_graph_are_differentiated_at_once(no_long_way):
    critic, penalty = net(), gpkit.r1(weight=2.0)
    for step in range(3):
        x = (X + step).requires_grad_()
        call = lambda x=x: penalty(critic(x, LABELS), x)  # noqa: E731
        f = lambda z: critic(z, LABELS)  # noqa: E731
        require_right(penalty, call, critic, f, X + step, lambda n2: n2)
        if step == 0:
            no_long_way()


def test_scores_whose_graph_or_points_are_others_take_the_long_way():
    critic, penalty = net(), gpkit.r1()
    x = X.clone().requires_grad_()
    for _ in range(2):
        penalty(critic(x, LABELS), x)
    with pytest.raises(ValueError, match="was not used to compute"):
        penalty(critic(x, LABELS), x[:, :3])
    with pytest.raises(ValueError, match="do not require grad"):
        penalty(critic(x, LABELS), X)
    with pytest.raises(RuntimeError, match="no graph"):
        penalty(critic(x, LABELS).detach(), x)
    with pytest.raises(ValueError, match="got a scalar"):
        penalty(critic(x, LABELS).mean(), x)
    critic.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        penalty(critic(x, LABELS), x)


def test_complex_samples_are_refused_as_in_the_first_call():
    critic, penalty = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), gpkit.r1()
    for dtype in (torch.float32, torch.float32, torch.complex64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # complex modules are new
            critic.to(dtype)
        x = X.to(dtype).requires_grad_()
        if x.is_complex():
            with pytest.raises(TypeError, match="takes real samples"):
                penalty(critic(x).abs(), x)
        else:
            penalty(critic(x).abs(), x)


def test_scores_of_another_net_take_the_long_way_once(looks):
    nets, penalty = [net(), net()], gpkit.r1(weight=2.0)
    x = X.clone().requires_grad_()
    for _ in range(3):
        for critic in nets:
            penalty(critic(x, LABELS), x)
    assert len(looks) == 2


def test_scores_of_a_moved_input_end_at_it(no_long_way):
    critic, penalty, make = net(), gpkit.r1(weight=2.0), nn.Linear(5, 5).double()
    for step in range(3):
        x = make(X + step)
        found = penalty(critic(x, LABELS), x)
        expected = by_hand(lambda z: critic(z, LABELS), x, lambda n2: n2)
        torch.testing.assert_close(found, expected)
        if step == 0:
            no_long_way()
