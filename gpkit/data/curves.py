"""Points on curves in the plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import make_moons

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair, SplitOptions

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
