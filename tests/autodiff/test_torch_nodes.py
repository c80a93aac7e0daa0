"""The nodes of torch's graphs have the names and attributes by which gpkit knows them."""

import pytest
import torch
import torch.nn.functional as F
from releases import require
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import gpkit
from gpkit.autodiff import compat, graph
from gpkit.findings.derivatives import PIECEWISE_LINEAR, has_no_curvature


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad


class Twice(Once):
    @staticmethod
    def backward(ctx, grad):
        return grad


def point():
    return torch.randn(4, 3, 5, requires_grad=True)


def node_of(y, operation):
    """Return the node of an operation in the graph of y: there must be one."""
    return next((n for n in graph.nodes(y) if compat.operation_of(n) == operation), None)


def derivative(y, x):
    return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]


def test_leaf_attribute():
    x = point()
    found = [getattr(node, compat.LEAF, None) for node in graph.nodes(x.tanh())]
    require(
        any(leaf is x for leaf in found),
        "LEAF",
        "no penalty is seen to reach a parameter, and all are refused as without effect",
    )
    assert found.count(None) == 1


PIECEWISE = {
    "Relu": F.relu,
    "LeakyRelu": F.leaky_relu,
    "Hardtanh": F.relu6,
    "Threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "PreluKernel": lambda x: F.prelu(x, torch.full((1,), 0.25)),
    "RreluWithNoise": lambda x: F.rrelu(x, training=True),
    "Abs": torch.abs,
    "Clamp": lambda x: x.clamp(-1, 1),
    "ClampMin": lambda x: x.clamp_min(0),
    "ClampMax": lambda x: x.clamp_max(0),
    "Softshrink": F.softshrink,
    "Hardshrink": F.hardshrink,
    "MaxPool2DWithIndices": lambda x: F.max_pool2d(x.reshape(1, 1, 1, -1), (1, 2)),
    "MaxPool3DWithIndices": lambda x: F.max_pool3d(x.reshape(1, 1, 1, 1, -1), (1, 1, 2)),
    "AdaptiveMaxPool2D": lambda x: F.adaptive_max_pool2d(x.reshape(1, 1, 1, -1), 1),
    "Max": lambda x: x.max(),
    "Amax": lambda x: x.amax(),
    "Maximum": lambda x: torch.maximum(x, -x),
}


@pytest.mark.parametrize("operation", PIECEWISE)
def test_operation_of(operation):
    y = PIECEWISE[operation](point())
    require(
        has_no_curvature(y, 2) == operation,
        f"operation_of, for {operation!r}",
        "a penalty of order >= 2 of a piecewise-linear net is 0 without a word",
    )


def test_the_operations_that_are_looked_for_are_tested():
    assert set(PIECEWISE_LINEAR) == set(PIECEWISE)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.PReLU(), nn.LeakyReLU(), nn.Hardtanh()])
def test_a_curvature_penalty_of_a_piecewise_linear_net_is_refused(layer):
    net = nn.Sequential(nn.Linear(3, 4), layer, nn.Linear(4, 1))
    with pytest.raises(RuntimeError, match=r"order 2 of a piecewise-linear net .* is zero"):
        gpkit.curvature()(net, torch.randn(5, 3))


THIRD = "a penalty has torch's third derivative of it, which is wrong, without a word"


def test_is_layer_norm():
    x = point()
    y = F.layer_norm(x, (5,))
    first, second = node_of(y, "NativeLayerNorm"), derivative(y, x)
    require(first is not None and compat.is_layer_norm(first.name()), "is_layer_norm", THIRD)
    assert not compat.is_second_derivative(first.name())
    names = [node.name() for node in graph.nodes(second)]
    found = [n for n in names if compat.is_layer_norm(n) and compat.is_second_derivative(n)]
    require(found, "is_second_derivative", THIRD)


@pytest.mark.parametrize("training", [True, False])
def test_uses_batch_statistics(training):
    x, running = point(), (torch.zeros(3), torch.ones(3))
    y = F.batch_norm(x, *running, training=training)
    for tensor, twice in ((y, False), (derivative(y, x), True)):
        found = {
            compat.uses_batch_statistics(node, node.name())
            for node in graph.nodes(tensor)
            if "BatchNorm" in node.name() and compat.is_second_derivative(node.name()) == twice
        }
        require(found == {training}, "uses_batch_statistics", THIRD)


