"""Default metrics, chosen by the loss."""

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
    """The fraction of correct classes, for any number of classes.

    The prediction is the argmax over dimension 1 of logits ``[B, C, ...]``. Logits with as many
    dimensions as the target are binary: a positive logit predicts a target of 1.

    >>> import torch
    >>> accuracy = Accuracy()
    >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """

    def update(self, logits: Tensor, target: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            logits: ``[B, C, ...]``; or binary logits, in the shape of the target.
            target: class indices ``[B, ...]``, or 0 and 1.
        """
        if logits.ndim > target.ndim:
            right = logits.argmax(1) == target
        else:
            right = (logits > 0) == (target > 0.5)
        super().update(right.float())


def default_metrics(loss: Any) -> MetricCollection:
    """Return the default metrics of a loss: accuracy for classes, mean absolute error for values.

    Args:
        loss: a loss of ``torch.nn`` or ``torch.nn.functional``, or a partial of one.

    Returns:
        A collection with ``acc`` or ``mae``; an empty one for any other loss.
    """
    function = loss.func if isinstance(loss, functools.partial) else loss
    metrics: dict[str, Metric] = {}
    if any(function is f or type(function) is f for f in (*CLASSES, *BINARY)):
        metrics["acc"] = Accuracy()
    elif any(function is f or type(function) is f for f in REGRESSION):
        metrics["mae"] = MeanAbsoluteError()
    return MetricCollection(metrics, compute_groups=False)  # type: ignore[arg-type]


def as_metrics(metrics: Any, loss: Any) -> MetricCollection:
    """Return metrics as a collection.

    Args:
        metrics: a collection, a dict by name, or one metric; None takes those of the loss.
        loss: the loss.

    Returns:
        The collection.

    Raises:
        TypeError: if ``metrics`` is anything else.
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
    """Return the output without a graph; with as many entries as the target, in its shape."""
    output = tree_map_only(Tensor, Tensor.detach, output)
    both = isinstance(output, Tensor) and isinstance(target, Tensor)
    return output.reshape(target.shape) if both and output.numel() == target.numel() else output
