"""Weights that adapt to measurements during training. Their state is checkpointed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import gradient_norm
from gpkit.autodiff.distributed import mean_of_ranks
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.sharding.gathering import require_whole
from gpkit.axes.weight import Weight


@dataclass(kw_only=True)
class Adaptive(Weight):
    """A weight that is corrected once per optimiser step, by the mean measurement of that step.

    All micro-batches of a step use the same weight; their measurements correct the weight of the
    next step. A measurement that is not finite, such as after a float16 overflow, is ignored. In a
    distributed run measurements are averaged over the ranks, so that all use the same weight. Do
    not share one object between penalties.

    Args:
        weight: λ at the start, in [low, high].
        rate: the gain of one correction of log λ, > 0.
        low: the smallest weight, > 0; None is ``weight / 1000``. At a bound nothing accumulates,
            so the weight leaves it at the first measurement of the other sign.
        high: the largest weight; None is ``1000 * weight``.

    Raises:
        ValueError: if an argument is out of range.

    Warns:
        UserWarning: if the weight stays at a bound for 50 steps.
    """

    weight: float = 1.0
    rate: float = 0.1
    low: float | None = None
    high: float | None = None

    adapts = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        checks.number(f"{name}(rate=...)", self.rate, 0, strict=True)
        checks.number(f"{name}(weight=...)", self.weight, 0, strict=True)
        self._low = self.weight / WIDE if self.low is None else self.low
        self._high = self.weight * WIDE if self.high is None else self.high
        checks.number(f"{name}(low=...)", self._low, 0, strict=True)
        checks.number(f"{name}(high=...)", self._high, self._low)
        checks.number(f"{name}(weight=...)", self.weight, self._low)
        if self.weight > self._high:
            raise ValueError(
                f"`{name}(weight=...)` must be at most high={self._high:g}; got {self.weight!r}"
            )
        self._value, self._total, self._count, self._step = float(self.weight), 0.0, 0, -1
        self._at_bound = 0

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step, corrected by measurements of earlier steps."""
        if not self._count or step == self._step:
            return self._value
        factor = math.exp(self.correction(self._total / self._count))
        return min(self._high, max(self._low, self._value * factor))

    def record(self, measured: Tensor | float, step: int) -> None:
        """Record one measurement, a scalar, of an optimiser step."""
        measured = mean_of_ranks(measured)
        if not math.isfinite(measured):
            return
        if step != self._step:
            self._value = self(step)
            self._warn_at_bound()
            self._total, self._count, self._step = 0.0, 0, step
        self._total += measured
        self._count += 1

    def _warn_at_bound(self) -> None:
        """Say once that the weight has been at a bound for many steps."""
        bounded = self._count and self._value in (self._low, self._high)
        self._at_bound = self._at_bound + 1 if bounded else 0
        if self._at_bound == PATIENCE:
            side = "low" if self._value == self._low else "high"
            warnings.warn(
                f"{type(self).__name__}: the weight has been at its bound {side}={self._value:g} "
                f"for {PATIENCE} steps, and the measured value is {self._total / self._count:.3g}: "
                f"what it aims at may be out of reach; choose another, or set {side}=",
                stacklevel=2,
            )

    def correction(self, measured: float) -> float:
        """Return the number to add to log λ."""
        raise NotImplementedError(f"{type(self).__name__} must define correction(measured)")

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain numbers."""
        return {name: getattr(self, f"_{name}") for name in STATE if hasattr(self, f"_{name}")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)


@dataclass
class target_norm(Adaptive):
    r"""A weight that steers the mean norm n to a target, by integral control of log λ.

    .. math:: \log \lambda \leftarrow \log \lambda + \text{rate} \cdot
              \text{clip}(\log (\text{mean}\, n / \text{target}), -1, 1)

    Use it with forms that pull the norm to zero: a larger weight must give a smaller norm. The
    penalty measures its own norms in each call, unless under no_grad.

    Args:
        target: the desired mean norm, > 0.
        weight: λ at the start.
        rate: the gain of the correction at each optimiser step on which the penalty acts.
        low: the smallest weight; None is ``weight / 1000``.
        high: the largest weight; None is ``1000 * weight``.

    Raises:
        ValueError: if an argument is out of range.

    Warns:
        UserWarning: if the weight stays at a bound for 50 steps: the target may be out of reach.

    >>> weight = target_norm(1.0, weight=2.0, rate=0.5)
    >>> weight.observe(torch.tensor([2.0, 2.0]), step=0)  # the norm is twice the target
    >>> weight(0), round(weight(1), 4)  # 2, and then 2 · 2^½
    (2.0, 2.8284)
    """

    target: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("target_norm(target=...)", self.target, 0, strict=True)

    def observe(self, norms: Tensor, step: int) -> None:
        """Record the mean of the norms ``[G]`` of an optimiser step."""
        self.record(norms.detach().mean(), step)

    def correction(self, measured: float) -> float:
        """Return the number to add to log λ."""
        error = math.log(measured / self.target) if measured > 0 else -1.0
        return self.rate * min(1.0, max(-1.0, error))


@dataclass
class gradient_share(Adaptive):
    r"""A weight that makes the norm of the penalty's gradient a given share of the loss's.

    .. math:: \lambda = \text{share} / u, \quad
              u = \frac{\|\nabla_\theta P\|}{\|\nabla_\theta L\|}

    u is measured from step to step, and its logarithm is smoothed with its trend (Holt's double
    exponential smoothing), because it is noisy, and grows fast in a net whose last layer starts
    near zero. A measurement that is off by more than a factor of two is taken as it is.

    A measurement takes one extra backward pass through the loss and one through the penalty. On
    every step, it keeps the share within some 15 %, also of a net that has just begun to learn;
    with every=10 it costs a tenth, and the share strays by a factor of up to two at first.
    `PenalizedModule` measures by itself; in your own loop, call `measure`. With ``every=k`` for the
    penalty P is what it is on average over the steps: give `measure` the penalty divided by k.

    Args:
        share: the desired ratio of the norms, > 0: 0.1 is a tenth of the norm of the loss's
            gradient.
        every: n, the number of optimiser steps between measurements.
        weight: λ until the first measurement.
        rate: the weight of the latest measurement in the average, in (0, 1].
        low: the smallest weight; None is 1e-8.
        high: the largest weight; None is 1e8.

    Raises:
        ValueError: if an argument is out of range.

    >>> import gpkit
    >>> w = torch.tensor([2.0], requires_grad=True)
    >>> weight = gradient_share(0.5, weight=3.0)
    >>> penalty = gpkit.weight_grad_norm(weight=weight)
    >>> loss = (w**2).sum() / 2                        # ∇L = w, ∇ ‖∇L‖² = 2 w: u = 2
    >>> weight.measure(loss, penalty(loss, [w]), [w])
    >>> round(weight(1), 12)                           # 0.5 / 2
    0.25
    """

    share: float
    every: int = 1
    rate: float = field(default=0.3, kw_only=True)

    measures = True

    def __post_init__(self) -> None:
        self.low = 1e-8 if self.low is None else self.low
        self.high = 1e8 if self.high is None else self.high
        super().__post_init__()
        checks.number("gradient_share(share=...)", self.share, 0, strict=True)
        checks.integer("gradient_share(every=...)", self.every, 1)
        if self.rate > 1:
            raise ValueError(f"`gradient_share(rate=...)` must be at most 1; got {self.rate!r}")
        self._calls, self._trend = 0, 0.0
        self._level: float | None = None

    def measure(
        self, loss: Tensor, penalty: Tensor, parameters: Iterable[Tensor], step: int | None = None
    ) -> None:
        """Measure u, if a measurement is due. Graphs and ``.grad`` are left unchanged.

        Args:
            loss: L, the scalar loss without penalties.
            penalty: λP, the penalty of this step, divided by k if it acts on every k-th step.
                Without a graph it is ignored.
            parameters: θ, the trained parameters.
            step: the optimiser step; None counts the calls.
        """
        if step is None:
            step = self._calls
            self._calls += 1
        waiting = self._step < step < self._step + self.every and self._count
        if waiting or not penalty.requires_grad:
            return
        trained = [p for p in parameters if p.requires_grad]
        if has_ranks():
            require_whole(trained, "gradient_share()")
        ratio = gradient_norm(penalty, trained) / gradient_norm(loss, trained)
        # If the penalty's gradient is zero, no weight reaches the share: NaN is ignored.
        self.record(torch.where(ratio > 0, ratio, torch.nan), step)

    def record(self, measured: Tensor | float, step: int) -> None:
        """Record one measurement of λu, a scalar, of an optimiser step."""
        if step != self._step and self._count:
            smoothed = self.smoothed(self._total / self._count)
            super().record(measured, step)
            if step == self._step:  # the measurement is finite
                self._level, self._trend = smoothed
        else:
            super().record(measured, step)

    def smoothed(self, measured: float) -> tuple[float, float]:
        """Return the level of log u and its trend, with a measurement of λu."""
        found = math.log(measured / self._value)
        if self._level is None or abs(found - self._level - self._trend) > math.log(2):
            return found, 0.0
        error = found - self._level - self._trend
        return found - (1 - self.rate) * error, self._trend + self.rate**2 / 3 * error

    def correction(self, measured: float) -> float:
        """Return the number to add to log λ."""
        return math.log(self.share / self._value) - sum(self.smoothed(measured))


STATE = ("value", "total", "count", "step", "at_bound", "calls", "level", "trend")
WIDE = 1000.0  # from the start to a bound of its own
PATIENCE = 50  # steps at a bound before a word
