"""What a penalty is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from gpkit.forms import root


@dataclass(eq=False)
class Terms:
    """What a penalty is made of, for G groups (samples, or one batch).

    Args:
        squared_norms: ``[G]``: n², n being the norm of each group's derivative.
        values: ``[G]``: form(n), unreduced and unweighted.
        weight: the factor of their mean, or maximum, at this step.
        penalty: ``weight * values.mean()``, the scalar that enters the loss; ``values.amax()``
            where the penalty has ``reduce="max"``.
    """

    squared_norms: Tensor
    values: Tensor
    weight: float
    penalty: Tensor

    @cached_property
    def norms(self) -> Tensor:
        """Return n, ``[G]``."""
        return root(self.squared_norms)

    def detached(self) -> Terms:
        """Return the same without graphs."""
        parts = (self.squared_norms, self.values, self.penalty)
        n2, values, penalty = (t.detach() for t in parts)
        return Terms(n2, values, self.weight, penalty)
