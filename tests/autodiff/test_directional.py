"""Taylor mode: true derivatives along a direction, and refusals."""

from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F
from compare import gradients, relative_error
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkit.autodiff.taylor.rules  # noqa: F401  registers them
from gpkit.autodiff.taylor.directional import directional_derivative
from gpkit.autodiff.taylor.jets import RULES
from gpkit.autodiff.taylor.rules import PRODUCTS

B = 3


class Residual(nn.Module):
    """A residual net, in place where that is harmless."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x):
        h = self.b(self.a(x).sin())
        h += x
        return torch.cat([h / (1 + h**2), h[:, :1].exp(), torch.ones_like(h[:, 1:])], 1)


class Block(nn.Module):
    """A transformer block, whose norms are torch's or written out."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.qkv, self.out = norm, nn.Linear(4, 12), nn.Linear(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x):  # [B, 3, 4]
        heads = self.qkv(self.norm(x)).reshape(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.out(x + self.mlp(self.norm(x))).mean(1)


def standardised(x):
    return oracles.standardised(x, (-1,))


def mlp(act):
    return nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 4), act, nn.Linear(4, 2))


def conv(*layers):
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), *layers, nn.AvgPool2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(2, 2)
    ).eval()


# A net, another of the same parameters for the oracle if its norms are fused, and a sample's shape.
NETS = {
    "tanh": (mlp(nn.Tanh()), None, (4,)),
    "gelu": (mlp(nn.GELU()), None, (4,)),
    "gelu, approximate": (mlp(nn.GELU("tanh")), None, (4,)),
    "silu": (mlp(nn.SiLU()), None, (4,)),
    "softplus": (mlp(nn.Softplus(2.0)), None, (4,)),
    "sigmoid": (mlp(nn.Sigmoid()), None, (4,)),
    "softmax": (mlp(nn.Softmax(1)), None, (4,)),
    "residual": (Residual(), None, (4,)),
    "convolutional": (conv(nn.SiLU()), None, (1, 3, 3)),
    "convolutional, batch norm": (conv(nn.BatchNorm2d(2), nn.Tanh()), None, (1, 3, 3)),
    "transformer": (Block(nn.LayerNorm(4, elementwise_affine=False)), Block(standardised), (3, 4)),
}


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NETS)
def test_nets(name, order):
    net, true, shape = NETS[name]
    net, true = net.double(), (true or net).double()
    x, v = torch.randn(2, B, *shape).double().unbind()
    found = directional_derivative(net, x, v, order)
    mixed = torch.randn_like(found)
    params = {n: p.detach() for n, p in net.named_parameters()}

    def expected(params):
        with sdpa_kernel(SDPBackend.MATH):
            d = oracles.along(partial(functional_call, true, params), order, x, v)
        return (mixed * d).sum(), d

    slope, d = torch.func.grad(expected, has_aux=True)(params)
    assert relative_error(found, d) < 1e-10
    slope = torch.cat([g.flatten() for g in slope.values()])
    assert relative_error(gradients((mixed * found).sum(), net), slope) < 1e-10


def test_group_norm():
    net = nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.Tanh()).double()
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    nn.init.uniform_(net[1].bias, 0.5, 2.0)
    x, v = torch.randn(2, B, 4, 3).double().unbind()

    def written(x):
        h = oracles.standardised(net[0](x).reshape(B, 2, 6), (2,)).reshape(B, 4, 3)
        return torch.tanh(h * net[1].weight[:, None] + net[1].bias[:, None])

    for order in (1, 3):
        found = directional_derivative(net, x, v, order)
        assert relative_error(found, oracles.along(written, order, x, v)) < 1e-10


A = torch.randn(4, 3).double()


