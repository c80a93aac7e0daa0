"""Central differences along the axes: polynomials, images, and a net whose gradient jumps."""

import pytest
import torch
from forwards import IMAGES, conv, draw
from torch import nn

import gpkit


@pytest.mark.parametrize(("taps", "degree"), [(2, 2), (4, 4)])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_a_stencil_is_exact_for_polynomials(taps, degree, norm):
    a, x, g = draw(3).requires_grad_(), draw(5, 3), draw(5, 3)
    f = lambda x: (a * x**degree).sum(1)  # noqa: E731
    penalty = gpkit.GradientPenalty(form=gpkit.norm(norm=norm), estimator=gpkit.stencil(0.3, taps))
    value = penalty(f, x, target=g, metric=2.0)
    e = 2 * (degree * a * x ** (degree - 1) - g)
    n = {"l2": e.norm(dim=1), "l1": e.abs().sum(1), "linf": e.abs().amax(1)}[norm].mean()
    torch.testing.assert_close(value, n)
    torch.testing.assert_close(torch.autograd.grad(value, a)[0], torch.autograd.grad(n, a)[0])


def test_a_stencil_of_a_cubic_function_and_its_schedule():
    """(3x² + h²)² with 2 taps, h of the optimiser step."""
    x = draw(4, 1)
    penalty = gpkit.GradientPenalty(estimator=gpkit.stencil(lambda step: 0.8 / 2**step))
    for h in (0.8, 0.4, 0.2):
        wanted = (3 * x**2 + h**2).square().mean()
        torch.testing.assert_close(penalty.terms(lambda x: (x**3).sum(1), x).reduced, wanted)
        torch.testing.assert_close(penalty(lambda x: (x**3).sum(1), x), wanted)
    torch.testing.assert_close(
        penalty(lambda x: (x**3).sum(1), x, step=4), (3 * x**2 + 0.05**2).square().mean()
    )


def test_a_stencil_of_images_patches_and_several_inputs():
    net = conv()
    net[-1] = nn.Linear(27, 2).double()
    exact = gpkit.GradientPenalty().terms(net, IMAGES)
    found = gpkit.GradientPenalty(estimator=gpkit.stencil(1e-3, 4)).terms(net, IMAGES)
    torch.testing.assert_close(found.norms, exact.norms, rtol=1e-8, atol=0)
    for parts in ({"scope": "pixel", "of": lambda y: y[:, 0]}, {"form": gpkit.squared(norm="l1")}):
        exact = gpkit.GradientPenalty(**parts).terms(net, IMAGES)
        found = gpkit.GradientPenalty(estimator=gpkit.stencil(1e-3, 4), **parts).terms(net, IMAGES)
        torch.testing.assert_close(found.norms, exact.norms, rtol=1e-8, atol=0)
    pair = draw(4, 2), draw(4, 3)
    f = lambda x, c: (x.sum(1) * c.square().sum(1)).sin()  # noqa: E731
    exact = gpkit.GradientPenalty().terms(f, pair)
    for estimator in (gpkit.stencil(1e-3, 4), gpkit.jvp(1000), gpkit.random_difference(1e-3, 4000)):
        found = gpkit.GradientPenalty(estimator=estimator, seed=0).terms(f, pair)
        rtol = 1e-7 if isinstance(estimator, gpkit.stencil) else 0.15
        torch.testing.assert_close(found.squared_norms, exact.squared_norms, rtol=rtol, atol=0)


class Grid(nn.Module):
    """Values at the integers, interpolated linearly: its gradient jumps at every integer."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.arange(9.0, dtype=torch.float64) ** 2)

    def forward(self, x):
        i = x.detach().floor().long().clamp(0, 7)
        return (self.values[i] * (i + 1 - x) + self.values[i + 1] * (x - i)).sum(1)


def test_a_stencil_of_a_cell_trains_the_cells_around_it():
    grid, x = Grid(), torch.full((1, 1), 4.5, dtype=torch.float64)
    value = gpkit.GradientPenalty(estimator=gpkit.stencil(1.0))(grid, x)
    assert value.item() == pytest.approx(((36 + 25) / 2 - (16 + 9) / 2) ** 2 / 4)  # f(5.5), f(3.5)
    value.backward()
    assert grid.values.grad.nonzero().flatten().tolist() == [3, 4, 5, 6]
    exact = gpkit.GradientPenalty()(grid, x)
    assert torch.autograd.grad(exact, grid.values)[0].nonzero().flatten().tolist() == [4, 5]
