"""What every preset does: choose axes, unless the caller has chosen."""

from __future__ import annotations

from gpkit.axes.weight import Schedule
from gpkit.gradient_penalty import Axes, GradientPenalty


def preset(name: str, weight: float | Schedule, chosen: Axes, axes: Axes) -> GradientPenalty:
    """Return the penalty of the axes that a preset chose, where the caller chose no other."""
    merged: Axes = {"name": name, **chosen, **axes}
    return GradientPenalty(weight=weight, **merged)
