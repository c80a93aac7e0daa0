"""What every preset does: merge its own choices with the caller's."""

from __future__ import annotations

from gpkit import checks
from gpkit.axes.weight import Schedule
from gpkit.gradient_penalty import Axes, GradientPenalty


def preset(name: str, weight: float | Schedule, chosen: Axes, axes: Axes) -> GradientPenalty:
    """Return the penalty of a preset.

    Args:
        name: of the preset, which the penalty has in logs unless ``axes`` has another.
        weight: λ.
        chosen: the choices of the preset.
        axes: the choices of the caller, which replace them.
    """
    checks.keywords(name, axes, ["weight", *Axes.__annotations__])
    merged: Axes = {"name": name, **chosen, **axes}
    return GradientPenalty(weight=weight, **merged)
