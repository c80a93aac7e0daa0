"""What a penalty is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit.forms import root


@dataclass(eq=False)
class Terms:
    """What a penalty is made of, for G groups (samples, or one batch).

    Args:
        squared_norms: ``[G]``: n², n being the norm of each group's derivative.
        values: ``[G]``: form(n), unreduced and unweighted.
        weight: the factor of ``reduced`` at this step.
        reduced: the mean of the values, one number; or their maximum, where the penalty has
            ``reduce="max"``.
    """

    squared_norms: Tensor
    values: Tensor
    weight: float
    reduced: Tensor

    @property
    def norms(self) -> Tensor:
        """Return n, ``[G]``."""
        return root(self.squared_norms)

    @property
    def penalty(self) -> Tensor:
        """Return the scalar that enters the loss, ``weight * reduced``."""
        return self.weight * self.reduced

    def added_to(self, loss: Tensor) -> Tensor:
        """Return ``loss + penalty``, in one operation."""
        return torch.add(loss, self.reduced, alpha=self.weight)

    def detached(self) -> Terms:
        """Return the same without graphs."""
        parts = (self.squared_norms, self.values, self.reduced)
        n2, values, reduced = (t.detach() for t in parts)
        return Terms(n2, values, self.weight, reduced)
