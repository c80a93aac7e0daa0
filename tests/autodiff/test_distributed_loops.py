"""Loops of one's own under DistributedDataParallel: two processes equal one on the joint batch."""

import re
from pathlib import Path

import pytest
import ranks
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gpkit

pytestmark = pytest.mark.ddp

LOOPS = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()
DOCUMENTED = re.search(r"```python\n(.*?def train.*?)```", LOOPS, re.DOTALL)[1]
KINDS = {
    "": {},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
}


def critic():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def batches():
    rng = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 8, 5, generator=rng, dtype=torch.float64) for _ in range(6)]
    return [tuple(pair) for pair in pairs]


def slopes(net, x):
    """‖∂D/∂x_i‖², by hand."""
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(z).sum(), z, create_graph=True)
    return grad.square().sum(1)


def stepped(optimizer, total):
    optimizer.zero_grad()
    total.backward()
    optimizer.step()


def joint(kind):
    """The loops of one process, without gpkit."""
    net = critic()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step, (real, fake) in enumerate(batches()):
        loss = F.softplus(-net(real)).mean() + F.softplus(net(fake)).mean()
        if kind == "docs":
            grads = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
            stepped(optimizer, loss + 0.1 * sum(g.square().sum() for g in grads))
            if step % 4 == 0:
                stepped(optimizer, 4 * slopes(net, real).mean())  # 2 / 2, every fourth step
        elif kind == "added":
            stepped(optimizer, loss + slopes(net, real).mean())
        else:
            stepped(optimizer, loss)
            stepped(optimizer, slopes(net, real).mean())
    return list(net.parameters())


def documented(rank):
    """The example of the documentation, as it stands."""
    names = {}
    block = next(
        b for b in re.findall(r"```python\n(.*?)```", LOOPS, re.DOTALL) if "def train" in b
    )
    exec(block, names)
    halves = [tuple(z[rank::2] for z in pair) for pair in batches()]
    return list(names["train"](critic(), halves).parameters())


def alone(rank, kind, given):
    """A penalty's backward pass of its own: through the module, a function, or a tensor."""
    net = DistributedDataParallel(critic(), **KINDS[kind])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    penalty = gpkit.r1(2.0, at="data", estimator="exact")
    for real, fake in batches():
        x = real[rank::2]
        stepped(optimizer, F.softplus(-net(x)).mean() + F.softplus(net(fake[rank::2])).mean())
        if given == "tensor":
            z = x.clone().requires_grad_()
            value = penalty(net(z), z)
        else:
            value = penalty(net if given == "module" else lambda z: net(z), x)
        stepped(optimizer, value)
    return list(net.parameters())


def static(rank, inner):
    """A static graph: refused, except where the penalty does not see it."""
    net = DistributedDataParallel(critic(), static_graph=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    penalty = gpkit.r1(2.0, at="data")
    for real, fake in batches():
        x, y = real[rank::2], fake[rank::2]
        loss = F.softplus(-net(x)).mean() + F.softplus(net(y)).mean()
        stepped(optimizer, loss + penalty(net.module if inner else net, x))
    return list(net.parameters())


def static_weights(rank, estimator):
    net = DistributedDataParallel(critic(), static_graph=True)
    loss = lambda: F.softplus(-net(batches()[0][0][rank::2])).mean()  # noqa: E731
    with pytest.raises(RuntimeError) as raised:
        gpkit.weight_grad_norm(estimator=estimator)(loss, net)
    return str(raised.value)


def unreached(rank):
    """A penalty that trains nothing is refused as in one process."""
    net = DistributedDataParallel(nn.Linear(5, 1))
    with pytest.raises(RuntimeError, match="does not depend on any trained parameter"):
        gpkit.curvature()(net, torch.randn(4, 5))


def assert_same(results, true):
    for params in results:
        for got, want in zip(params, true, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_the_documented_loop():
    assert_same(ranks.run(documented), joint("docs"))


@pytest.mark.parametrize("given", ["module", "function", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_backward(kind, given):
    """Each process kept its own gradient: the last bias has none, and DDP waited for it."""
    assert_same(ranks.run(alone, kind, given), joint("alone"))


def test_a_static_graph():
    with pytest.raises(RuntimeError, match=r"inside of a penalty .* leave out static_graph=True"):
        ranks.run(static, False)
    assert_same(ranks.run(static, True), joint("added"))


@pytest.mark.parametrize("estimator", ["exact", "finite_difference"])
def test_a_static_graph_under_a_weight_penalty(estimator):
    for said in ranks.run(static_weights, estimator):
        assert "leave out static_graph=True" in said


def test_a_penalty_that_trains_nothing():
    ranks.run(unreached)
