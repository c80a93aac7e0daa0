"""Schedules: optimiser step -> weight. Any function of the step will do; here are the usual."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpkit import checks

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class warmup:  # noqa: N801  schedules read as functions: weight=warmup(10.0, steps=1000)
    """Linear warm-up: λ·min(1, (t + 1) / steps).

    >>> [warmup(10.0, steps=4)(t) for t in (0, 1, 3, 9)]
    [2.5, 5.0, 10.0, 10.0]
    """

    weight: float
    steps: int

    def __post_init__(self) -> None:
        checks.number("warmup(weight=...)", self.weight, 0)
        checks.integer("warmup(steps=...)", self.steps, 1)

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        return self.weight * min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True)
class cosine:  # noqa: N801
    """From one weight to another along half a cosine: e + (λ - e)·(1 + cos(π t / steps)) / 2.

    >>> [round(cosine(10.0, steps=4, end=0.0)(t), 3) for t in (0, 2, 4, 9)]
    [10.0, 5.0, 0.0, 0.0]
    """

    weight: float
    steps: int
    end: float = 0.0

    def __post_init__(self) -> None:
        checks.number("cosine(weight=...)", self.weight, 0)
        checks.integer("cosine(steps=...)", self.steps, 1)
        checks.number("cosine(end=...)", self.end, 0)

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        part = min(1.0, step / self.steps)
        return self.end + (self.weight - self.end) * (1 + math.cos(math.pi * part)) / 2


@dataclass(frozen=True)
class switch:  # noqa: N801
    """One weight up to a step, another from it on.

    >>> [switch(1.0, 100.0, at=190)(t) for t in (0, 189, 190)]
    [1.0, 1.0, 100.0]
    """

    before: float
    after: float
    at: int

    def __post_init__(self) -> None:
        checks.number("switch(before=...)", self.before, 0)
        checks.number("switch(after=...)", self.after, 0)
        checks.integer("switch(at=...)", self.at, 0)

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        return self.before if step < self.at else self.after
