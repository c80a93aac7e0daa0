"""The k-th derivative: known answers, all mixed partials, zeros, differentiability, refusals."""

import oracles
import pytest
import torch
from compare import relative_error
from torch import nn
from torch.func import functional_call

from gpkit import derivative

B = 3
orders = pytest.mark.parametrize("order", [1, 2, 3, 4])
SPELLINGS = {
    "2*x**3": lambda x: 2 * x**3,
    "2*x*x*x": lambda x: 2 * x * x * x,
    "2*x.pow(3)": lambda x: 2 * x.pow(3),
    "x*x*(x+x)": lambda x: x * x * (x + x),
}


def net(n):
    return nn.Sequential(nn.Flatten(), nn.Linear(n, 4), nn.Tanh(), nn.Linear(4, 1)).double()


@pytest.mark.parametrize("f", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize(
    ("order", "true"), [(1, 24.0), (2, -24.0), (3, 12.0), (4, 0.0), (5, 0.0), (6, 0.0)]
)
def test_polynomial_however_it_is_written(f, order, true):
    x = torch.tensor(-2.0, requires_grad=True)
    d = derivative(f(x), x, order=order)
    assert d.shape == ()
    assert d == true
    xs = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    factor = {1: 6 * xs**2, 2: 12 * xs, 3: 12 + 0 * xs}.get(order, 0 * xs)
    assert torch.equal(derivative(f(xs), xs, order=order), factor)


def test_quadratic_form():
    A = torch.randn(4, 4, dtype=torch.float64)
    x = torch.randn(B, 4, dtype=torch.float64, requires_grad=True)
    y = torch.einsum("bi,ij,bj->b", x, A, x)
    torch.testing.assert_close(derivative(y, x, 1), x @ (A + A.T))
    torch.testing.assert_close(derivative(y, x, 2), (A + A.T).expand(B, 4, 4))
    assert torch.equal(derivative(y, x, 3), torch.zeros(B, 4, 4, 4, dtype=torch.float64))


def test_tanh_ridge_closed_form():
    W, u, x = (torch.randn(*s, dtype=torch.float64) for s in ((6, 3), (6,), (B, 3)))
    x.requires_grad_()
    y, gradient, hessian = oracles.tanh_ridge(W, u, x)
    assert relative_error(derivative(y, x, 1), gradient) < 1e-12
    assert relative_error(derivative(y, x, 2), hessian) < 1e-12


@orders
@pytest.mark.parametrize("shape", [(3,), (2, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize("column", [False, True])
def test_all_mixed_partials(order, shape, column):
    # catches samples that are summed, indices in another order, and partials that are left out
    x = torch.randn(B, *shape, dtype=torch.float64, requires_grad=True)
    f = net(x[0].numel())
    d = derivative(f(x) if column else f(x).squeeze(1), x, order)
    true = oracles.derivative(lambda z: f(z[None])[0, 0], order, x.detach())
    assert d.shape == (B, *shape * order)
    assert relative_error(d, true) < 1e-10


@orders
def test_batch_of_scalars_and_single_number(order):
    x = torch.randn(B, dtype=torch.float64, requires_grad=True)
    cycle = [torch.cos(x), -torch.sin(x), -torch.cos(x), torch.sin(x)]
    torch.testing.assert_close(derivative(torch.sin(x), x, order), cycle[order - 1])
    whole = derivative(torch.sin(x).sum(), x, order)  # y []: x is one sample
    assert whole.shape == (B,) * order
    index = [torch.arange(B)] * order
    true = torch.zeros_like(whole).index_put(index, cycle[order - 1])
    torch.testing.assert_close(whole, true)


@orders
@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.ones(B),
        lambda x: torch.ones(B, requires_grad=True) * 2,  # a graph, without x in it
        lambda x: x.detach().sum(1),
        lambda x: (x * 0).sum(1),
        lambda x: (x.sum(1) > 0).float(),
    ],
    ids=["constant", "unused", "detached", "times zero", "step"],
)
def test_vanishing_derivatives_are_zeros(order, f):
    x = torch.randn(B, 2, requires_grad=True)
    assert torch.equal(derivative(f(x), x, order), torch.zeros(B, *[2] * order))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_differentiable_in_parameters_and_inputs(order):
    # catches a forgotten create_graph at any level
    f, x = net(2), torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in f.named_parameters()]

    def d(x, *params):
        return derivative(functional_call(f, dict(zip(names, params, strict=True)), (x,)), x, order)

    assert torch.autograd.gradcheck(d, (x, *f.parameters()), fast_mode=True)
    if order < 3:
        assert torch.autograd.gradgradcheck(d, (x, *f.parameters()), fast_mode=True)


def test_no_side_effects():
    f, x = net(2), torch.randn(B, 2, dtype=torch.float64, requires_grad=True)
    derivative(f(x), x, 2)
    assert x.grad is None
    assert all(p.grad is None for p in f.parameters())


@pytest.mark.parametrize("f", [nn.ReLU(), nn.LeakyReLU(0.1), nn.Hardtanh(-9, 9), torch.abs])
def test_piecewise_linear(f):
    x = torch.tensor([[-2.0, 3.0], [5.0, -1.0]], requires_grad=True)
    slope = f(x.sign()) * x.sign()
    torch.testing.assert_close(derivative(f(x).sum(1), x, 1), slope)
    for order in (2, 3, 4):
        assert torch.equal(derivative(f(x).sum(1), x, order), torch.zeros(2, *[2] * order))


def test_an_operation_without_a_second_derivative():
    x = torch.zeros(B, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):
        derivative(nn.functional.hardsigmoid(x).sum(1), x, 2)


@pytest.mark.parametrize("order", [0, -1, 1.0, True, "2"])
def test_refuses_order(order):
    x = torch.zeros(B, requires_grad=True)
    with pytest.raises(ValueError, match=r"`derivative\(order=...\)` must be an integer >= 1"):
        derivative(x, x, order)


@pytest.mark.parametrize(
    ("y", "x"), [((B, 2), (B, 2)), ((2,), (B, 2)), ((1, B), (B, 2)), ((B,), ())], ids=str
)
def test_refuses_shapes(y, x):
    x = torch.zeros(x, requires_grad=True)
    with pytest.raises(ValueError, match=r"needs y \[B\] or \[B, 1\] for an x \[B, ...\]"):
        derivative(torch.zeros(y), x)


def test_refuses_x_without_grad():
    x = torch.zeros(B)
    with pytest.raises(ValueError, match=r"call x.requires_grad_\(\) before y is computed"):
        derivative(x, x)


def test_refuses_a_tensor_out_of_reach():
    x = torch.zeros(B, 101, requires_grad=True)
    with pytest.raises(ValueError, match="takes 10201 backward passes, over the limit of 10000"):
        derivative(x.sum(1), x, 3)
