"""Nodes of a graph: the module that made them, and what is tried on them."""

import torch
from torch import nn
from torch.nn import functional as F

from gpkit.autodiff import graph
from gpkit.findings import compat
from gpkit.findings.derivatives import undifferentiable
from gpkit.findings.watch import OUTSIDE, ROOT, Watch


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.inner(x).exp()) * 2


def test_the_innermost_module_that_made_a_node():
    net, x = Net(), torch.randn(5, 3)
    with Watch(net) as watch:
        loss = net(x).square().mean()
    kinds = {node.name(): watch.name_of(node) for node in graph.nodes(loss)}
    assert kinds["TanhBackward0"] == "inner.1"
    assert kinds["ExpBackward0"] == ROOT
    assert kinds["PowBackward0"] == OUTSIDE
    layers = {watch.name_of(n) for n in graph.nodes(loss) if n.name() == "AddmmBackward0"}
    assert layers == {"inner.0", "last"}
    assert not any(m._forward_hooks for m in net.modules())


def test_made_at_counts_the_nodes_of_a_thread():
    x = torch.ones(2, requires_grad=True)
    first, second = x.exp(), x.sin()
    assert compat.made_at(second.grad_fn) == compat.made_at(first.grad_fn) + 1


def test_ones_for_has_the_shapes_of_the_outputs():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (given, other) = compat.ones_for(x.split([2, 4], 1)[0].grad_fn)
    assert (given.shape, other.shape, given.dtype) == ((4, 2), (4, 4), torch.float64)
    assert given.requires_grad


def test_each_operation_is_tried_by_itself():
    x = torch.randn(4, 6, requires_grad=True)
    assert undifferentiable(x.tanh().grad_fn) is None
    assert undifferentiable(x.max(1).values.grad_fn) is None
    assert undifferentiable(torch.cat([x, x]).grad_fn) is None
    found = undifferentiable(F.hardsigmoid(x).grad_fn)
    assert (found.code, found.why) == ("no-double-backward", "hardsigmoid has no second derivative")
    found = undifferentiable(torch.cdist(x, x.detach()).grad_fn)
    assert found.why == "torch.cdist has no second derivative"


def test_what_was_compiled():
    net = nn.Linear(2, 2)
    made = torch.compile(net, backend="eager")
    assert compat.compiled_from(made) is net
    assert compat.compiled_from(net) is net
