"""Activations and normalisations of torch.nn have finite, right penalties on points up to ±1e4.

The oracle is mpmath, with sixty digits: f' and f'' of each activation from its own formula.
"""

import mpmath as mp
import pytest
import torch
from torch import nn

import gpkit

POINTS = [s * x for x in (0.3, 1.7, 5.0, 21.0, 89.0, 100.0, 800.0, 1e4) for s in (1, -1)]


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def softplus(x):
    return x + mp.log1p(mp.exp(-x)) if x > 0 else mp.log1p(mp.exp(x))


def elu(x, alpha=1, over=1):
    return x if x > 0 else alpha * mp.expm1(x / over)


def gelu_tanh(x):
    return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)))


SCALE, ALPHA = (
    mp.mpf("1.0507009873554804934193349852946"),
    mp.mpf("1.6732632423543772848170429916717"),
)

ACTIVATIONS = {
    "ELU": (nn.ELU(), elu),
    "CELU": (nn.CELU(2.0), lambda x: elu(x, 2, 2)),
    "SELU": (nn.SELU(), lambda x: SCALE * elu(x, ALPHA)),
    "GELU": (nn.GELU(), lambda x: x * mp.ncdf(x)),
    "GELU(tanh)": (nn.GELU("tanh"), gelu_tanh),
    "SiLU": (nn.SiLU(), lambda x: x * sigmoid(x)),
    "Mish": (nn.Mish(), lambda x: x * mp.tanh(softplus(x))),
    "Sigmoid": (nn.Sigmoid(), sigmoid),
    "LogSigmoid": (nn.LogSigmoid(), lambda x: -softplus(-x)),
    "Softplus": (nn.Softplus(), lambda x: x if x > 20 else softplus(x)),
    "Softsign": (nn.Softsign(), lambda x: x / (1 + abs(x))),
    "Tanh": (nn.Tanh(), mp.tanh),
    "Tanhshrink": (nn.Tanhshrink(), lambda x: x - mp.tanh(x)),
    "Hardtanh": (nn.Hardtanh(), lambda x: min(max(x, -1), 1)),
    "Hardswish": (nn.Hardswish(), lambda x: x * min(max(x + 3, 0), 6) / 6),
    "Hardshrink": (nn.Hardshrink(), lambda x: x if abs(x) > 0.5 else mp.mpf(0)),
    "Softshrink": (nn.Softshrink(), lambda x: mp.sign(x) * max(abs(x) - mp.mpf("0.5"), 0)),
    "LeakyReLU": (nn.LeakyReLU(0.25), lambda x: x if x > 0 else x / 4),
    "PReLU": (nn.PReLU(), lambda x: x if x > 0 else x / 4),
    "ReLU": (nn.ReLU(), lambda x: max(x, mp.mpf(0))),
    "ReLU6": (nn.ReLU6(), lambda x: min(max(x, 0), 6)),
    "RReLU": (nn.RReLU(0.25, 0.25).eval(), lambda x: x if x > 0 else x / 4),
    "Threshold": (nn.Threshold(0.1, 0.0), lambda x: x if x > 0.1 else mp.mpf(0)),
}


def truth(f, x):
    """Return (w f'(wx))² and its derivative in w, at w = 1, as floats."""
    with mp.workdps(60):
        x = mp.mpf(x)
        first, second = mp.diff(f, x), mp.diff(f, x, 2)
        return float(first**2), float(2 * first * (first + x * second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_penalty_on_a_slope_and_its_gradient(name, dtype):
    act, formula = ACTIVATIONS[name]
    act = act.to(dtype)
    x = torch.tensor(POINTS, dtype=dtype)[:, None]
    # a weight of its own for each point: a sum would hide a small error
    w = torch.ones(len(x), 1, dtype=dtype, requires_grad=True)
    values = gpkit.GradientPenalty().terms(lambda z: act(w * z), x).values
    values.sum().backward()
    expected = [truth(formula, float(point)) for point in x]
    slopes, grads = (torch.tensor(part, dtype=dtype) for part in zip(*expected, strict=True))
    assert values.isfinite().all()
    assert w.grad.isfinite().all()
    # near a saturated tail the slope is a difference of numbers near one
    rtol, atol = (1e-4, 2e-5) if dtype == torch.float32 else (1e-9, 1e-12)
    torch.testing.assert_close(values.detach(), slopes, rtol=rtol, atol=atol)
    torch.testing.assert_close(w.grad[:, 0], grads, rtol=rtol, atol=atol)


NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6),
    "GroupNorm": lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.GroupNorm(2, 2), nn.Flatten()),
    "InstanceNorm1d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "BatchNorm1d, eval": lambda: nn.BatchNorm1d(6).eval(),
    "LocalResponseNorm": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.LocalResponseNorm(3), nn.Flatten()
    ),
    "Softmax": lambda: nn.Softmax(1),
    "Softmin": lambda: nn.Softmin(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "GLU": lambda: nn.GLU(1),
}


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("name", NORMS)
def test_normalisations_are_finite_and_as_in_higher_precision(name, scale):
    torch.manual_seed(0)
    layer = NORMS[name]()
    x = torch.randn(4, 6, dtype=torch.float64) * scale
    found = []
    for dtype in (torch.float32, torch.float64):
        part = layer.to(dtype)
        w = torch.ones(6, dtype=dtype, requires_grad=True)
        value = gpkit.GradientPenalty()(lambda z, part=part, w=w: part(w * z), x.to(dtype))
        (grad,) = torch.autograd.grad(value, w)
        assert value.isfinite()
        assert grad.isfinite().all()
        found.append((value.detach().double(), grad.double()))

    def formula(w):  # by forward mode over reverse mode, in float64
        jacobians = torch.func.vmap(torch.func.jacrev(lambda z: layer(w * z[None])[0]))(x)
        return jacobians.square().sum((1, 2)).mean()

    true, slope = formula(torch.ones(6).double()), torch.func.grad(formula)(torch.ones(6).double())
    torch.testing.assert_close(found[1][0], true, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(found[1][1], slope, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found[0][0], true, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found[0][1], slope, rtol=2e-2, atol=1e-5)
