"""A running average, as the centre of a form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks


@dataclass
class running_average:  # noqa: N801  centres read as functions: two_sided(running_average(0.99))
    """An exponential average of the mean norm over the calls of a penalty: a ← d·a + (1 - d)·mean.

    The mean is that of this call's norms, detached, and over all ranks of a distributed run, each
    of which must then make the same calls. The average that has it is the centre of the call:
    `GradientPenalty.terms`, which counts no step, leaves the average as it is and takes that. A
    mean that is not finite, such as that of a step that a gradient scaler skips, does not enter.
    It is part of the penalty's state; two penalties should not share one.

    Args:
        decay: d in [0, 1].
        value: a, where it begins.

    Raises:
        ValueError: if ``decay`` is not in [0, 1].

    >>> center = running_average(0.9)
    >>> center.update(torch.tensor([1.0, 3.0]))
    >>> round(center.value, 6)
    0.2
    """

    decay: float = 0.99
    value: float = 0.0

    def __post_init__(self) -> None:
        checks.number("running_average(decay=...)", self.decay, 0)
        checks.number("running_average(value=...)", self.value)
        if self.decay > 1:
            raise ValueError(
                f"`running_average(decay=...)` must be a number in [0, 1]; got {self.decay!r}"
            )

    def update(self, norms: Tensor) -> None:
        """Let the mean of norms ``[G]`` enter."""
        total = torch.stack([norms.detach().sum(), norms.new_tensor(len(norms))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        summed, count = total.tolist()
        if math.isfinite(summed):
            self.value = self.decay * self.value + (1 - self.decay) * (summed / count)

    def state_dict(self) -> dict[str, float]:
        """Return the average, a plain number."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from an average."""
        self.value = state["value"]
