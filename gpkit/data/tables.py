"""Tables that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

from gpkit.data.arrays import ArrayDataModule, Pair, standardise


class BreastCancer(ArrayDataModule):
    """569 tumours: 30 measurements each, malignant (0) or benign (1).

    The measurements are standardised with the mean and the standard deviation of the training part.
    The options are the same as in `ArrayDataModule`.

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
    """442 patients: 10 measurements each, and how far the disease is a year later.

    Measurements and target are standardised with the mean and the standard deviation of the
    training part, so a constant prediction has a squared error of 1. The options are the same as
    in `ArrayDataModule`.

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
