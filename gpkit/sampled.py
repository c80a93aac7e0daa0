"""Losses with labels drawn from the model itself, as the Fisher matrix has them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gpkit.draws import Source, uniform
from gpkit.targets import wide


def sampled_losses(logits: Tensor, rng: Source) -> Tensor:
    r"""Return each sample's cross-entropy with a label drawn from its own softmax.

    .. math:: \ell_i = -\log p_i(\hat y_i), \quad \hat y_i \sim p_i = \mathrm{softmax}(z_i)

    Args:
        logits: z, ``[B, C]``.
        rng: draws the labels.

    Returns:
        ``[B]``, in float32 or better.

    Raises:
        ValueError: if the logits have another shape.
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f'of="sampled_loss" draws labels from logits [B, C] of C >= 2; got '
            f"{list(logits.shape)}: give the penalty the logits, not the loss"
        )
    logits = logits.to(wide(logits))
    return F.cross_entropy(logits, draw_labels(logits, rng), reduction="none")


def draw_labels(logits: Tensor, rng: Source) -> Tensor:
    """Return a label drawn from the softmax of each row of ``[B, C]``: ``[B]``, without a graph."""
    cumulative = logits.detach().double().softmax(1).cumsum(1)  # [B, C]
    u = uniform(rng, [len(logits)], logits.device, torch.float32).double()
    return (cumulative[:, :-1] <= u.unsqueeze(1)).sum(1)
