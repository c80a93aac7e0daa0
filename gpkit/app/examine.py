"""Look at the first samples before the first step: do the net, the loss and the targets fit?"""

from __future__ import annotations

import re
from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from gpkit.app.data import loader_of
from gpkit.autodiff.isolation import isolated
from gpkit.lightning.batches import unpack
from gpkit.lightning.module import PenalizedModule
from gpkit.losses import logits

ON_VALUES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss, nn.BCELoss)


def require_fit(module: Any, data: Any) -> None:
    """Refuse a net whose outputs do not fit to the loss and the targets.

    It looks at two samples, and at all targets if they are one tensor. Nothing is changed: buffers
    and random numbers stay as they are.

    Args:
        module: to be trained; anything but a `PenalizedModule` is not looked at.
        data: a data module that is set up.

    Raises:
        ValueError: if they do not fit.
        RuntimeError: what the net raises for another reason.
    """
    loader = loader_of(data, "train")
    dataset = getattr(loader, "dataset", None)
    if not isinstance(module, PenalizedModule) or not hasattr(loader, "collate_fn"):
        return
    if not isinstance(dataset, Sized):
        return
    with isolated(module.net, 0, module.device, twice=False, evaluating=True), torch.no_grad():
        samples = [dataset[i] for i in range(min(2, len(dataset)))]  # type: ignore[index]
        batch = loader.collate_fn(samples)
        read = unpack(batch, module.net, module.inputs, module.target)
        try:
            out = logits(read.call(module.net, read.x))
        except RuntimeError as error:
            if not re.search("shape|size|dimension|channels", str(error)):
                raise
            raise ValueError(
                f"{type(module.net).__name__} does not take the data, x {_shape(read.x)}: {error}"
            ) from error
    if not isinstance(out, Tensor) or not isinstance(read.y, Tensor):
        return
    loss = module.loss
    if isinstance(loss, nn.CrossEntropyLoss):
        labels = read.y
        if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
            labels = dataset.tensors[1]
        _check_classes(module, data, out, labels, loss.ignore_index)
    elif isinstance(loss, ON_VALUES):
        _check_values(module, out, read.y)


def _check_classes(
    module: PenalizedModule, data: Any, out: Tensor, labels: Tensor, ignored: int
) -> None:
    net, owner = type(module.net).__name__, type(data).__name__
    if out.ndim < 2:
        raise ValueError(
            f"{net} gives {_shape(out)} for {len(out)} samples; cross-entropy takes "
            f"[{len(out)}, classes]: one output for each class"
        )
    if labels.is_floating_point():
        if labels.shape[1:] == out.shape[1:] and out.shape[1] > 1:
            return  # a probability for each class
        raise ValueError(
            f"loss: cross-entropy takes classes, and the targets of {owner} are numbers: use "
            "loss._target_=torch.nn.MSELoss"
        )
    labels = labels[labels != ignored]
    classes = out.shape[1]
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        low, high = int(labels.min()), int(labels.max())
        told = getattr(data, "num_outputs", None)
        advice = "labels must begin at 0" if low < 0 else f"it needs {high + 1} outputs"
        if low >= 0 and told == classes:
            advice = f"{owner} says num_outputs {told}, and its labels go beyond"
        raise ValueError(
            f"{net} has {classes} outputs, and the labels of {owner} go from {low} to {high}: "
            f"{advice}"
        )


def _check_values(module: PenalizedModule, out: Tensor, y: Tensor) -> None:
    net, loss = type(module.net).__name__, type(module.loss).__name__
    if not y.is_floating_point():
        raise ValueError(
            f"loss: {loss} takes numbers, and the targets are classes: leave the loss out, or use "
            "loss._target_=torch.nn.CrossEntropyLoss"
        )
    if out.shape != y.shape:
        raise ValueError(
            f"{net} gives {_shape(out)} and the targets are {_shape(y)}: {loss} would compare each "
            "with each; make the shapes equal"
        )


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
