"""One Gaussian, of which distances are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gpkit import checks
from gpkit.data.gaussians import Gaussians
from gpkit.data.splits import Size


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
