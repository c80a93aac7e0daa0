"""What the studies share: a run of the application without a word, and what it logged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit

QUIET = ["trainer.enable_progress_bar=false", "device=cpu"]


def run(overrides: Sequence[str], folder: Path) -> dict[str, float]:
    """Train as ``python train.py OVERRIDES`` does, into a folder; return the final metrics."""
    with contextlib.redirect_stdout(io.StringIO()):
        return gpkit.train([*overrides, *QUIET], output_dir=folder)


def logged(folder: Path, *names: str) -> list[list[float]]:
    """Return the steps at which a run has logged the first name, and the values of every name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = [events.Scalars(name) for name in names]
    return [[s.step for s in found[0]], *([s.value for s in scalars] for scalars in found)]
