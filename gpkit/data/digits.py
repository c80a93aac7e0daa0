"""Handwritten digits, 8x8."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from gpkit import checks
from gpkit.data.arrays import ArrayDataModule, Pair
from gpkit.data.splits import Size


class Digits(ArrayDataModule):
    """The 1797 handwritten digits of scikit-learn: ``[1, 8, 8]`` in [0, 1], ten classes.

    ``label_noise`` makes memorising visible: a share p of the training labels is replaced by random
    ones, uniform over the ten classes, so about 9/10 of these are wrong. The samples that have
    noisy labels at a lower p also have them at a higher one. The split does not depend on p.

    About half of the pixels are exactly 0, so a generator of them should end in a sigmoid, not in a
    tanh: ``ImageGenerator(output="sigmoid")``.

    Args:
        batch_size: the number of samples of a batch.
        val_size: as in `ArrayDataModule`.
        test_size: as in `ArrayDataModule`.
        train_size: as in `ArrayDataModule`.
        label_noise: p, the share of the training labels that is replaced, in [0, 1].
        flatten: whether x is ``[64]`` instead of ``[1, 8, 8]``.
        num_workers: as in `ArrayDataModule`.
        seed: of the split, the noise and the order.

    Attributes:
        relabelled: the indices of the training samples with replaced labels,
            ``[round(p * n_train)]``.

    Raises:
        ValueError: if an option is out of its range.

    >>> data = Digits(train_size=1000, val_size=0, test_size=797, label_noise=0.2)
    >>> data.setup("fit")
    >>> data.input_shape, data.num_outputs, len(data.train_set), len(data.relabelled)
    ((1, 8, 8), 10, 1000, 200)
    """

    task = "classification"
    num_outputs = 10
    relabelled: Tensor

    def __init__(
        self,
        batch_size: int = 64,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        train_size: Size | None = None,
        label_noise: float = 0.0,
        flatten: bool = False,
        *,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            train_size=train_size,
            val_size=val_size,
            test_size=test_size,
            num_workers=num_workers,
            seed=seed,
        )
        if checks.number("Digits(label_noise=...)", label_noise, 0) > 1:
            raise ValueError(
                f"`Digits(label_noise={label_noise!r})` must lie in [0, 1]; "
                "use 0.2 to replace a fifth of the training labels"
            )
        self.label_noise = label_noise
        self.flatten = flatten

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts; the training labels have the noise."""
        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images / 16).reshape(-1, *((64,) if self.flatten else (1, 8, 8)))
        (x_train, y_train), *rest = self.cut(x, torch.from_numpy(labels), generator)
        size = len(y_train)
        drawn = torch.randperm(size, generator=generator)
        self.relabelled = drawn[: round(self.label_noise * size)]
        random = torch.randint(self.num_outputs, (size,), generator=generator)
        y_train[self.relabelled] = random[self.relabelled]
        return [(x_train, y_train), *rest]
