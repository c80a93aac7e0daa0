"""A value with its graph, and the function and random state that recompute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpkit.autodiff.random import RandomState
from gpkit.estimators.window import Window


@dataclass(eq=False)
class Recomputable:
    """A value with its graph, and a function (with RNG state) that recomputes it.

    Args:
        value: the value with its graph, such as a loss. None where ``at`` moves the points.
        function: recomputes the value: at the current weights, or at the inputs passed to it.
        state: of the random numbers before ``value`` was computed.
        mean: whether the value of an input penalty is one number, the mean over the samples.
        window: the micro-batches whose gradients are averaged with this one's.
    """

    value: Any
    function: Callable[..., Any]
    state: RandomState
    mean: bool = False
    window: Window | None = None

    @property
    def device(self) -> torch.device | None:
        """The device of the value; None without a value."""
        return getattr(self.value, "device", None)
