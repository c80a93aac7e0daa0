"""Norms and their dual directions, over rows and over whole lists of tensors."""

import pytest
import torch

from gpkit.autodiff.numerics import SMALL, dual, over_all, over_rows, root, squared_length

ORDS = {"l2": 2, "l1": 1, "linf": torch.inf}
NORMS = pytest.mark.parametrize("norm", ORDS)


@NORMS
def test_the_dual_direction_is_the_gradient_of_the_norm(norm):
    """torch's own gradient of the norm is the oracle; it spreads over entries that tie, too."""
    parts = [torch.tensor([[3.0, -4.0]]), torch.tensor([1.0, 4.0, 0.5])]  # -4 and 4 tie
    parts = [part.double().requires_grad_() for part in parts]
    whole = torch.cat([part.flatten() for part in parts])
    true = torch.linalg.vector_norm(whole, ORDS[norm])
    if norm == "linf":
        true = whole.abs().amax()  # vector_norm has no gradient where entries tie
    expected = torch.autograd.grad(true, parts)
    n, directions = dual([part.detach() for part in parts], norm)
    torch.testing.assert_close(n, true.detach())
    torch.testing.assert_close(tuple(directions), expected)


@NORMS
def test_rows_are_groups_of_their_own(norm):
    rows = [torch.randn(4, 3).double(), torch.randn(4, 2).double()]
    n, directions = dual(rows, norm, over_rows)
    assert n.shape == (4, 1)
    for g in range(4):
        alone, along = dual([row[g] for row in rows], norm)
        torch.testing.assert_close(n[g, 0], alone)
        torch.testing.assert_close([v[g] for v in directions], along)


@NORMS
def test_a_zero_gradient_has_a_zero_direction(norm):
    for over in (over_all, over_rows):
        n, (v,) = dual([torch.zeros(2, 3)], norm, over)
        assert not n.any()
        assert not v.any()


@NORMS
def test_nan_is_not_masked(norm):
    n, _ = dual([torch.tensor([1.0, torch.nan])], norm)
    assert n.isnan()


def test_half_precision_is_summed_in_float32():
    n, (v,) = dual([torch.full((70000,), 1.0, dtype=torch.float16)], "l2")  # 70000 > 65504
    assert n.item() == pytest.approx(70000**0.5)
    assert v.dtype == torch.float32


def test_the_root_has_a_finite_gradient_at_zero_and_keeps_nan():
    n2 = torch.tensor([0.0, 4.0, torch.nan], requires_grad=True)
    (slope,) = torch.autograd.grad(root(n2)[:2].sum(), n2)
    assert slope.tolist()[:2] == [0.0, 0.25]
    assert root(n2)[2].isnan()


def test_the_squared_length_of_large_tensors_and_its_derivatives_are_those_of_the_sum():
    """Also one that is differentiated twice, has no dimensions, or is zero."""
    whole = torch.randn(SMALL + 1, generator=torch.Generator().manual_seed(0)).double()
    parts = [whole.requires_grad_(), torch.tensor(2.0).double().requires_grad_()]
    parts.append(torch.zeros(3).double().requires_grad_())
    for power in (1, 2):
        n2 = squared_length(tuple(parts)) ** power
        true = sum((p**2).sum() for p in parts) ** power
        torch.testing.assert_close(n2, true.reshape(1))
        grads = torch.autograd.grad(n2, parts, create_graph=True)
        torch.testing.assert_close(grads, torch.autograd.grad(true, parts, create_graph=True))
        twice = torch.autograd.grad((grads[0] ** 3).sum(), parts)
        sums = torch.autograd.grad(true, parts, create_graph=True)[0]
        torch.testing.assert_close(twice, torch.autograd.grad((sums**3).sum(), parts))