FUNCTIONS = {
    "exp": torch.exp,
    "log": lambda x: (x * x + 1).log(),
    "log1p, expm1": lambda x: torch.log1p(x * x) * torch.expm1(x),
    "sqrt": lambda x: (x**2 + 1).sqrt(),
    "rsqrt": lambda x: (x**2 + 1).rsqrt(),
    "pow": lambda x: x**5 + (x * x + 1) ** -2 + (x * x + 1) ** 1.5,
    "constant base": lambda x: 2.0**x,
    "sin, cos": lambda x: x.sin() * x.cos(),
    "erf": torch.erf,
    "quotients": lambda x: (1 - x) / (x**2 + 2) + 3 / (x**2 + 1) + x / 7,
    "mish": F.mish,
    "logsigmoid": F.logsigmoid,
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "mse_loss": lambda x: F.mse_loss(x.exp(), A.T[:, :4].exp(), reduction="none"),
    "cross_entropy": lambda x: F.cross_entropy(x.exp(), torch.tensor([0, 3, 1]), reduction="none"),
    "logsumexp": lambda x: x.logsumexp(1),
    "std": lambda x: x.std(1) + x.var(1, correction=0),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "matmul": lambda x: x.sin() @ A @ (A.T @ x.T),
    "einsum": lambda x: torch.einsum("bi,bj,ik->bjk", x, x.tanh(), A),
    "bmm": lambda x: torch.bmm(x[:, :, None].exp(), x[:, None]),
    "indexing": lambda x: torch.stack([x[:, [2, 0]], x[:, 1:3]], 1).squeeze(2).unsqueeze(0).exp(),
    "sums": lambda x: x.exp().sum(1, keepdim=True) * x.sin().mean() - x,
    "a constant of more dimensions": lambda x: (x.sin() + torch.ones(2, 1, 4).double()) ** 2,
    "detach": lambda x: x.detach() * x.sin() + x.data,
    "piecewise padding": lambda x: F.pad(x.exp(), (1, 1), value=3.0) ** 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    f = FUNCTIONS[name]
    x, v = torch.randn(2, B, 4).double().unbind()
    if name == "detach":  # torch.func does not see a cut; its value there is a constant

        def f_true(z):
            return x * z.sin() + x
    else:
        f_true = f
    for order in (1, 2, 4):
        true = oracles.along(f_true, order, x, v)
        found = directional_derivative(f, x, v, order)
        assert found.shape == true.shape
        assert relative_error(found, true) < 1e-10


def test_softplus_past_its_threshold_is_linear_as_torchs():
    x = torch.tensor([19.0, 21.0]).double()
    found = directional_derivative(F.softplus, x, torch.ones(2).double(), 2)
    assert found[0] > 1e-9
    assert found[1] == 0


def test_differentiable_in_the_point_and_the_direction():
    x, v = (torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    net = mlp(nn.Tanh()).double()
    assert torch.autograd.gradcheck(
        lambda x, v: directional_derivative(net, x, v, 3), (x, v), fast_mode=True
    )


def test_several_inputs():
    x, y, v, w = torch.randn(4, B, 2).double().unbind()
    f = lambda x, y: (x * y.sin()).sum(1)  # noqa: E731
    found = directional_derivative(f, (x, y), (v, w), 2)
    assert relative_error(found, (2 * v * w * y.cos() - x * w**2 * y.sin()).sum(1)) < 1e-12


def test_cost_is_polynomial_in_the_order(monkeypatch):
    products, ruled = [], RULES["mm"]

    def counted(func, a, b):
        return ruled(lambda p, q: products.append(p) or func(p, q), a, b)

    def counted_layer(a, b):
        products.append(a)
        return torch.mm(a, b)

    monkeypatch.setitem(RULES, "mm", counted)
    monkeypatch.setitem(PRODUCTS, "addmm", counted_layer)
    x = torch.randn(B, 4)
    for order in range(1, 9):
        directional_derivative(mlp(nn.Tanh()), x, x, order)
        # A layer's weight is a constant, and a_0 takes the bias; x + t v has two coefficients.
        assert len(products) == 1 + 2 * order
        products.clear()
        directional_derivative(lambda x: x.sin() @ x.cos().T, x, x, order)
        assert len(products) == (order + 1) * (order + 2) / 2
        products.clear()


def test_what_does_not_depend_on_the_point_vanishes():
    x = torch.randn(B, 4)

    def cut(x):
        with torch.no_grad():
            h = x.sin()
        return h * x

    for f in (lambda x: torch.ones(B), lambda x: x.detach() ** 3, cut):
        assert not directional_derivative(f, x, x, 2).any()
    with torch.no_grad():  # outside of the function it only asks for no graph
        d = directional_derivative(torch.sin, x, torch.ones_like(x), 2)
    torch.testing.assert_close(d, -x.sin())
    assert not directional_derivative(nn.Linear(4, 1), x, x, 2).any()


def view_of_what_is_written_to(x):
    h = x.sin()
    first = h[:, 0]
    h += 1
    return first


REFUSED = {
    "'relu' is piecewise": nn.ReLU(),
    "'leaky_relu' is piecewise": nn.LeakyReLU(),
    "'abs' is piecewise": torch.abs,
    "'amax' is piecewise": lambda x: x.amax(1),
    "'clamp_min' is piecewise": lambda x: x.clamp_min(0),
    "no rule for the operation 'atan'": torch.atan,
    "in-place operation 'add_' on a view": view_of_what_is_written_to,
    "in-place operation 'mul_' .* or a constant": lambda x: torch.ones_like(x).mul_(x),
    "operation 'copy_'": lambda x: torch.zeros_like(x).index_fill(0, torch.tensor([0]), 1).copy_(x),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refuses_an_operation_by_name(said):
    x = torch.randn(B, 4)
    with pytest.raises(NotImplementedError, match=said):
        directional_derivative(REFUSED[said], x, x, 2)


@pytest.mark.parametrize("f", [F.relu, torch.abs, partial(F.leaky_relu, negative_slope=0.2)])
def test_piecewise_linear_functions_at_order_1(f):
    x, v = torch.randn(2, B, 4).double().unbind()
    found = directional_derivative(f, x, v, 1)
    torch.testing.assert_close(found, oracles.along(f, 1, x, v))


def test_refuses_arguments():
    x = torch.randn(B, 4)
    with pytest.raises(ValueError, match="needs v in the shape of x; got x"):
        directional_derivative(torch.sin, x, x[:1])
    with pytest.raises(ValueError, match="must be an integer >= 1; got 0"):
        directional_derivative(torch.sin, x, x, 0)
    with pytest.raises(TypeError, match="must return a tensor; got a tuple"):
        directional_derivative(lambda x: (x, x), x, x)
