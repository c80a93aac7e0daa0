"""A value with its graph, and a function that computes it anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpkit.autodiff.random import RandomState
from gpkit.estimators.window import Window


@dataclass(eq=False)
class Computed:
    """What was computed, and how it is computed anew.

    Args:
        value: what it was, a loss say, whose graph is there. None where ``at`` moves.
        function: gives it anew: at the weights as they are, or at the inputs it is called with.
        state: of the random numbers that it was computed with.
        mean: whether an input penalty's value is one number: the mean of the samples' own.
        window: the micro-batches whose gradients are averaged with this one's.
    """

    value: Any
    function: Callable[..., Any]
    state: RandomState
    mean: bool = False
    window: Window | None = None

    @property
    def device(self) -> torch.device | None:
        """Where the value is; None where it is none yet."""
        return getattr(self.value, "device", None)
