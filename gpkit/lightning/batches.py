"""The parts of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import tree_map_only


def unpack(batch: Any) -> tuple[Tensor, Any]:
    """Return x and y of a batch.

    Args:
        batch: ``(x, y)``, or ``(x, y, env)``.

    Returns:
        x, a tensor, and y.

    Raises:
        TypeError: if it is anything else.
    """
    several = isinstance(batch, (list, tuple)) and len(batch) in (2, 3)
    if not several or not isinstance(batch[0], Tensor):
        raise TypeError(
            "PenalizedModule takes batches (x, y), or (x, y, env), with a tensor x [B, ...]; got "
            f"{type(batch).__name__}: override nothing, use GradientPenalty in a module of your own"
        )
    return batch[0], batch[1]


def repeated(y: Any, batch: int, points: int) -> Any:
    """Return the target of a batch for points of which each sample has several, as in a mixture.

    Args:
        y: the target of ``batch`` samples, a tensor or any structure of them.
        batch: the number of samples.
        points: that of the points at which the loss is asked for.

    Returns:
        The target, over and over: ``[points, ...]``.

    Raises:
        ValueError: if the points are not a multiple of the samples.
    """
    if points == batch:
        return y
    if points % batch:
        raise ValueError(
            f'`of="loss"` needs a target for each point, and {points} points are no multiple of '
            f'the batch of {batch}: use of="output", or as many points for every sample'
        )

    def repeat(t: Tensor) -> Tensor:
        return torch.cat([t] * (points // batch)) if t.ndim else t

    return tree_map_only(Tensor, repeat, y)


def environments(batch: Any) -> Tensor:
    """Return the environment of each sample, ``[B]``: two equal halves where a batch has none."""
    if len(batch) == 3:
        return batch[2]
    size = len(batch[0])
    return torch.arange(size, device=batch[0].device) * 2 // size
