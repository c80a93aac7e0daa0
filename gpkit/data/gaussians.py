"""Mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair, SplitOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Gaussians(ArrayDataModule):
    r"""K Gaussians with equally many points each; the class of a point is its Gaussian.

    .. math:: x = (c_y + \text{noise} \cdot \varepsilon) / \text{scale}, \quad
              \varepsilon \sim N(0, I), \quad y \in \{0, \dots, K - 1\}

    A subclass chooses the centres c and the scale.

    Args:
        centres: c, ``[K, D]``.
        scale: the divisor of all points.
        n: the number of points, all three parts together.
        noise: the standard deviation of a Gaussian before the division.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Attributes:
        modes: the means c / scale, ``[K, D]``.
        std: the standard deviation of each Gaussian, noise / scale.

    Raises:
        ValueError: if an option is out of its range.
    """

    task = "classification"

    def __init__(
        self,
        centres: Tensor,
        scale: float,
        n: int,
        noise: float,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        owner = type(self).__name__
        self.num_outputs = len(centres)
        self.n = checks.integer(f"{owner}(n=...)", n, self.num_outputs)
        self.std = checks.number(f"{owner}(noise=...)", noise, 0) / scale
        self.modes = centres / scale

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        y = torch.arange(self.n) % self.num_outputs
        means = self.modes[y]
        noise = torch.randn(means.shape, generator=generator, dtype=torch.float64)
        return self.cut(means + self.std * noise, y, generator)


class EightGaussians(Gaussians):
    """Eight Gaussians on a circle, a toy problem of Gulrajani et al. (2017).

    Their means lie on a circle of radius 2, their standard deviation is 0.02, and all points are
    then divided by 1.414, as in the published code of the paper, arXiv:1704.00028, figure 1.

    Args:
        n: the number of points, all three parts together.
        noise: the standard deviation of a Gaussian before the division.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Attributes:
        modes: the means, ``[8, 2]``.
        std: the standard deviation of each Gaussian, noise / 1.414.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = EightGaussians()
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs, round(data.std, 4)
    ((2,), 8, 0.0141)
    """

    def __init__(
        self,
        n: int = 25_000,
        noise: float = 0.02,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
        super().__init__(centres, 1.414, n, noise, batch_size=batch_size, **options)


class TwentyFiveGaussians(Gaussians):
    """Twenty-five Gaussians on a grid, a toy problem of Gulrajani et al. (2017).

    Their means are 2 (i, j) for i and j from -2 to 2, their standard deviation is 0.05, and all
    points are then divided by 2.828, as in the published code of the paper, arXiv:1704.00028,
    figure 1.

    Args:
        n: the number of points, all three parts together.
        noise: the standard deviation of a Gaussian before the division.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Attributes:
        modes: the means, ``[25, 2]``.
        std: the standard deviation of each Gaussian, noise / 2.828.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = TwentyFiveGaussians()
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs, round(data.std, 4)
    ((2,), 25, 0.0177)
    """

    def __init__(
        self,
        n: int = 25_000,
        noise: float = 0.05,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        side = torch.arange(-2, 3, dtype=torch.float64)
        centres = 2 * torch.cartesian_prod(side, side)
        super().__init__(centres, 2.828, n, noise, batch_size=batch_size, **options)


class Gaussian(Gaussians):
    r"""Points of one Gaussian, N(mean, std² I); with std 0, one point.

    .. math:: x = \text{mean} + \text{std} \cdot \varepsilon, \quad \varepsilon \sim N(0, I)

    With std 1 its Wasserstein distance from N(0, I) is ‖mean‖, so the distance that a critic
    finds can be compared with the true one.

    Args:
        mean: the mean, one number for each dimension.
        std: the standard deviation in every direction.
        n: the number of points, all three parts together.
        batch_size: the number of samples of a batch.
        **options: of `ArrayDataModule`.

    Attributes:
        modes: the mean, ``[1, D]``.
        std: the standard deviation.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = Gaussian(mean=[2.0, 0.0], std=0.0, n=10)
    >>> data.setup("fit")
    >>> data.train_set.tensors[0][0]
    tensor([2., 0.])
    """

    def __init__(
        self,
        mean: Sequence[float] = (2.0, 0.0),
        std: float = 1.0,
        n: int = 25_000,
        *,
        batch_size: int = 256,
        **options: Unpack[SplitOptions],
    ) -> None:
        if isinstance(mean, str) or not isinstance(mean, Sequence) or not mean:
            raise ValueError(
                f"`Gaussian(mean=...)` must be a list of numbers, one for each dimension, as "
                f"[2.0, 0.0]; got {mean!r}"
            )
        place = [checks.number(f"Gaussian(mean=...)[{i}]", m) for i, m in enumerate(mean)]
        centres = torch.tensor([place], dtype=torch.float64)
        noise = checks.number("Gaussian(std=...)", std, 0)
        super().__init__(centres, 1.0, n, noise, batch_size=batch_size, **options)
