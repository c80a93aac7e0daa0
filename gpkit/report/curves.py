"""The curves of a run, from its TensorBoard events."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[NDArray[np.int64], NDArray[np.float64]]


def curves_of(folder: Path) -> dict[str, Curve]:
    """Return the scalars of a run by name, as steps and values; none if it has no events.

    A run that went on from a checkpoint may have done some steps twice: the last one counts.
    """
    if not any(folder.glob("events.*")):
        return {}
    events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        last = {point.step: point.value for point in events.Scalars(name)}
        steps = np.array(sorted(last))
        found[name] = steps, np.array([last[step] for step in steps], float)
    return found


def mean_curve(curves: list[Curve]) -> tuple[Curve, NDArray[np.float64]]:
    """Return the mean of curves at the steps that all have, and their standard deviation.

    Of one curve the deviation is zero.
    """
    steps = curves[0][0]
    for other, _ in curves[1:]:
        steps = np.intersect1d(steps, other)
    at = np.stack([values[np.searchsorted(own, steps)] for own, values in curves])
    std = at.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    return (steps, at.mean(0)), std
