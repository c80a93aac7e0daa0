"""How many modes of a known mixture the samples of a generator cover."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpkit import checks


class Coverage(NamedTuple):
    """The result of `modes_covered`.

    Args:
        covered: the number of covered modes.
        high_quality: the fraction of samples that lie close to a mode.
    """

    covered: int
    high_quality: float


def modes_covered(
    samples: Tensor, modes: Tensor, std: float, *, at_least: int = 1, radius: float = 3.0
) -> Coverage:
    r"""Count the modes of a mixture that samples cover, and the samples of high quality.

    A sample x has high quality if it lies within r standard deviations σ of its nearest mode μ,

    .. math:: \min_k \|x - \mu_k\|_2 \le r \, \sigma ,

    and a mode is covered if it is the nearest one of at least ``at_least`` such samples. VEEGAN
    counts so with r = 3 and 2500 samples. Of samples from the true mixture in the plane, the
    fraction 1 − exp(−r²/2) has high quality, 0.989 for r = 3.

    Args:
        samples: ``[N, *S]``, N >= 1.
        modes: the means μ of the mixture, ``[K, *S]``.
        std: σ, the standard deviation of each mode, >= 0.
        at_least: the number of samples of high quality that cover a mode, >= 1.
        radius: r > 0, in standard deviations.

    Returns:
        The number of covered modes, and the fraction of samples of high quality.

    Raises:
        ValueError: if samples and modes differ in shape, there is no sample, or an option is out of
            range.

    Source: Srivastava et al. (2017), arXiv:1705.07761.

    >>> modes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> modes_covered(torch.tensor([[0.29, 0.0], [0.5, 0.0]]), modes, std=0.1)
    Coverage(covered=1, high_quality=0.5)
    """
    checks.integer("modes_covered(at_least=...)", at_least, 1)
    checks.number("modes_covered(std=...)", std, 0)
    checks.number("modes_covered(radius=...)", radius, 0, strict=True)
    if not len(samples) or samples.shape[1:] != modes.shape[1:]:
        raise ValueError(
            "`modes_covered(samples=...)` must have the shape of the modes, "
            f"{list(modes.shape[1:])}, and at least one sample; got {list(samples.shape)}"
        )
    places = samples.detach().flatten(1).to(modes)
    distance, nearest = torch.cdist(  # with matrix products, small distances would be inaccurate
        places, modes.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(dim=1)
    good = distance <= radius * std
    found = torch.bincount(nearest[good], minlength=len(modes))
    return Coverage(int((found >= at_least).sum()), good.double().mean().item())
