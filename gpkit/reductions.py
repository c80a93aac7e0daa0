"""Reductions: how the values of all groups become one number."""

from collections.abc import Callable

from torch import Tensor

# amax shares its gradient among groups that tie; the mean of ranks is DDP's own.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": Tensor.mean, "max": Tensor.amax}
