"""Mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair
from gpkit.data.splits import Size


class Gaussians(ArrayDataModule):
    r"""Equally many points of K Gaussians; the class of a point is its Gaussian.

    .. math:: x = (c_y + \text{noise} \cdot \varepsilon) / \text{scale}, \quad
              \varepsilon \sim N(0, I), \quad y \in \{0, \dots, K - 1\}

    A subclass gives the centres c and the scale.

    Args:
        centres: c, [K, D].
        scale: What the points are divided by.
        n: The number of points, train, validation and test together.
        noise: The standard deviation of a Gaussian before the division.
        **options: Of `ArrayDataModule`.

    Attributes:
        modes: The means c / scale, [K, D].
        std: The standard deviation of each, noise / scale.

    Raises:
        ValueError: If an option is out of range.
    """

    task = "classification"

    def __init__(
        self,
        centres: Tensor,
        scale: float,
        n: int,
        noise: float,
        **options: Any,
    ) -> None:
        """Keep the options."""
        super().__init__(**options)
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
    """Eight Gaussians on a circle, the toy problem of Gulrajani et al. (2017).

    Their means lie on a circle of radius 2, their standard deviation is 0.02, and all is then
    divided by 1.414, as in the published code of the paper, arXiv:1704.00028, figure 1.

    Args:
        n: The number of points, train, validation and test together.
        noise: The standard deviation of a Gaussian before the division.
        batch_size: The samples of a batch.
        train_size: The training part; None takes all that the others leave.
        val_size: The validation part; 0 for none.
        test_size: The test part; 0 for none.
        num_workers: The processes that load data.
        seed: Seeds the points, the split and the order.

    Attributes:
        modes: The means, [8, 2].
        std: The standard deviation of each, noise / 1.414.

    Raises:
        ValueError: If an option is out of range.

    Examples:
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
        train_size: Size | None = None,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Place the centres."""
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        centres = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)
        super().__init__(
            centres,
            1.414,
            n,
            noise,
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            num_workers=num_workers,
            seed=seed,
        )


class TwentyFiveGaussians(Gaussians):
    """Twenty-five Gaussians on a grid, the toy problem of Gulrajani et al. (2017).

    Their means are 2 (i, j) for i and j from -2 to 2, their standard deviation is 0.05, and all is
    then divided by 2.828, as in the published code of the paper, arXiv:1704.00028, figure 1.

    Args:
        n: The number of points, train, validation and test together.
        noise: The standard deviation of a Gaussian before the division.
        batch_size: The samples of a batch.
        train_size: The training part; None takes all that the others leave.
        val_size: The validation part; 0 for none.
        test_size: The test part; 0 for none.
        num_workers: The processes that load data.
        seed: Seeds the points, the split and the order.

    Attributes:
        modes: The means, [25, 2].
        std: The standard deviation of each, noise / 2.828.

    Raises:
        ValueError: If an option is out of range.

    Examples:
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
        train_size: Size | None = None,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Place the centres."""
        side = torch.arange(-2, 3, dtype=torch.float64)
        centres = 2 * torch.cartesian_prod(side, side)
        super().__init__(
            centres,
            2.828,
            n,
            noise,
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            num_workers=num_workers,
            seed=seed,
        )


class Gaussian(Gaussians):
    r"""Points of one Gaussian, N(mean, std² I); with std 0, of one point.

    .. math:: x = \text{mean} + \text{std} \cdot \varepsilon, \quad \varepsilon \sim N(0, I)

    From N(0, I) it is, at std 1, the Wasserstein distance ‖mean‖ away, so that what a critic finds
    can be compared with the truth.

    Args:
        mean: The mean, one number for each dimension.
        std: The standard deviation in every direction.
        n: The number of points, train, validation and test together.
        batch_size: The samples of a batch.
        train_size: The training part; None takes all that the others leave.
        val_size: The validation part; 0 for none.
        test_size: The test part; 0 for none.
        num_workers: The processes that load data.
        seed: Seeds the points, the split and the order.

    Attributes:
        modes: The mean, [1, D].
        std: The standard deviation.

    Raises:
        ValueError: If an option is out of range.

    Examples:
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
        train_size: Size | None = None,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Place the mean."""
        if isinstance(mean, str) or not isinstance(mean, Sequence) or not mean:
            raise ValueError(
                f"`Gaussian(mean=...)` must be a list of numbers, one for each dimension, as "
                f"[2.0, 0.0]; got {mean!r}"
            )
        place = [checks.number(f"Gaussian(mean=...)[{i}]", m) for i, m in enumerate(mean)]
        super().__init__(
            torch.tensor([place], dtype=torch.float64),
            1.0,
            n,
            checks.number("Gaussian(std=...)", std, 0),
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            num_workers=num_workers,
            seed=seed,
        )
