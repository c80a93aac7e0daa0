"""Tables that scikit-learn brings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

from gpkit.data.arrays import ArrayDataModule, Pair, standardise


class BreastCancer(ArrayDataModule):
    """569 tumours that come with scikit-learn: 30 measurements, malignant (0) or benign (1).

    The measurements are standardised by the statistics of the training part alone. The options are
    those of `ArrayDataModule`.

    Examples:
        >>> data = BreastCancer()
        >>> data.setup("fit")
        >>> data.input_shape, data.num_outputs
        ((30,), 2)
    """

    task = "classification"
    num_outputs = 2

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        x, y = load_breast_cancer(return_X_y=True)
        parts = self.cut(torch.from_numpy(x), torch.from_numpy(y), generator)
        xs, ys = zip(*parts, strict=True)
        return list(zip(standardise(xs), ys, strict=True))


class Diabetes(ArrayDataModule):
    """442 patients that come with scikit-learn: 10 measurements, the disease a year later.

    Measurements and target are standardised by the statistics of the training part alone, so a
    squared error of 1 is that of a constant prediction. The options are those of
    `ArrayDataModule`.

    Examples:
        >>> data = Diabetes()
        >>> data.setup("fit")
        >>> data.input_shape, data.num_outputs
        ((10,), 1)
    """

    task = "regression"
    num_outputs = 1

    def arrays(self, generator: torch.Generator) -> Sequence[Pair]:
        """Return the three parts."""
        x, y = load_diabetes(return_X_y=True, scaled=False)
        parts = self.cut(torch.from_numpy(x), torch.from_numpy(y)[:, None], generator)
        xs, ys = zip(*parts, strict=True)
        return list(zip(standardise(xs), standardise(ys), strict=True))
