"""Weights that adapt to what is measured in training. Their state is checkpointed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import gradient_norm
from gpkit.autodiff.distributed import mean_of_ranks
from gpkit.axes.weight import Weight


@dataclass(kw_only=True)
class Adaptive(Weight):
    """A weight that is corrected once an optimiser step by the mean of what was measured in it.

    All micro-batches of a step see the same weight; what they measure corrects that of the next.
    A measurement that is not finite, as after an overflow under mixed precision, is left out. In a
    distributed run the measurement is the mean over the ranks, so that all have the same weight.
    Each penalty needs one of its own.

    Args:
        weight: λ at the start, > 0.
        rate: the part of the error in log λ that one correction takes away, > 0.
        low: the least weight, > 0.
        high: the greatest.
    """

    weight: float = 1.0
    rate: float = 0.1
    low: float = 1e-8
    high: float = 1e8

    adapts = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        checks.number(f"{name}(rate=...)", self.rate, 0, strict=True)
        checks.number(f"{name}(low=...)", self.low, 0, strict=True)
        checks.number(f"{name}(high=...)", self.high, self.low)
        checks.number(f"{name}(weight=...)", self.weight, self.low)
        if self.weight > self.high:
            raise ValueError(
                f"`{name}(weight=...)` must be at most high={self.high:g}; got {self.weight!r}"
            )
        self._value, self._total, self._count, self._step = float(self.weight), 0.0, 0, -1
        self._corrections = 0

    def __call__(self, step: int) -> float:
        """Return the weight at an optimiser step: corrected, if one was measured before it."""
        if not self._count or step == self._step:
            return self._value
        factor = math.exp(self.correction(self._total / self._count))
        return min(self.high, max(self.low, self._value * factor))

    def record(self, measured: Tensor | float, step: int) -> None:
        """Take a measurement of an optimiser step, one number, into account."""
        measured = mean_of_ranks(measured)
        if not math.isfinite(measured):
            return
        if step != self._step:
            self._value = self(step)
            self._corrections += bool(self._count)
            self._total, self._count, self._step = 0.0, 0, step
        self._total += measured
        self._count += 1

    def correction(self, measured: float) -> float:
        """Return what is added to log λ."""
        raise NotImplementedError(f"{type(self).__name__} must define correction(measured)")

    def state_dict(self) -> dict[str, Any]:
        """Return the state: plain numbers."""
        return {name: getattr(self, f"_{name}") for name in STATE if hasattr(self, f"_{name}")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        for name, value in state.items():
            setattr(self, f"_{name}", value)


@dataclass
class target_norm(Adaptive):
    r"""Steer the mean norm n of a penalty to a target, by integral control of log λ.

    .. math:: \log \lambda \leftarrow \log \lambda + \text{rate} \cdot
              \text{clip}(\log (\text{mean}\, n / \text{target}), -1, 1)

    For forms that draw the norm to zero: a greater weight must mean a smaller norm. A penalty
    measures its norms itself, wherever it is called with grad mode on.

    Args:
        target: the mean norm wanted, > 0.
        weight: λ at the start.
        rate: of the correction at each optimiser step on which the penalty acts.
        low: the least weight.
        high: the greatest.

    Raises:
        ValueError: if an argument is out of its range.

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
        """Take the norms ``[G]`` of an optimiser step into account."""
        self.record(norms.detach().mean(), step)

    def correction(self, measured: float) -> float:
        """Return what is added to log λ."""
        error = math.log(measured / self.target) if measured > 0 else -1.0
        return self.rate * min(1.0, max(-1.0, error))


@dataclass
class gradient_share(Adaptive):
    r"""Steer a penalty's gradient to a share of the loss's: a λ that need not be guessed.

    .. math:: \log \lambda \leftarrow \log \lambda + \text{rate} \cdot
              \log \frac{\text{share}}{r}, \quad
              r = \frac{\|\nabla_\theta (\lambda P)\|}{\|\nabla_\theta L\|}

    The first correction is whole, whatever the rate, since the ratio is proportional to λ. A
    measurement takes a backward pass of each, on every n-th step. `PenalizedModule` measures by
    itself; a loop of your own calls `measure`. With a lazy penalty r is that of the steps on which
    it acts.

    Args:
        share: the ratio wanted, > 0: 0.1 is a tenth of the loss's gradient.
        every: n, the optimiser steps from one measurement to the next.
        weight: λ up to the first measurement, and the start of the search.
        rate: of the later corrections.
        low: the least weight.
        high: the greatest.

    Raises:
        ValueError: if an argument is out of its range.

    >>> import gpkit
    >>> w = torch.tensor([2.0], requires_grad=True)
    >>> weight = gradient_share(0.5, weight=3.0)
    >>> penalty = gpkit.weight_grad_norm(weight=weight)
    >>> loss = (w**2).sum() / 2                        # ∇L = w, ∇ λ‖∇L‖² = 2 λ w: r = 2 λ = 6
    >>> weight.measure(loss, penalty(loss, [w]), [w])
    >>> round(weight(1), 12)                           # the λ of r = 0.5
    0.25
    """

    share: float
    every: int = 10

    measures = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("gradient_share(share=...)", self.share, 0, strict=True)
        checks.integer("gradient_share(every=...)", self.every, 1)
        self._calls = 0

    def measure(
        self, loss: Tensor, penalty: Tensor, parameters: Iterable[Tensor], step: int | None = None
    ) -> None:
        """Measure the ratio of the gradients, where it is due. Graphs and ``.grad`` are kept.

        Args:
            loss: L, one number, without penalties.
            penalty: λP, what the penalty gave on this step. Zero without a graph is passed over.
            parameters: θ, those that are trained.
            step: the optimiser step; None counts the calls.
        """
        if step is None:
            step = self._calls
            self._calls += 1
        waiting = self._step < step < self._step + self.every and self._count
        if waiting or not penalty.requires_grad:
            return
        trained = [p for p in parameters if p.requires_grad]
        ratio = gradient_norm(penalty, trained) / gradient_norm(loss, trained)
        # Without a gradient of the penalty no weight gives the share: nothing to learn from it.
        self.record(torch.where(ratio > 0, ratio, torch.nan), step)

    def correction(self, measured: float) -> float:
        """Return what is added to log λ."""
        return (self.rate if self._corrections else 1.0) * math.log(self.share / measured)


STATE = ("value", "total", "count", "step", "corrections", "calls")
