"""The axis `weight`: the factor of the penalty at a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpkit import checks

Schedule = Callable[[int], float]


class Weight:
    """λ as a function of the optimiser step: the base class of schedules and adaptive weights.

    A subclass has one method, ``__call__(step) -> float``; any plain function of the step will do
    as well. The other methods do nothing unless a weight needs them.

    >>> import gpkit
    >>> class halving(gpkit.Weight):
    ...     def __call__(self, step):
    ...         return 0.5**step
    >>> penalty = gpkit.r1(weight=halving())
    >>> [penalty.weight_at(step) for step in (0, 1, 2)]
    [1.0, 0.5, 0.25]
    """

    adapts = False  # whether it has a state that training changes
    measures = False  # whether `measure` wants the gradients of loss and penalty

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step)")

    def loss_scale(self, step: int) -> float:
        """Return what the whole loss is divided by at an optimiser step."""
        return 1.0

    def observe(self, norms: Tensor, step: int) -> None:
        """Take the norms ``[G]`` of an optimiser step into account."""

    def measure(
        self, loss: Tensor, penalty: Tensor, parameters: Iterable[Tensor], step: int | None = None
    ) -> None:
        """Take the gradients of loss and penalty at an optimiser step into account."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


@dataclass(frozen=True)
class plain(Weight):
    """A plain function of the optimiser step, as a weight."""

    schedule: Schedule

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        return float(self.schedule(step))


def as_weight(schedule: Schedule) -> Weight:
    """Return a weight for a schedule: itself, or a plain function of the step wrapped as one."""
    return schedule if isinstance(schedule, Weight) else plain(schedule)


@dataclass(frozen=True)
class warmup(Weight):
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
class cosine(Weight):
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
class switch(Weight):
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


@dataclass(frozen=True)
class rescaled(Weight):
    r"""A weight λ(t), with the whole loss divided by max(1, λ(t)), as IRM anneals.

    .. math:: (L + \lambda(t) P) \, / \, \max(1, \lambda(t))

    The step of the optimiser then stays of one size where the weight jumps up. `PenalizedModule`
    divides what it trains on (``train/loss_total``); a loop of your own does it by
    ``(loss + penalty(...)) / penalty.loss_scale()``. Of several such penalties the greatest counts.

    Args:
        schedule: λ, a number or a function of the optimiser step, without a state.

    Raises:
        TypeError: if the schedule adapts.

    Source: Arjovsky et al. (2019), arXiv:1907.02893, in the authors' code.

    >>> weight = rescaled(switch(1.0, 100.0, at=190))
    >>> [(weight(t), weight.loss_scale(t)) for t in (189, 190)]
    [(1.0, 1.0), (100.0, 100.0)]
    """

    schedule: float | Schedule

    def __post_init__(self) -> None:
        if getattr(self.schedule, "adapts", hasattr(self.schedule, "state_dict")):
            raise TypeError(
                "`rescaled(schedule=...)` takes a number or a function of the step; got "
                f"{self.schedule!r}, which has a state: use it without rescaled"
            )
        if not callable(self.schedule):
            checks.number("rescaled(schedule=...)", self.schedule, 0)

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        return float(self.schedule(step) if callable(self.schedule) else self.schedule)

    def loss_scale(self, step: int) -> float:
        """Return what the whole loss is divided by at an optimiser step."""
        return max(1.0, self(step))


def lazy_adam(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), every: int = 16
) -> dict[str, Any]:
    r"""Return the arguments of Adam corrected for a penalty that acts on every k-th step.

    .. math:: r = k / (k + 1), \quad \mathrm{lr}' = r \, \mathrm{lr}, \quad \beta' = \beta^r

    The authors count the penalty as a step of its own, k + 1 instead of k.

    Args:
        lr: the learning rate.
        betas: the decays of the two averages.
        every: k, that of the penalty.

    Returns:
        ``lr`` and ``betas``: ``torch.optim.Adam(parameters, **lazy_adam(2e-3, (0.0, 0.99), 16))``.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Karras et al. (2020), StyleGAN2, arXiv:1912.04958, appendix B.

    >>> lazy_adam(0.004, (0.0, 0.81), every=1)  # r = ½
    {'lr': 0.002, 'betas': (0.0, 0.9)}
    """
    checks.number("lazy_adam(lr=...)", lr, 0)
    checks.integer("lazy_adam(every=...)", every, 1)
    first, second = betas
    for beta in (first, second):
        if checks.number("lazy_adam(betas=...)", beta, 0) >= 1:
            raise ValueError(f"`lazy_adam(betas=...)` must be two numbers below 1; got {betas!r}")
    r = every / (every + 1)
    return {"lr": lr * r, "betas": (first**r, second**r)}
