"""Finite differences of a sharded ReLU net keep its units on their pieces."""

import pytest
import ranks
import torch
import torch.nn.functional as F
from sharding import sharded
from torch import nn

import gpkit
from gpkit.autodiff.random import random_state
from gpkit.estimators.base import Recomputable
from gpkit.lightning.callback.sharded import ShardedWeights

pytestmark = pytest.mark.ddp


def setting():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    net = nn.Sequential(*layers).double()
    return net, torch.randn(64, 16, dtype=torch.float64), torch.randint(10, (64,))


def gradient(rank):
    """The gradient of the penalty, by name."""
    net, x, y = setting()
    net, x, y = sharded(net), x.chunk(2)[rank], y.chunk(2)[rank]
    penalty = gpkit.weight_grad_norm(1.0, scope="global", estimator=gpkit.finite_difference(0.01))
    shards, state = ShardedWeights(net), random_state(x.device)

    def loss():
        return F.cross_entropy(net(x), y)

    _, terms = shards.terms({"p": penalty}, Recomputable(loss(), loss, state))
    terms["p"].penalty.backward()
    return {n: p.grad.full_tensor() for n, p in net.named_parameters()}


def test_the_gradient_is_that_of_double_backprop():
    net, x, y = setting()
    parameters = [*net.parameters()]
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=True)
    true = torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)
    true = torch.cat([g.flatten() for g in true])
    for found in ranks.run(gradient):
        found = torch.cat([found[n].flatten() for n, _ in net.named_parameters()])
        assert (found - true).norm() < 0.1 * true.norm()
