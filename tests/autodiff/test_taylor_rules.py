"""Taylor mode: its rules wherever it is used, for what is learned, rounded or hidden."""

import subprocess
import sys
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F

import gpkit

CODE = """
import gpkit, torch
x = torch.full((2, 1), 0.5)
print(gpkit.directional_derivative(torch.sin, x, torch.ones(2, 1), order=2).sum().item())
net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Tanh())
print(gpkit.r1(estimator=gpkit.taylor())(net, real=x).item() > 0)
"""


def test_a_process_that_imports_gpkit_alone_has_the_rules():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    value, acts = done.stdout.split()
    assert abs(float(value) + 2 * 0.479425538604203) < 1e-6  # -sin(1/2), twice
    assert acts == "True"


B = 5


def powers(x, p):
    return (x * x + 1) ** p


LEARNED = {
    "one exponent": lambda x, w: powers(x, w[0]),
    "an exponent each": powers,
    "exponents of more dimensions": lambda x, w: powers(x[:, 0], w[:, None]),
}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_exponent_gets_its_gradient(name):
    # No whole numbers: torch takes the derivative of x^p for zero at p = 0, for any gradient in p.
    f, w = LEARNED[name], torch.tensor([0.5, 1.5, 2.5, 3.5], dtype=torch.float64)
    x, v, mixed = torch.randn(3, B, 4, dtype=torch.float64).unbind()
    w.requires_grad_()

    def derivatives(along):
        d = along(lambda z: f(z, w), x, v)
        mix = mixed.flatten()[0] * torch.arange(d.numel(), dtype=d.dtype).reshape(d.shape)
        return d, torch.autograd.grad((d * mix).sum(), w)[0]

    for order in (1, 2, 3):
        found = derivatives(lambda f, x, v, k=order: gpkit.directional_derivative(f, x, v, k))
        true = derivatives(lambda f, x, v, k=order: oracles.along(f, k, x, v))
        torch.testing.assert_close(found, true)


@pytest.mark.parametrize("p", [3.5, 40.0, torch.tensor(2.0), torch.tensor([2.0, 3.0, 4.5])])
def test_a_power_at_zero(p):
    """p (p - 1) ... (wz)^(p-k) (wv)^k, where a recurrence divides zero by zero; and d/dw of it."""
    p = p.double() if isinstance(p, torch.Tensor) else p
    z, v = torch.tensor([[0.0, 0.4, 1.3], [0.7, 0.0, 0.0]]).double(), torch.rand(2, 3).double()
    w = (0.5 + torch.rand(3)).double().requires_grad_()
    for order in (1, 2):
        found = gpkit.directional_derivative(lambda z: (w * z) ** p, z, v, order)
        factor = p if order == 1 else p * (p - 1)
        slope = factor * z ** (p - order) * v**order
        torch.testing.assert_close(found, slope * w**p)
        (grad,) = torch.autograd.grad(found.square().sum(), w)
        expected = (2 * (slope * w**p) * slope * p * w ** (p - 1)).sum(0)
        torch.testing.assert_close(grad, expected.detach())
    third = gpkit.directional_derivative(lambda z: z**p, z, v, 3)
    assert third.isfinite().all()


def test_what_is_rounded_to_whole_numbers_is_a_constant():
    x, v = torch.randn(2, B, 4, dtype=torch.float64).unbind()
    found = gpkit.directional_derivative(lambda x: x * x * (3 * x).long() + x.bool(), x, v, 2)
    torch.testing.assert_close(found, 2 * v * v * (3 * x).long())


def test_logsigmoid_bends_far_out():
    x = torch.tensor([-30.0, -3.0], dtype=torch.float64)
    found = gpkit.directional_derivative(F.logsigmoid, x, torch.ones_like(x), 2)
    expected = -x.sigmoid() * (-x).sigmoid()
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.0)


IMAGES = {
    "bilinear": partial(F.interpolate, scale_factor=2, mode="bilinear"),
    "nearest": partial(F.interpolate, scale_factor=2),
    "reflected": partial(F.pad, pad=(1, 1, 1, 1), mode="reflect"),
    "replicated": partial(F.pad, pad=(1, 1, 1, 1), mode="replicate"),
    "shuffled": partial(F.pixel_unshuffle, downscale_factor=2),
    "repeated": lambda x: x.repeat(1, 2, 1, 1).cumsum(1),
    "triangles": lambda x: x.tril() + x.triu(1) ** 2 + torch.diag_embed(x.diagonal(0, 2, 3)),
    "windows": lambda x: F.unfold(x, 2).unsqueeze(1) * x.unfold(2, 2, 2).mean(),
    "chosen": lambda x: torch.where(torch.arange(4) > 1, x * x, -1.0),
}


@pytest.mark.parametrize("name", IMAGES)
def test_linear_layers_for_images(name):
    f = lambda x: IMAGES[name](x.sin()).exp()  # noqa: E731
    x, v = torch.randn(2, 2, 2, 4, 4, dtype=torch.float64).unbind()
    for order in (1, 3):
        found = gpkit.directional_derivative(f, x, v, order)
        torch.testing.assert_close(found, oracles.along(f, order, x, v))


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_what_hides_its_operations_is_refused():
    """Its forward is under no_grad, so that x³ looked constant: x + x³ was x."""
    x = torch.randn(B, 4)
    with pytest.raises(NotImplementedError, match=r"autograd.Function; got Cube: use estimator="):
        gpkit.directional_derivative(lambda x: x + Cube.apply(x), x, x, 1)
    with pytest.warns(DeprecationWarning, match="script"):
        net = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 1), torch.nn.Tanh()))
    for run in (
        lambda: gpkit.directional_derivative(net, x, x, 2),
        lambda: gpkit.curvature(estimator="taylor")(net, x),
    ):
        with pytest.raises(NotImplementedError, match="scripted module: give it the net from befo"):
            run()
    with pytest.raises(ValueError, match=r"floating-point numbers; got torch.int64: use x\.float"):
        gpkit.directional_derivative(torch.square, torch.arange(3), torch.ones(3))
    with pytest.raises(NotImplementedError, match=r"'fill_', as in y\[:, 0\] = x: make a new"):
        gpkit.directional_derivative(lambda x: x.sin().select(1, 0).fill_(1.0), x, x)
    with pytest.raises(NotImplementedError, match="'gt' is piecewise"):
        gpkit.directional_derivative(lambda x: torch.where(x > 0, x, 0.0), x, x, 2)
