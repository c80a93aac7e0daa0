"""The axis `weight`: the factor of the penalty at each optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpkit import checks

Schedule = Callable[[int], float]


class Weight:
    """λ as a function of the optimiser step. The base class of schedules and adaptive weights.

    A subclass defines one method, ``__call__(step) -> float``. A plain function of the step works
    as well. The other methods are hooks for adaptive weights, and do nothing here.

    >>> import gpkit
    >>> class halving(gpkit.Weight):
    ...     def __call__(self, step):
    ...         return 0.5**step
    >>> penalty = gpkit.r1(weight=halving())
    >>> [penalty.weight_at(step) for step in (0, 1, 2)]
    [1.0, 0.5, 0.25]
    """

    adapts = False  # whether training changes its state
    measures = False  # whether `measure` uses the gradients of loss and penalty

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(step)")

    def loss_scale(self, step: int) -> float:
        """Return the number that divides the total loss at an optimiser step."""
        return 1.0

    def observe(self, norms: Tensor, step: int) -> None:
        """Adapt to the norms ``[G]`` of an optimiser step."""

    def measure(
        self, loss: Tensor, penalty: Tensor, parameters: Iterable[Tensor], step: int | None = None
    ) -> None:
        """Adapt to the gradients of loss and penalty at an optimiser step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""


@dataclass(frozen=True)
class plain(Weight):
    """A plain function of the optimiser step, as a `Weight`."""

    schedule: Schedule

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, counted from 0."""
        return float(self.schedule(step))


def as_weight(schedule: Schedule) -> Weight:
    """Return a schedule as a `Weight`; a plain function of the step is wrapped.

    Raises:
        TypeError: if it is a class, or a net.
    """
    checks.an_object("weight=...", schedule)
    if isinstance(schedule, nn.Module):
        raise TypeError(
            f"`weight=...` must be a number or a schedule; got a {type(schedule).__name__}: make "
            "the penalty first, and then call it: penalty = gpkit.r1(weight=10.0); "
            "penalty(critic, real=real)"
        )
    return schedule if isinstance(schedule, Weight) else plain(schedule)


@dataclass(frozen=True)
class warmup(Weight):
    """A linear warm-up at optimiser step t: λ·min(1, (t + 1) / steps).

    Args:
        weight: λ >= 0, the final weight.
        steps: the number of steps until it is reached, >= 1.

    Raises:
        ValueError: if an argument is out of range.

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
    """A cosine schedule at optimiser step t: e + (λ - e)·(1 + cos(π·min(1, t / steps))) / 2.

    Args:
        weight: λ >= 0, the weight at step 0.
        steps: the number of steps until the end, >= 1.
        end: e >= 0, the weight from then on.

    Raises:
        ValueError: if an argument is out of range.

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
    """One weight before a step, another from that step on.

    Args:
        before: the weight at steps t < at, >= 0.
        after: the weight at steps t >= at, >= 0.
        at: the step of the change, >= 0.

    Raises:
        ValueError: if an argument is out of range.

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
    r"""A weight λ(t) that also divides the total loss by max(1, λ(t)), as in IRM.

    .. math:: (L + \lambda(t) P) \, / \, \max(1, \lambda(t))

    The optimiser's steps then keep their size when the weight jumps up. `PenalizedModule` divides
    its total loss (``train/loss_total``); in your own loop use
    ``(loss + penalty(...)) / penalty.loss_scale()``. With several such penalties the largest
    divisor is used.

    Args:
        schedule: λ, a number or a function of the optimiser step, without state.

    Raises:
        TypeError: if the schedule has a state, such as an adaptive weight.
        ValueError: if it is a number < 0.

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
        """Return the number that divides the total loss at an optimiser step."""
        return max(1.0, self(step))


def annealed(before: float, after: float, at: int) -> rescaled:
    """Return IRM's annealing, ``rescaled(switch(before, after, at=at))``, in one call for configs.

    >>> annealed(1.0, 100.0, at=190).loss_scale(190)
    100.0
    """
    return rescaled(switch(before, after, at=at))


def lazy_adam(
    lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), every: int = 16
) -> dict[str, Any]:
    r"""Return Adam's lr and betas, corrected for a lazy penalty that acts on every k-th step.

    .. math:: r = k / (k + 1), \quad \mathrm{lr}' = r \, \mathrm{lr}, \quad \beta' = \beta^r

    The authors give the penalty an optimiser step of its own, so k steps become k + 1.

    Args:
        lr: the learning rate without a penalty.
        betas: Adam's two decay rates without a penalty.
        every: k, the ``every`` of the penalty.

    Returns:
        A dict with ``lr`` and ``betas``, for
        ``torch.optim.Adam(parameters, **lazy_adam(2e-3, (0.0, 0.99), 16))``.

    Raises:
        ValueError: if an argument is out of range.

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
