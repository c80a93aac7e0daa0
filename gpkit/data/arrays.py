"""Data that fits into memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from gpkit.data.module import DataModule
from gpkit.data.splits import Size, split, split_sizes

Pair = tuple[Tensor, Tensor]


class ArrayDataModule(DataModule):
    """Tensors for train, validation and test, from the hook `arrays`.

    A subclass sets `task` and `num_outputs`, which are known beforehand, and gives `arrays`. The
    sizes are counts (int) or fractions (float, rounded down) and serve `cut`.

    Args:
        batch_size: The samples of a batch.
        train_size: The training part; None takes all that the others leave.
        val_size: The validation part; 0 for none.
        test_size: The test part; 0 for none.
        num_workers: The processes that load data.
        seed: Seeds the split and the order.

    Raises:
        ValueError: If an option is out of range.

    Examples:
        >>> class Line(ArrayDataModule):
        ...     task, num_outputs = "regression", 1
        ...     def arrays(self, generator):
        ...         x = torch.linspace(0, 1, 20)[:, None]
        ...         return self.cut(x, 2 * x, generator)
        >>> data = Line(batch_size=14)
        >>> data.setup("fit")
        >>> [tuple(t.shape) for t in next(iter(data.train_dataloader()))]
        [(14, 1), (14, 1)]
    """

    train_set: TensorDataset
    val_set: TensorDataset
    test_set: TensorDataset

    def __init__(
        self,
        *,
        batch_size: int = 64,
        train_size: Size | None = None,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Keep the options."""
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return (x, y) for train, validation and test; all randomness is from `generator`."""
        raise NotImplementedError

    def cut(self, x: Tensor, y: Tensor, generator: torch.Generator) -> list[Pair]:
        """Split by the sizes of the constructor, stratified when the task is a classification.

        Args:
            x: All inputs, [N, ...].
            y: All targets, [N] or [N, K].
            generator: The source of randomness.

        Returns:
            (x, y) for train, validation and test.

        Raises:
            ValueError: If the sizes do not fit the number of samples.
        """
        counts = split_sizes(
            type(self).__name__, len(x), self.train_size, self.val_size, self.test_size
        )
        strata = y if self.task == "classification" else torch.zeros(len(y))
        return [(x[i], y[i]) for i in split(strata, counts, generator)]

    def datasets(self) -> tuple[Dataset, Dataset, Dataset]:
        """Wrap the arrays."""
        generator = torch.Generator().manual_seed(self.seed)
        target = torch.int64 if self.task == "classification" else torch.float32
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(x.to(torch.float32), y.to(target)) for x, y in self.arrays(generator)
        )
        self.input_shape = tuple(self.train_set.tensors[0].shape[1:])
        return self.train_set, self.val_set, self.test_set


def standardise(parts: Sequence[Tensor]) -> list[Tensor]:
    """Shift and scale every part by the mean and the standard deviation of the first.

    Args:
        parts: The train, validation and test values, each [N, D]. A column that is constant in the
            training part is only shifted.

    Returns:
        The standardised parts.
    """
    mean = parts[0].mean(0)
    deviation = parts[0].std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    return [(part - mean) / scale for part in parts]
