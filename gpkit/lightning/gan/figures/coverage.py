"""How many modes of a known mixture a generator covers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpkit import checks


class Coverage(NamedTuple):
    """What samples cover.

    Args:
        covered: The number of modes that are covered.
        high_quality: The share of the samples that lie close to a mode.
    """

    covered: int
    high_quality: float


def modes_covered(
    samples: Tensor, modes: Tensor, std: float, *, at_least: int = 1, radius: float = 3.0
) -> Coverage:
    """Count the modes that samples cover, and the samples of high quality.

    A sample is of high quality if it lies within 3 standard deviations of the nearest mode, and a
    mode is covered if it is the nearest of at least one such sample: the count of VEEGAN, made
    there with 2500 samples. Of the true mixture, in the plane, a share of 1 - exp(-9/2) = 0.989 is
    of high quality.

    Args:
        samples: [N, *S].
        modes: The means of the mixture, [K, *S].
        std: The standard deviation of each.
        at_least: The samples of high quality that it takes to cover a mode.
        radius: How close a sample must lie, in standard deviations.

    Returns:
        The number of modes covered, and the share of samples of high quality.

    Raises:
        ValueError: If the shapes do not go together, or an option is out of range.

    Source: Srivastava et al. (2017), arXiv:1705.07761.

    Examples:
        >>> modes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> modes_covered(torch.tensor([[0.29, 0.0], [0.5, 0.0]]), modes, std=0.1)
        Coverage(covered=1, high_quality=0.5)
    """
    checks.integer("modes_covered(at_least=...)", at_least, 1)
    checks.number("modes_covered(std=...)", std, 0)
    checks.number("modes_covered(radius=...)", radius, 0, strict=True)
    if not len(samples) or samples.shape[1:] != modes.shape[1:]:
        raise ValueError(
            "`modes_covered` must be given samples of the shape of the modes, "
            f"{list(modes.shape[1:])}, and at least one; got {list(samples.shape)}"
        )
    places = samples.detach().flatten(1).to(modes)
    distance, nearest = torch.cdist(  # the fast way by matrix products loses small distances
        places, modes.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(dim=1)
    good = distance <= radius * std
    found = torch.bincount(nearest[good], minlength=len(modes))
    return Coverage(int((found >= at_least).sum()), good.double().mean().item())
