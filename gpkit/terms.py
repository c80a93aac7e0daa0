"""What a penalty is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """What a penalty is made of, for G groups (samples, or one batch).

    Args:
        norms: ``[G]``: n, the norm of each group's derivative.
        values: ``[G]``: form(n), unreduced and unweighted.
        weight: the factor of their mean, or maximum, at this step.
        penalty: ``weight * values.mean()``, the scalar that enters the loss; ``values.amax()``
            where the penalty has ``reduce="max"``.
    """

    norms: Tensor
    values: Tensor
    weight: float
    penalty: Tensor
