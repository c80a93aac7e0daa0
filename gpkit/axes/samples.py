"""Samples: tensors that share a batch dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpkit.estimators.recomputable import Recomputable

Points = tuple[Tensor, ...]  # one tensor [B, *S] for every input of the function


def per_sample(alpha: Tensor, x: Tensor) -> Tensor:
    """Return α [B] in the dtype of x [B, *S], with dimensions of size one to multiply it by."""
    return alpha.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def as_points(x: Any) -> Points:
    """Return a tensor, or a tuple or list of tensors, as a tuple.

    Raises:
        TypeError: if it is anything else.
        ValueError: if the tensors do not have the same batch size.
    """
    points = tuple(x) if isinstance(x, (list, tuple)) else (x,)
    for point in points:
        if not isinstance(point, Tensor):
            raise TypeError(
                f"samples must be a tensor [B, ...] or a tuple of them; got {type(point).__name__}"
            )
    if not points or any(p.ndim == 0 or len(p) != len(points[0]) for p in points):
        raise ValueError(
            "samples must have a batch dimension, the same for all inputs: [B, ...]; "
            f"got {[list(p.shape) for p in points]}"
        )
    return points


def unwrap(points: Points | None) -> Tensor | Points | None:
    """Return the tensor of a tuple of one, and anything else unchanged."""
    return points[0] if points is not None and len(points) == 1 else points


def require_floating(x: Tensor) -> None:
    """Refuse samples that cannot require grad.

    Raises:
        TypeError: if the dtype of ``x`` is not floating-point.
    """
    if not x.is_floating_point():
        raise TypeError(
            f"a gradient needs floating-point samples; got {x.dtype}: "
            "penalise what is computed from them (an embedding), or the weights"
        )


def device_of(*values: Any) -> torch.device:
    """Return the device of the first tensor or module among ``values``, else the CPU."""
    for value in values:
        if isinstance(value, Recomputable):
            value = value.value
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, nn.Module):
            value = [next(value.parameters(), None)]
        if isinstance(value, (list, tuple)):
            found = device_of(*value)
            if found.type != "cpu":
                return found
    return torch.device("cpu")