# The nodes of batch norm in evaluation, which have the right derivatives.
EVALUATES = ("NativeBatchNormLegitNoTrainingBackward", "BatchNormNoUpdateBackward")


def kinds(part):
    """Return the names of the nodes that this torch has, those of other devices included."""
    return [name for name in dir(getattr(torch._C, "_functions", None)) if part in name]


@pytest.mark.parametrize("name", kinds("BatchNorm"))
def test_uses_batch_statistics_on_any_device(name):
    """cuDNN's second derivative has no flag, and is of training alone."""
    kind = getattr(torch._C._functions, name)
    flags = [flag for flag in compat._TRAINING_FLAGS if hasattr(kind, flag)]
    alone = compat.uses_batch_statistics(None, name)
    require(
        len(flags) + alone + name.startswith(EVALUATES) == 1,
        f"uses_batch_statistics, for {name}, which is new or tells its mode in another way",
        THIRD,
    )


def test_nodes_of_other_devices():
    attention, norms = kinds("ScaledDotProduct"), kinds("LayerNorm")
    assert all(map(compat.is_fused_attention, attention))
    require(
        len(attention) > 3, "is_fused_attention", "not all kinds of attention are refused early"
    )
    found = [compat.is_layer_norm(name) for name in norms]
    require(found and all(found), f"is_layer_norm, for one of {norms}", THIRD)


def test_is_fused_attention():
    h = torch.randn(2, 2, 4, 8, requires_grad=True)
    names = [node.name() for node in graph.nodes(F.scaled_dot_product_attention(h, h, h))]
    require(
        any(map(compat.is_fused_attention, names)),
        "is_fused_attention",
        "a graph with attention is refused late, in torch's words, without what helps",
    )


def test_is_once_differentiable():
    require(
        compat.is_once_differentiable(Once.apply(point()).grad_fn),
        "is_once_differentiable",
        "a penalty takes such a backward for a constant, and its gradient is wrong without a word",
    )
    assert not compat.is_once_differentiable(Twice.apply(point()).grad_fn)
    assert not compat.is_once_differentiable(point().tanh().grad_fn)


def test_is_reentrant_checkpoint():
    y = checkpoint(torch.tanh, point(), use_reentrant=True)
    require(
        any(map(compat.is_reentrant_checkpoint, graph.nodes(y))),
        "is_reentrant_checkpoint",
        "the callback refuses such a training step late, in torch's words",
    )
    y = checkpoint(torch.tanh, point(), use_reentrant=False)
    assert not any(map(compat.is_reentrant_checkpoint, graph.nodes(y)))


AGAIN = "what checkpointing runs again is taken for the forward of the training step"


def runs(reentrant):
    """Return what in_backward says in a forward, and in the one that checkpointing makes again."""
    said = []

    def layer(x):
        said.append(compat.in_backward())
        return x.tanh()

    checkpoint(layer, point(), use_reentrant=reentrant).sum().backward()
    return said


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_backward(reentrant):
    require(runs(reentrant) == [False, True] and not compat.in_backward(), "in_backward", AGAIN)


def test_recomputing_by():
    calls = []

    def wrap(part):
        return lambda *args: calls.append(args) or part(*args)

    with compat.recomputing_by(wrap):
        y = checkpoint(torch.tanh, point(), use_reentrant=False)
    checkpoint(torch.tanh, point(), use_reentrant=False).sum().backward()  # outside: as ever
    assert not calls
    y.sum().backward()
    without = "what is checkpointed is run again on the real buffers, with other kernels"
    require(len(calls) == 1, "recomputing_by", without)


def test_dtypes_of():
    x = torch.ones(3, requires_grad=True)
    node = x.to(torch.bfloat16).grad_fn
    without = "half precision inside of a function that returns float32 is not seen"
    require(type(node).__name__ == compat.CASTS, "CASTS", without)
    require(compat.dtypes_of(node) == {torch.bfloat16}, "dtypes_of", without)
