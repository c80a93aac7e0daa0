"""The axis `of`: what is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import Source, uniform

Of = str | Callable[[Any], Tensor]


def sampled_losses(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the cross-entropy of each sample, with a label drawn from its own softmax.

    .. math:: \ell_i = -\log p_i(\hat y_i), \quad \hat y_i \sim p_i = \mathrm{softmax}(z_i)

    Args:
        logits: z, ``[B, C]``.
        labels: ŷ, ``[B]``, see `draw_labels`.

    Returns:
        ℓ ``[B]``, in float32 or better.
    """
    return F.cross_entropy(logits.to(wide(logits)), labels, reduction="none")


def draw_labels(logits: Tensor, rng: Source) -> Tensor:
    """Return labels ``[B]`` drawn from the softmax of each row of ``[B, C]``, without a graph.

    Raises:
        ValueError: if the logits are not ``[B, C]`` with C >= 2.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f'of="sampled_loss" draws labels from logits [B, C] with C >= 2; got '
            f"{list(logits.shape)}: give the penalty the logits, not the loss"
        )
    cumulative = logits.detach().double().softmax(1).cumsum(1)  # [B, C]
    u = uniform(rng, [len(logits)], logits.device, torch.float32).double()
    return (cumulative[:, :-1] <= u.unsqueeze(1)).sum(1)


@dataclass(frozen=True)
class per_pixel:
    """The output divided by the square root of its number of pixels: f / √(H·W).

    For an output ``[B, C, H, W]``. All dimensions after the first two are pixels; ``[B]`` and
    ``[B, C]`` have one pixel.

    >>> per_pixel()(torch.ones(1, 3, 2, 2))[0, 0, 0]
    tensor([0.5000, 0.5000])
    """

    def __call__(self, output: Tensor) -> Tensor:
        """Return the scaled output, of the same shape."""
        return output / math.sqrt(math.prod(output.shape[2:]))


def class_sum(output: Tensor) -> Tensor:
    """Return the sum of the outputs of each sample: ``[B, C]`` to ``[B]``."""
    return output.reshape(len(output), -1).sum(1)
