"""Points on curves in the plane, and near the graph of a function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import make_moons

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair, SplitOptions
from gpkit.data.splits import split_sizes

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SwissRoll(ArrayDataModule):
    r"""A spiral with Gaussian noise, a toy problem of Gulrajani et al. (2017).

    .. math:: x = \big((t \cos t, t \sin t) + \text{noise} \cdot \varepsilon\big) / 7.5, \quad
              t \sim U[1.5 \pi, 4.5 \pi], \quad \varepsilon \sim N(0, I)

    These are two of the three coordinates of scikit-learn's roll, with the noise and the divisor of
    the paper's published code: arXiv:1704.00028, figure 1. The target is the position along the
    roll, (t - 1.5 π) / 3 π, in [0, 1].

    Args:
        n: the number of points, all three parts together.
        noise: the standard deviation of the noise before the division.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = SwissRoll()
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs
    ((2,), 1)
    """

    task = "regression"
    num_outputs = 1

    def __init__(
        self,
        n: int = 25_000,
        noise: float = 0.25,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.n = checks.integer("SwissRoll(n=...)", n, 2)
        self.noise = checks.number("SwissRoll(noise=...)", noise, 0)

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        position = torch.rand(self.n, 1, generator=generator, dtype=torch.float64)
        t = math.pi * (1.5 + 3 * position)
        noise = torch.randn(self.n, 2, generator=generator, dtype=torch.float64)
        x = (torch.cat([t * t.cos(), t * t.sin()], dim=1) + self.noise * noise) / 7.5
        return self.cut(x, position, generator)


class TwoMoons(ArrayDataModule):
    """Two interleaving half circles in the plane, one class each, with Gaussian noise.

    Args:
        n: the number of points, all three parts together.
        noise: the standard deviation of the noise.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = TwoMoons(n=200)
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs
    ((2,), 2)
    """

    task = "classification"
    num_outputs = 2

    def __init__(
        self,
        n: int = 1000,
        noise: float = 0.1,
        *,
        batch_size: int = 64,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.n = checks.integer("TwoMoons(n=...)", n, 2)
        self.noise = checks.number("TwoMoons(noise=...)", noise, 0)

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        x, y = make_moons(n_samples=self.n, noise=self.noise, random_state=self.seed)
        return self.cut(torch.from_numpy(x), torch.from_numpy(y), generator)


class CirclePoints(ArrayDataModule):
    r"""A circle, and its signed distance: the training points lie on it, the others in a box.

    .. math:: y(x) = \|x\| - \text{radius}

    On the circle the target is 0, and that is all a net is told. The test points are uniform in the
    box :math:`[-\text{box}, \text{box}]^2`, where the target says how far it is from a distance.

    Args:
        n: the number of points, all three parts together.
        radius: of the circle.
        box: half of the side of the box.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = CirclePoints(n=100)
    >>> data.setup("fit")
    >>> (x, y), (x_test, y_test) = data.train_set.tensors, data.test_set.tensors
    >>> torch.allclose(x.norm(dim=1), torch.tensor(0.5)), y.abs().max().item()
    (True, 0.0)
    >>> torch.allclose(y_test[:, 0], x_test.norm(dim=1) - 0.5)
    True
    """

    task = "regression"
    num_outputs = 1

    def __init__(
        self,
        n: int = 25_000,
        radius: float = 0.5,
        box: float = 1.0,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.n = checks.integer("CirclePoints(n=...)", n, 2)
        self.radius = checks.number("CirclePoints(radius=...)", radius, 0, strict=True)
        self.box = checks.number("CirclePoints(box=...)", box, 0, strict=True)

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        sizes = self.train_size, self.val_size, self.test_size
        on_circle, *inside = split_sizes("CirclePoints", self.n, *sizes)
        drawn = torch.rand(on_circle, 1, generator=generator, dtype=torch.float64)
        angle = 2 * math.pi * drawn
        x = self.radius * torch.cat([angle.cos(), angle.sin()], dim=1)
        parts = [(x, torch.zeros_like(angle))]
        for size in inside:
            x = self.box * (2 * torch.rand(size, 2, generator=generator, dtype=torch.float64) - 1)
            parts.append((x, x.norm(dim=1, keepdim=True) - self.radius))
        return parts


class NoisyCurve(ArrayDataModule):
    r"""Noisy points of a function of one number, and what a fit of them can be compared with.

    .. math:: y = \sin 3x + x^2 / 2 + \text{noise} \cdot \varepsilon, \quad
              x \sim U[-1, 1], \quad \varepsilon \sim N(0, 1)

    The noise is that of the training points. The targets of the others are the function itself; or
    with a ``degree`` those of the polynomial of this degree that fits the training points best,
    in least squares.

    Args:
        n: the number of points, all three parts together.
        noise: the standard deviation of the noise.
        degree: of the polynomial; None for the function.
        passes: how often an epoch goes over the training points.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = NoisyCurve(degree=0)
    >>> data.setup("fit")
    >>> y, y_test = data.train_set.tensors[1], data.test_set.tensors[1]
    >>> torch.allclose(y_test, y.mean())
    True
    """

    task = "regression"
    num_outputs = 1

    def __init__(
        self,
        n: int = 256,
        noise: float = 0.1,
        degree: int | None = None,
        passes: int = 1,
        *,
        batch_size: int = 64,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.n = checks.integer("NoisyCurve(n=...)", n, 2)
        self.noise = checks.number("NoisyCurve(noise=...)", noise, 0)
        if degree is not None:
            checks.integer("NoisyCurve(degree=...)", degree, 0)
        self.degree = degree
        self.passes = checks.integer("NoisyCurve(passes=...)", passes, 1)

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        x = 2 * torch.rand(self.n, 1, generator=generator, dtype=torch.float64) - 1
        y = (3 * x).sin() + x.square() / 2
        (x_train, y_train), *rest = self.cut(x, y, generator)
        noise = torch.randn(y_train.shape, generator=generator, dtype=torch.float64)
        y_train = y_train + self.noise * noise
        if self.degree is not None:
            points = x_train[:, 0].numpy(), y_train[:, 0].numpy()
            best = np.polynomial.Polynomial.fit(*points, deg=self.degree)
            rest = [(x, torch.from_numpy(best(x.numpy()))) for x, _ in rest]
        return [(x_train, y_train), *rest]
