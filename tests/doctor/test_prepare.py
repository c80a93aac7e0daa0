"""`gpkit.prepare`: the same function, with derivatives of every order that is asked for."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gpkit
from gpkit.doctor.prepare import Bag, HardSigmoid

DOUBLE = torch.float64


def second(f, x, h=1e-5):
    """Return the derivative of Σ (∂f/∂x)² along a direction, by double backprop and by steps."""
    d = torch.randn(x.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))

    def squared(x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return (g**2).sum(), x

    value, x = squared(x)
    (slope,) = torch.autograd.grad(value, x)
    steps = squared(x + h * d)[0] - squared(x - h * d)[0]
    return (slope * d).sum().item(), steps.item() / (2 * h)


def equal(net, made, *args, rtol=0.0):
    """The outputs and the gradients in the parameters are the same."""
    outputs, grads = [], []
    for module in (net, made):
        y = module(*(a.clone() for a in args))
        outputs.append(y)
        params = dict(module.named_parameters())
        weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
        found = torch.autograd.grad((y * weights).sum(), list(params.values()))
        grads.append(dict(zip(params, found, strict=True)))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-15)
    assert grads[0].keys() == grads[1].keys()
    for name, g in grads[0].items():
        torch.testing.assert_close(grads[1][name], g, rtol=rtol, atol=1e-13)


def test_hardsigmoid():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Hardsigmoid(), nn.Linear(8, 1)).double()
    made = gpkit.prepare(net)
    assert made.prepared == {"1": "Hardsigmoid: in differentiable operations"}
    x = 4 * torch.randn(16, 3, dtype=DOUBLE)
    equal(net, made, x, rtol=1e-7)  # torch's own gradient has 1/6 in float32
    e = torch.linspace(-5, 5, 101, dtype=DOUBLE)
    assert torch.equal(HardSigmoid()(e), F.hardsigmoid(e))
    slope, steps = second(lambda x: made(x) ** 2, x)
    assert slope == pytest.approx(steps, rel=1e-6)
    assert slope != 0
    assert type(net[1]) is nn.Hardsigmoid  # the net is not changed
    made.load_state_dict(net.state_dict())
    assert not gpkit.diagnose(net, gpkit.r1(), x, costs=False).ok
    assert gpkit.diagnose(made, gpkit.r1(), x, costs=False).ok


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_bag(mode, padding):
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding, dtype=DOUBLE)
    made = gpkit.prepare(nn.Sequential(bag))[0]
    assert isinstance(made, Bag)
    x = torch.randint(7, (5, 3))
    x[0] = 0  # a bag of the padding index alone
    equal(bag, made, x)
    flat, offsets = torch.randint(7, (9,)), torch.tensor([0, 2, 2, 5])  # the second bag is empty
    equal(bag, made, flat, offsets)
    if mode == "sum":
        w = torch.rand(5, 3, dtype=DOUBLE)
        torch.testing.assert_close(made(x, None, w), bag(x, None, w), rtol=0, atol=1e-15)
    assert set(made.state_dict()) == set(bag.state_dict())
    head = nn.Linear(4, 1, dtype=DOUBLE)
    loss = head(made(x).tanh()).square().mean()
    gpkit.weight_grad_norm()(loss, [made.weight, head.weight]).backward()
    assert made.weight.grad.any()


def test_inplace_layers_and_shared_ones():
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(relu, nn.Linear(3, 3), relu, nn.Dropout(0.5, inplace=True)).double()
    made = gpkit.prepare(net)
    assert made.prepared["0"] == "ReLU: inplace=False"
    assert made[0] is made[2]
    assert not made[3].inplace
    assert net[3].inplace
    x = torch.randn(5, 3, dtype=DOUBLE)
    equal(net.eval(), made.eval(), x)
    before = x.clone()
    made(x)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="in-place"):
        net(x.requires_grad_())


def by_hand(layer, x):
    """Return one head of self-attention, in matrix products."""
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.out_proj(weights @ v)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0].sum((1, 2))


def test_attention_in_a_graph_of_the_users_own():
    torch.manual_seed(0)
    net = Attention().double()
    made = gpkit.prepare(net)
    assert made.prepared == {"": "MultiheadAttention: on kernels that have a double backward"}
    x = torch.randn(3, 5, 4, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(RuntimeError, match="fused attention has no double backward"):
        gpkit.r1()(net(x), x)
    flags = torch.backends.cuda.flash_sdp_enabled()
    penalty = gpkit.r1()(made(x), x)
    params = list(made.parameters())
    found = torch.autograd.grad(penalty, params, allow_unused=True, materialize_grads=True)
    (g,) = torch.autograd.grad(by_hand(made.layer, x).sum(), x, create_graph=True)
    value = 5 * g.flatten(1).square().sum(1).mean()
    torch.testing.assert_close(penalty, value, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    with pytest.raises(AssertionError):
        made(torch.zeros(1, 2, 3, dtype=DOUBLE))  # the kernels are back after an error too
    assert torch.backends.cuda.flash_sdp_enabled() == flags
    again = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    torch.testing.assert_close(gpkit.r1()(again(x), x), penalty)


def test_norm_layers_at_order_two():
    """Their third derivative is torch's own, and wrong, unless they are prepared for it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(RuntimeError, match="third derivative of layer norm"):
        gpkit.curvature()(net(x), x)
    made = gpkit.prepare(net, order=2)
    penalty = gpkit.curvature()(made(x), x)
    torch.testing.assert_close(penalty, gpkit.curvature()(net, x))


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo
def test_compiled_modules():
    penalty = gpkit.r1(of=lambda y: y.sum(1))

    def compiled(backend):
        net = nn.Sequential(nn.Linear(3, 4), torch.compile(nn.Linear(4, 4), backend=backend))
        net[0].compile(backend=backend)
        report = gpkit.diagnose(net, penalty, torch.randn(5, 3), costs=False)
        return net, {f.module for f in report.errors if f.code == "compiled"}, report.ok

    assert compiled("aot_eager")[1:] == ({"0", "1"}, False)
    net, *found = compiled("eager")  # torch's own operations, which have a double backward
    assert found == [set(), True]
    penalty(net, torch.randn(5, 3)).backward()
    made = gpkit.prepare(net)
    assert made.prepared == {"0": "Linear: uncompiled", "1": "OptimizedModule: uncompiled"}
    assert type(made[1]) is nn.Linear
    x = torch.randn(5, 3)
    torch.testing.assert_close(net(x), made(x), rtol=0, atol=0)
    report = gpkit.diagnose(made, penalty, torch.randn(5, 3), costs=False)
    assert report.ok, str(report)


def test_nothing_to_do_and_nonsense():
    assert gpkit.prepare(nn.Linear(2, 1)).prepared == {}
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got a function"):
        gpkit.prepare(lambda x: x)
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        gpkit.prepare(nn.Linear(2, 1), order=0)
