"""Weights of the samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sample_weights(given: Any, batch: int, pixels: int = 1) -> Tensor:
    """Return weights as ``[batch·pixels]``.

    Args:
        given: ``[batch]``, or ``[batch, 1]``; with pixels one for each of them as well.
        batch: the number of samples.
        pixels: the number of pixels of a sample that have a norm each.

    Returns:
        The weights.

    Raises:
        ValueError: if there is not one for each sample, or one of them is negative.
        TypeError: if they are no tensor.
    """
    if not isinstance(given, Tensor):
        raise TypeError(f"sample_weight= must be a tensor [B]; got a {type(given).__name__}")
    if given.ndim == 0 or len(given) != batch or given.numel() not in (batch, batch * pixels):
        raise ValueError(
            f"sample_weight= must have one number for each sample, [{batch}]; got "
            f"{list(given.shape)}"
        )
    if given.device.type == "cpu" and bool((given < 0).any()):
        raise ValueError(
            f"sample_weight= must be >= 0; got {float(given.min()):g}: use 0 to leave a sample out"
        )
    weights = given.reshape(-1)
    return weights if len(weights) == batch * pixels else weights.repeat_interleave(pixels)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w v / Σ w over the first dimension; zero if all weights are zero.

    >>> weighted_mean(torch.tensor([1.0, 5.0, torch.inf]), torch.tensor([1.0, 3.0, 0.0]))
    tensor(4.)
    """
    total = weights.to(values).sum()
    return weighted_sum(values, weights) / torch.where(total == 0, torch.ones_like(total), total)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Return Σ w v over the first dimension; values whose weight is zero may be infinite."""
    weights = weights.to(values).reshape(-1, *[1] * (values.ndim - 1))
    return (torch.where(weights == 0, 0.0, values) * weights).sum(0)
