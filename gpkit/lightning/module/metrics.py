"""Metrics chosen by the loss, for a module that was given none."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanMetric, Metric, MetricCollection

from gpkit.autodiff.compat import tree_map_only

CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)


BINARY = (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits)


REGRESSION = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, F.mse_loss, F.l1_loss)


class Accuracy(MeanMetric):
    """The share of samples whose class is right, whatever the number of classes.

    Classes are in dimension 1 of the logits ``[B, C, ...]``, or the logits of one class, positive
    for true, have the shape of the target.
    """

    def update(self, logits: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Count a batch."""
        if logits.ndim > target.ndim:
            right = logits.argmax(1) == target
        else:
            right = (logits > 0) == (target > 0.5)
        super().update(right.float())


def default_metrics(loss: Any) -> MetricCollection:
    """Return the accuracy for a loss on classes, the mean absolute error for one on values.

    Args:
        loss: a loss; a partial is looked into. A loss that is not known has no metrics.

    Returns:
        Metrics by the names ``acc`` or ``mae``.
    """
    function = loss.func if isinstance(loss, functools.partial) else loss
    metrics: dict[str, Metric] = {}
    if any(function is f or type(function) is f for f in (*CLASSES, *BINARY)):
        metrics["acc"] = Accuracy()
    elif any(function is f or type(function) is f for f in REGRESSION):
        metrics["mae"] = MeanAbsoluteError()
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]


def as_metrics(metrics: Any, loss: Any) -> MetricCollection:
    """Return metrics given as a collection, a dict or one metric; those of the loss if None.

    Args:
        metrics: what the user gave.
        loss: the loss.

    Returns:
        The collection.

    Raises:
        TypeError: if they are of another kind.
    """
    if metrics is None:
        return default_metrics(loss)
    if isinstance(metrics, MetricCollection):
        return metrics
    if isinstance(metrics, Metric):
        metrics = {type(metrics).__name__.lower(): metrics}
    if not isinstance(metrics, dict) or not all(isinstance(m, Metric) for m in metrics.values()):
        raise TypeError(
            f"`metrics=...` must be torchmetrics by name, {{'f1': F1Score(...)}}; got {metrics!r}"
        )
    return MetricCollection(metrics, compute_groups=False)


def prediction(output: Any, target: Any) -> Any:
    """Return the output without a graph, in the shape of a target of as many entries."""
    output = tree_map_only(Tensor, Tensor.detach, output)
    both = isinstance(output, Tensor) and isinstance(target, Tensor)
    return output.reshape(target.shape) if both and output.numel() == target.numel() else output
