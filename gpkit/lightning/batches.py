"""Parts of a batch: inputs, targets and environments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import tree_map_only


def unpack(batch: Any) -> tuple[Tensor, Any]:
    """Return the inputs x and the targets y of a batch.

    Args:
        batch: ``(x, y)`` or ``(x, y, env)``.

    Returns:
        x, a tensor ``[B, *S]``, and y.

    Raises:
        TypeError: if the batch is anything else.
    """
    several = isinstance(batch, (list, tuple)) and len(batch) in (2, 3)
    if not several or not isinstance(batch[0], Tensor):
        raise TypeError(
            "PenalizedModule takes batches (x, y), or (x, y, env), with a tensor x [B, ...]; got "
            f"{type(batch).__name__}: for other batches use GradientPenaltyCallback with your own "
            "LightningModule"
        )
    return batch[0], batch[1]


def repeated(y: Any, batch: int, points: int) -> Any:
    """Return the targets of a batch, repeated for a penalty with several points per sample.

    Args:
        y: the targets of the samples: a tensor ``[B, ...]``, or a nested structure of tensors.
        batch: the number of samples, B.
        points: the number of points at which the loss is evaluated; a multiple of B.

    Returns:
        The targets, ``[points, ...]``: those of the whole batch, then the same again.

    Raises:
        ValueError: if ``points`` is not a multiple of ``batch``.
    """
    if points == batch:
        return y
    if points % batch:
        raise ValueError(
            f'`of="loss"` needs a target for each point; got {points} points, which is no multiple '
            f'of the {batch} samples: use of="output", or the same number of points per sample'
        )

    def repeat(t: Tensor) -> Tensor:
        return torch.cat([t] * (points // batch)) if t.ndim else t

    return tree_map_only(Tensor, repeat, y)


def environments(batch: Any) -> Tensor:
    """Return the environment of each sample, ``[B]``; without any, the two halves of the batch."""
    if len(batch) == 3:
        return batch[2]
    size = len(batch[0])
    return torch.arange(size, device=batch[0].device) * 2 // size
