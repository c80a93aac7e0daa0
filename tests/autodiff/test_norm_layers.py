"""Norm layers have true derivatives at every order, and refuse graphs in which they would not."""

import copy
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from compare import gradients, relative_error
from norms import disturbed
from torch import nn
from torch.func import functional_call

import gpkit
from gpkit.autodiff import graph
from gpkit.autodiff.isolation import isolated
from gpkit.autodiff.norm_layers import elementary

B = 4

orders = pytest.mark.parametrize("order", [1, 2, 3, 4])


class ByHand(nn.Module):
    """A norm layer written out, with the parameters and statistics of one of torch's."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.eps = layer, layer.eps

    def forward(self, x):
        n, eps = self.layer, self.eps
        weight, bias = n.weight, getattr(n, "bias", None)
        if isinstance(n, (nn.LayerNorm, nn.RMSNorm)):
            dims = tuple(range(-len(n.normalized_shape), 0))
            if isinstance(n, nn.RMSNorm):
                x = x / (x.pow(2).mean(dims, keepdim=True) + (eps or 2.0**-52)) ** 0.5
            else:
                x = oracles.standardised(x, dims, eps)
        else:
            channel = [-1] + [1] * (x.ndim - 2)
            if isinstance(n, nn.GroupNorm):
                grouped = x.reshape(len(x), n.num_groups, -1)
                x = oracles.standardised(grouped, (2,), eps).reshape(x.shape)
            elif isinstance(n, nn.modules.instancenorm._InstanceNorm):
                x = oracles.standardised(x, tuple(range(2, x.ndim)), eps)
            elif n.training or n.running_mean is None:
                x = oracles.standardised(x, (0, *range(2, x.ndim)), eps)
            else:
                mean, var = n.running_mean.reshape(channel), n.running_var.reshape(channel)
                x = (x - mean) / (var + eps) ** 0.5
            weight, bias = (None if p is None else p.reshape(channel) for p in (weight, bias))
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


LAYERS = {
    "LayerNorm": lambda: nn.LayerNorm(3),
    "LayerNorm of no affine": lambda: nn.LayerNorm(3, elementwise_affine=False),
    "LayerNorm of no bias": lambda: nn.LayerNorm(3, eps=0.1, bias=False),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm1d without statistics": lambda: nn.BatchNorm1d(3, track_running_stats=False),
    "BatchNorm1d in evaluation": lambda: nn.BatchNorm1d(3).eval(),
    "RMSNorm": lambda: nn.RMSNorm(3),
}

IMAGE_LAYERS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(2),
    "BatchNorm2d in evaluation": lambda: nn.BatchNorm2d(2).eval(),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(2),
    "InstanceNorm2d with affine": lambda: nn.InstanceNorm2d(2, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(1, 2),
    "LayerNorm of images": lambda: nn.LayerNorm((2, 2, 1)),
    "RMSNorm of images": lambda: nn.RMSNorm((2, 1)),
}


def net_with(name):
    if name in LAYERS:
        # Batch norm right after a linear layer does not see a shift of all samples: without the
        # first Tanh the higher derivatives of the batch's sum would be zero.
        layers = [nn.Tanh(), disturbed(LAYERS[name]()), nn.Tanh(), nn.Linear(3, 1)]
        return nn.Sequential(nn.Linear(2, 3), *layers).double(), torch.randn(B, 2).double()
    layer = disturbed(IMAGE_LAYERS[name]())
    layers = [nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.Linear(4, 1)]
    return nn.Sequential(nn.Conv2d(1, 2, (1, 2)), *layers).double(), torch.randn(
        B, 1, 2, 2
    ).double()


def written_out(net):
    """Return the same net, of the same parameters, with its norms written out."""
    kinds = nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase
    return nn.Sequential(*(ByHand(m) if isinstance(m, kinds) else m for m in net))


def assert_true(f, net, true, order, x):
    """Check norms and parameter gradient of a penalty against torch.func's, by a hand's norms."""
    terms = gpkit.GradientPenalty(order=order).terms(f, x)
    params = {name: p.detach() for name, p in true.named_parameters()}

    def penalty(params):
        entries = oracles.coupled_derivative(partial(functional_call, true, params), order, x)
        squares = entries.flatten(1).square().sum(1)
        return squares.mean(), squares.sqrt()

    expected, norms = torch.func.grad(penalty, has_aux=True)(params)
    assert relative_error(terms.norms, norms) < 1e-10
    found = gradients(terms.penalty, net)
    assert relative_error(found, torch.cat([g.flatten() for g in expected.values()])) < 1e-10


@orders
@pytest.mark.parametrize("name", [*LAYERS, *IMAGE_LAYERS])
def test_derivatives_are_true(name, order):
    # the gradient of order k takes order k + 1: fused norms fail from k = 2 on
    net, x = net_with(name)
    assert_true(net, net, written_out(net), order, x)


@orders
def test_reached_by_functional_call(order):
    net, x = net_with("LayerNorm")
    params = dict(net.named_parameters())
    assert_true(lambda z: functional_call(net, params, (z,)), net, written_out(net), order, x)


FUNCTIONS = {
    "F.layer_norm": lambda h: F.layer_norm(h, (3,)),
    "torch.layer_norm": lambda h: torch.layer_norm(h, [3]),
    "torch.native_layer_norm": lambda h: torch.native_layer_norm(h, [3], None, None, 1e-5)[0],
    "F.batch_norm": lambda h: F.batch_norm(h, None, None, training=True),
    "torch.batch_norm": lambda h: torch.batch_norm(
        h, None, None, None, None, True, 0.1, 1e-5, True
    ),
    "torch.native_batch_norm": lambda h: torch.native_batch_norm(
        h, None, None, None, None, True, 0.1, 1e-5
    )[0],
    "F.instance_norm": lambda h: F.instance_norm(h[:, None])[:, 0],
    "torch.instance_norm": lambda h: torch.instance_norm(
        h[:, None], None, None, None, None, True, 0.1, 1e-5, True
    )[:, 0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_called_directly(name):
    first, x = nn.Linear(2, 3).double(), torch.randn(B, 2).double()
    dims = (0,) if "batch" in name else (1,)
    true = nn.Sequential(first, nn.Tanh(), Standardise(dims))
    assert_true(lambda z: FUNCTIONS[name](first(z).tanh()).sin().sum(1), first, true, 2, x)


class Standardise(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return oracles.standardised(x, self.dims).sin().sum(1)


class Encoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):  # [B, 2, 2]
        return self.layer(x).square().flatten(1) @ torch.arange(1.0, 5.0).double()


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_transformer_encoder_layer(order, training, norm_first):
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": norm_first}
    layer = nn.TransformerEncoderLayer(2, 1, 3, **options).double().train(training)
    net, x = Encoder(layer), torch.randn(2, 2, 2).double()
    true = copy.deepcopy(net)
    true.layer.norm1, true.layer.norm2 = ByHand(true.layer.norm1), ByHand(true.layer.norm2)
    with isolated(true, 0, x.device):  # of order 1: it chooses the attention only
        assert_true(net, net, true, order, x)


@pytest.mark.parametrize("layer", [nn.LayerNorm(3), nn.BatchNorm1d(3)], ids=["layer", "batch"])
def test_weight_penalty_of_order_2(layer):
    net = nn.Sequential(nn.Linear(2, 3), disturbed(layer), nn.Tanh(), nn.Linear(3, 1)).double()
    x, true = torch.randn(B, 2).double(), written_out(net)
    penalty = gpkit.weight_grad_norm(order=2, estimator="exact", weight=1.0)
    found = penalty(lambda: net(x).square().mean(), net)

    def expected(params):
        loss = lambda p: functional_call(true, p, (x,)).square().mean()  # noqa: E731
        return oracles.weight_norm(loss, params, 2).square().sum()

    params = {name: p.detach() for name, p in true.named_parameters()}
    assert relative_error(found, expected(params)) < 1e-10
    slope = torch.cat([g.flatten() for g in torch.func.grad(expected)(params).values()])
    assert relative_error(gradients(found, net), slope) < 1e-10


def kernels(f, *args, **options):
    """Return the names of the operations in the graph that a penalty differentiates."""
    seen = []

    def observed(x):
        y = f(x)
        seen.extend(node.name() for node in graph.nodes(y))
        return y

    gpkit.GradientPenalty(**options)(observed, *args)
    return seen


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d", "InstanceNorm2d"])
def test_order_1_keeps_the_fused_kernels(name):
    net, x = net_with(name)
    fused = ("NativeLayerNormBackward0", "NativeBatchNormBackward0")
    assert any(n in fused for n in kernels(net, x, order=1))
    assert not any(n in fused for n in kernels(net, x, order=2))
    assert not any(
        isinstance(m, elementary) for m in torch.overrides._get_current_function_mode_stack()
    )


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d"])
def test_penalized_module(name, order):
    net, x = net_with(name)
    y, true = torch.randn(B, 1).double(), written_out(copy.deepcopy(net))
    plain = copy.deepcopy(net)
    module = gpkit.PenalizedModule(net, nn.MSELoss(), gpkit.GradientPenalty(order=order))
    found = module.penalized_loss((x, y))

    def expected(params):
        f = partial(functional_call, true, params)
        squares = oracles.coupled_derivative(f, order, x).flatten(1).square().sum(1)
        return (f(x) - y).square().mean() + squares.mean()

    params = {name: p.detach() for name, p in true.named_parameters()}
    assert relative_error(found, expected(params)) < 1e-10
    slope = torch.cat([g.flatten() for g in torch.func.grad(expected)(params).values()])
    assert relative_error(gradients(found, net), slope) < 1e-10
    loss = F.mse_loss(plain(x), y)  # one update of the statistics, and at order 1 the same bits
    torch.testing.assert_close(net.state_dict(), plain.state_dict())
    if order == 1:
        module.penalties.parts.clear()
        assert torch.equal(module.penalized_loss((x, y)), loss)


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_compiled():
    eager, x = net_with("LayerNorm")
    eager.insert(3, nn.BatchNorm1d(3).double())
    y, compiled = torch.randn(B, 1).double(), copy.deepcopy(eager)
    for net in (eager, compiled):
        penalty = gpkit.GradientPenalty(order=2)
        module = gpkit.PenalizedModule(net, nn.MSELoss(), penalty, compile=net is compiled)
        for _ in range(2):  # the first step is an eager one
            net.zero_grad()
            module.penalized_loss((x, y)).backward()
    slopes = [[p.grad for p in net.parameters()] for net in (eager, compiled)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(eager.state_dict(), compiled.state_dict())


REFUSED = r"is wrong: give the penalty a callable \(gpkit then computes them in elementary"


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d", "InstanceNorm2d"])
def test_refuses_a_fused_graph(name):
    net, x = net_with(name)
    x.requires_grad_()
    gpkit.GradientPenalty(order=1)(net(x), x)
    with pytest.raises(RuntimeError, match=REFUSED):
        gpkit.GradientPenalty(order=2)(net(x), x)
    with pytest.raises(RuntimeError, match=REFUSED):
        gpkit.derivative(net(x), x, order=3)
    with elementary():
        y = net(x)
    expected = gpkit.GradientPenalty(order=3)(net, x)
    torch.testing.assert_close(gpkit.GradientPenalty(order=3)(y, x), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm1d"])
def test_refuses_a_fused_graph_that_holds_a_gradient(name):
    # one order is already taken in what the penalty is given
    net, x = net_with(name)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gpkit.GradientPenalty(order=1)(slope, x)
    gpkit.GradientPenalty(order=1).terms(slope, x)
