"""Penalties that would train nothing are told at the first step, each by its name."""

import torch
from fits import penalty
from modules import Plain
from nets import net
from refused import refusal, refused
from torch import nn

import gpkit


def test_a_relu_net_of_order_two():
    relu = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    cb = gpkit.GradientPenaltyCallback(gpkit.curvature(), "net")
    line = refusal(Plain(relu), cb)
    assert "order 2 of a piecewise-linear net (Relu) is zero everywhere" in line


def test_a_penalty_whose_derivative_is_constant():
    """The Jacobian of a linear net in what trains nothing of it: all of it is frozen but a bias."""
    module = Plain(net())
    module.net.requires_grad_(False)
    module.net.head.bias.requires_grad_(True)
    cb = gpkit.GradientPenaltyCallback(gpkit.jacobian(), "net")
    line = refusal(module, cb)
    assert "penalty 'jacobian': the penalty does not depend on any trained parameter" in line


def test_penalties_that_do_not_act_at_once():
    relu = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    parts = {"acts": penalty(), "bends": gpkit.curvature(), "too": gpkit.curvature(order=3)}
    line = refused(parts, "net", Plain(relu))
    assert "penalty 'bends': the penalty does not depend on any trained parameter" in line
    assert "penalty 'too': the penalty does not depend on any trained parameter" in line
    assert "'acts'" not in line


def test_an_error_of_another_kind_is_not_taken_for_a_finding():
    class Exhausted(gpkit.GradientPenalty):
        def act(self, *args, **options):
            raise torch.OutOfMemoryError("all of it")

    cb = gpkit.GradientPenaltyCallback(Exhausted(wrt="weight", of="loss"))
    assert refusal(Plain(net()), cb, error=torch.OutOfMemoryError) == "all of it"
