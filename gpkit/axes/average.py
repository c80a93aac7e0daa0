"""The running average of the norms, as a centre of a form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.distributed import sum_of_ranks
from gpkit.autodiff.tracing.calls import RECORDS, TRACES, outside

USES = ("constant", "graph", "before")


@dataclass
class running_average:
    """An exponential moving average of the mean norm: a ← d·a + (1 - d)·mean, once per call.

    The mean is over this call's norms, on all ranks of a distributed run; so each rank must make
    the same calls. `GradientPenalty.terms`, and calls under no_grad, use the average without an
    update. A mean that is not finite, such as on a step that a gradient scaler skips, is ignored.
    The average is part of the penalty's state; do not share one object between penalties.

    Args:
        decay: d in [0, 1].
        value: the initial a.
        use: what the centre of a call is. "constant": the new average, which holds the norms of
            this call, as a constant. "graph": the same, and the gradient passes through it to the
            norms, as in StyleGAN2's code; on several ranks, to the norms of all of them. "before":
            the average before this call.

    Raises:
        ValueError: if ``decay`` is not in [0, 1], ``value`` is not a finite number, or ``use`` is
            another name.

    >>> center = running_average(0.9)
    >>> center.update(torch.tensor([1.0, 3.0]))
    >>> round(center.value, 6)
    0.2
    """

    decay: float = 0.99
    value: float = 0.0
    use: str = "constant"

    def __post_init__(self) -> None:
        checks.number("running_average(decay=...)", self.decay, 0)
        checks.number("running_average(value=...)", self.value)
        checks.choice("running_average(use=...)", self.use, USES)
        if self.decay > 1:
            raise ValueError(
                f"`running_average(decay=...)` must be a number in [0, 1]; got {self.decay!r}"
            )

    def for_call(self, norms: Tensor) -> float | Tensor:
        """Return the centre of a call with norms ``[G]``, without an update."""
        if self.use == "before":
            return self.before(norms)
        return self.updated(norms if self.use == "graph" else norms.detach())

    def update(self, norms: Tensor) -> None:
        """Update the average with the mean of norms ``[G]``."""
        summed, count = self.totals(norms.detach()).tolist()
        if count and math.isfinite(summed):
            self.value = self.decay * self.value + (1 - self.decay) * (summed / count)

    def updated(self, norms: Tensor) -> Tensor:
        """Return d·a + (1 - d)·mean, a scalar in the dtype of the norms; a if it is not finite."""
        summed, count = self.totals(norms)
        before = self.before(norms)
        new = self.decay * before + (1 - self.decay) * (summed / count)
        return torch.where(new.isfinite(), new, before)

    def before(self, norms: Tensor) -> float | Tensor:
        """Return the average; for a compiled loss a tensor ``[]``, as it changes in each step."""
        if not (TRACES or RECORDS):
            return self.value
        options: dict[str, Any] = {"dtype": norms.dtype, "device": norms.device}
        state = outside(lambda: torch.tensor(self.value, **options))
        return state if TRACES else self.value

    @staticmethod
    def totals(norms: Tensor) -> Tensor:
        """Return the sum of the norms and their number, over all ranks: ``[2]``."""
        return sum_of_ranks(torch.stack([norms.sum(), norms.new_tensor(len(norms))]))

    def state_dict(self) -> dict[str, float]:
        """Return the average as a plain number."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the average."""
        self.value = state["value"]
