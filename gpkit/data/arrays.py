"""Data that fits into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from gpkit.data.module import DataModule
from gpkit.data.splits import Size, split, split_sizes

Pair = tuple[Tensor, ...]  # x, y, and what else a batch has, as the environment of each sample


class Rows(list[Tensor]):
    """A batch: the rows of each tensor."""


class Arrays(TensorDataset):
    """Tensors, of which a loader takes a batch at once instead of sample by sample.

    >>> data = Arrays(torch.arange(4), torch.arange(4) ** 2)
    >>> data.collate(data.__getitems__([3, 1]))
    [tensor([3, 1]), tensor([9, 1])]
    """

    def __getitems__(self, indices: list[int]) -> Rows:
        """Return the rows of a batch."""
        chosen = torch.tensor(indices)
        return Rows(t[chosen] for t in self.tensors)

    @staticmethod
    def collate(samples: Any) -> Any:
        """Return a batch of rows, or of a list of samples."""
        return list(samples) if isinstance(samples, Rows) else default_collate(samples)


class SplitOptions(TypedDict, total=False):
    """Keyword arguments of `ArrayDataModule` except ``batch_size``, for classes that forward them.

    Each is described there.
    """

    train_size: Size | None
    val_size: Size
    test_size: Size
    num_workers: int
    seed: int


class ArrayDataModule(DataModule):
    """Tensors for train, validation and test. A subclass has one method, `arrays`.

    It also sets ``task`` and ``num_outputs``, as class attributes or in its constructor.

    Args:
        batch_size: the number of samples of a batch.
        train_size: the size of the training part: a count (int), or a fraction of all samples
            (float, rounded down). None takes all that the other parts leave.
        val_size: the size of the validation part; 0 for none.
        test_size: the size of the test part; 0 for none.
        num_workers: the number of processes that load data; 0 loads in the main process.
        seed: of the split, of the order of the batches, and of data that is drawn at random.

    Raises:
        ValueError: if an option is out of its range; and in ``setup``, if the sizes do not fit.
    """

    train_set: Arrays
    val_set: Arrays
    test_set: Arrays

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
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return (x, y) for train, validation and test, with all randomness from ``generator``.

        Further tensors, as ``(x, y, env)``, become entries of the batches.
        """
        raise NotImplementedError(f"{type(self).__name__} must define arrays(generator)")

    def cut(self, x: Tensor, y: Tensor, generator: torch.Generator) -> list[Pair]:
        """Split samples by the sizes of the constructor; classes keep their proportions.

        Args:
            x: all inputs, ``[N, *S]``.
            y: all targets, ``[N]`` or ``[N, K]``.
            generator: the source of randomness.

        Returns:
            (x, y) for train, validation and test.

        Raises:
            ValueError: if the sizes do not fit the number of samples.
        """
        counts = split_sizes(
            type(self).__name__, len(x), self.train_size, self.val_size, self.test_size
        )
        strata = y if self.task == "classification" else torch.zeros(len(y))
        return [(x[i], y[i]) for i in split(strata, counts, generator)]

    def datasets(self) -> tuple[Dataset, Dataset, Dataset]:
        """Return the arrays as data sets, in the dtypes of a batch."""
        generator = torch.Generator().manual_seed(self.seed)
        target = torch.int64 if self.task == "classification" else torch.float32
        self.train_set, self.val_set, self.test_set = (
            Arrays(x.to(torch.float32), y.to(target), *more)
            for x, y, *more in self.arrays(generator)
        )
        self.input_shape = tuple(self.train_set.tensors[0].shape[1:])
        return self.train_set, self.val_set, self.test_set


def standardise(parts: Sequence[Tensor]) -> list[Tensor]:
    """Shift and scale all parts by the mean and the standard deviation of the first.

    Args:
        parts: the values for train, validation and test, ``[N, D]`` each. A column that is constant
            in the training part is only shifted.

    Returns:
        The standardised parts.
    """
    mean = parts[0].mean(0)
    deviation = parts[0].std(0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    return [(part - mean) / scale for part in parts]
