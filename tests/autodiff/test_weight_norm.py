"""Weight norm has right derivatives of every order; torch's second one takes ‖v‖ for a constant."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from releases import require
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gpkit
from gpkit.autodiff import compat
from gpkit.autodiff.derivatives import WRONG_TWICE, mended

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normed(dim):
    torch.manual_seed(0)
    body = parametrizations.weight_norm(nn.Linear(3, 5).double(), dim=dim)
    return nn.Sequential(body, nn.Tanh(), nn.Linear(5, 1).double())


def losses(params, dim):
    """Return the losses [4] of the net written out: W = g v / ‖v‖."""
    bias, g, v, w2, b2 = params
    others = [d for d in range(2) if dim is None or d != dim]
    w = g * v / (v * v).sum(others, keepdim=True) ** 0.5
    return (((X @ w.T + bias).tanh() @ w2.T + b2 - Y) ** 2)[:, 0]


def squared_norm(params, dim, order, rows):
    """Return ‖D^k mean loss‖², by torch.func."""
    sizes = [p.numel() for p in params]

    def loss(flat):
        pieces = zip(flat.split(sizes), params, strict=True)
        return losses([piece.reshape(p.shape) for piece, p in pieces], dim)[rows].mean()

    for _ in range(order):
        loss = torch.func.jacrev(loss)
    return loss(torch.cat([p.reshape(-1) for p in params])).square().sum()


def parameters(net):
    return [p.detach().clone().requires_grad_() for p in net.parameters()]


@pytest.mark.parametrize("kept", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(("scope", "order"), [("batch", 1), ("batch", 2), ("sample", 1)])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_weight_penalty_has_the_value_and_the_gradient(dim, scope, order, kept):
    net = normed(dim)

    def closure():
        h = checkpoint(net[0], X, use_reentrant=False) if kept else net[0](X)
        found = F.mse_loss(net[1:](h), Y, reduction="none")
        return found.mean() if scope == "batch" else found

    penalty = gpkit.GradientPenalty(wrt="weight", scope=scope, order=order, estimator="exact")
    groups = [slice(None)] if scope == "batch" else [slice(i, i + 1) for i in range(4)]
    params = parameters(net)
    expected = sum(squared_norm(params, dim, order, rows) for rows in groups) / len(groups)
    found = penalty(closure, net)
    assert found.item() == pytest.approx(expected.item(), rel=1e-10)
    grads = torch.autograd.grad(found, list(net.parameters()), allow_unused=True)
    truth = torch.autograd.grad(expected, params, allow_unused=True)
    for a, b in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_graph_of_ones_own_and_without_a_gradient_in_one_of_the_two():
    for frozen in ("original0", "original1", None):
        net = normed(0)
        kept = net[0].parametrizations.weight
        if frozen is not None:
            getattr(kept, frozen).requires_grad_(False)
        trained = [p for p in net.parameters() if p.requires_grad]
        penalty = gpkit.weight_grad_norm(weight=1.0)
        found = penalty(F.mse_loss(net(X), Y), net.parameters())
        flat = parameters(net)
        index = [i for i, p in enumerate(net.parameters()) if p.requires_grad]
        loss = losses(flat, 0).mean()
        grads = torch.autograd.grad(loss, [flat[i] for i in index], create_graph=True)
        expected = sum(g.square().sum() for g in grads)
        truth = torch.autograd.grad(expected, [flat[i] for i in index])
        for a, b in zip(torch.autograd.grad(found, trained), truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_derivative_of_one_weight():
    """v / |v| in one dimension: ∂W/∂v = 0, and at (3, 4) the second derivative of 5 v / ‖v‖."""
    v = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    g = torch.full((1, 1), 5.0, dtype=torch.float64)
    found = gpkit.derivative(torch._weight_norm(v, g, 0)[0, 0], v, order=2)[0, :, 0, :]
    x, y, r = 3.0, 4.0, 5.0  # of 5 x / r
    expected = 5 / r**5 * torch.tensor([[-3 * x * y**2, y * (2 * x**2 - y**2)]] * 2).double()
    expected[1] = 5 / r**5 * torch.tensor([y * (2 * x**2 - y**2), x * (2 * y**2 - x**2)])
    torch.testing.assert_close(found, expected)


def test_the_node_is_known_and_torch_is_still_wrong():
    """Where torch is right, `through_weight_norm` is of no use any more."""
    v, g = (torch.rand(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    w = torch._weight_norm(v, g, 0)
    there = compat.class_of(w.grad_fn) == WRONG_TWICE and compat.saved(w.grad_fn, "dim") == 0
    require(there, "class_of or saved", "weight penalties are wrong through weight norm")
    assert not torch.autograd.gradgradcheck(
        lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False
    )
    with mended(w):
        (grad,) = torch.autograd.grad(w.pow(3).sum(), v, create_graph=True)
    assert all(math.isfinite(x) for x in torch.autograd.grad(grad.sum(), v)[0].flatten())


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_a_weight_penalty_is_not_compiled():
    net = normed(0)
    module = gpkit.PenalizedModule(net, nn.MSELoss(), gpkit.weight_grad_norm(), compile=True)
    expected = gpkit.PenalizedModule(copy.deepcopy(net), nn.MSELoss(), gpkit.weight_grad_norm())
    with pytest.warns(UserWarning, match=r"not compiled: torch's second derivative of WeightNorm"):
        found = module.penalized_loss((X, Y))
    assert found == expected.penalized_loss((X, Y))
    other = gpkit.PenalizedModule(
        copy.deepcopy(net), nn.MSELoss(), gpkit.input_grad_norm(), compile=True
    )
    assert other.penalized_loss((X, Y)).isfinite()
