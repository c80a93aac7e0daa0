"""Central differences along each axis, with a step that is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import reduce_rows, shaped, widened
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Begun, Estimator, Target, require_gradient, require_inputs

# (offset, weight) for each evaluation: f' ≈ Σ weight f(x + offset h) / h.
# By the number of points: offset k -> the weight of f(x + k h) - f(x - k h), which is 0 where f is
# constant, whatever the rounding.
TAPS = {2: {1: 1 / 2}, 4: {2: -1 / 12, 1: 2 / 3}}
MOST = 1000  # evaluations


@dataclass(frozen=True)
class stencil(Estimator):
    r"""The gradient by central differences along each axis: no gradient in x, no double backward.

    .. math:: \partial_i f \approx \frac{f(x + h e_i) - f(x - h e_i)}{2h}, \quad
              \frac{f(x - 2h e_i) - 8 f(x - h e_i) + 8 f(x + h e_i) - f(x + 2h e_i)}{12 h}

    with 2 and 4 taps; exact for polynomials up to degree 2 and 4. For fields on hash grids, whose
    own gradient jumps from cell to cell: a step of the size of a cell or more also trains the
    cells around it. With d entries in a sample it takes 2d or 4d forward passes and one ordinary
    backward pass, so it is for points in space, not for images.

    Args:
        h: the step, > 0, or a function of the optimiser step, such as one that halves it.
        taps: 2 or 4.

    Raises:
        ValueError: if an argument is out of range; in the call, if the step is below the spacing of
            the numbers, or more than a thousand forward passes would be needed.

    Source: Li et al. (2023), Neuralangelo, arXiv:2306.03092.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(estimator=stencil(0.5))
    >>> penalty(lambda x: (x**3).sum(1), torch.ones(4, 1)).item()  # (3 + h²)²
    10.5625
    """

    h: float | Callable[[int], float] = 1e-3
    taps: int = 2

    reuses_graph = False
    first_order = True
    compares = True
    by_pixel = True

    def __post_init__(self) -> None:
        if not callable(self.h):
            checks.number("stencil(h=...)", self.h, 0, strict=True)
        if self.taps not in TAPS:
            raise ValueError(f"`stencil(taps=...)` must be 2 or 4; got {self.taps!r}")

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but first derivatives in inputs."""
        require_gradient(self, order)
        require_inputs(self, "l2", batched)

    @property
    def offsets(self) -> list[int]:
        """The points k of f(x + k h), in the order in which they are evaluated."""
        return [sign * k for k in TAPS[self.taps] for sign in (-1, 1)]

    def step_at(self, step: int) -> float:
        """Return h at an optimiser step, counted from 0."""
        return checks.number(
            "stencil(h=...)", float(self.h(step) if callable(self.h) else self.h), 0, strict=True
        )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, in float32 or better.

        Args:
            target: an output with inputs as variables, and its function.
            order: 1.
            norm: "l2", "l1" or "linf".
            rng: not used.

        Returns:
            n² ``[G]``.

        Raises:
            ValueError: if the target has no function of its own samples, the step is too short, or
                there are too many entries.
        """
        evaluate, h = target.function(self), self.step_at(target.step)
        epsilon = target.spacing()
        if h < epsilon:
            raise ValueError(
                f"`stencil(h={h:g})` is below {epsilon:.2g}, the spacing of the numbers that the "
                "function computes in: use a larger step, or float32"
            )
        count = sum(x[0].numel() for x in target.xs)
        if count * self.taps > MOST:
            raise ValueError(
                f"`estimator=stencil()` takes {self.taps} forward passes for each of {count} "
                f"entries of a sample, over the limit of {MOST}: use estimator='exact', or "
                "gpkit.random_difference()"
            )
        slopes = [
            torch.stack(list(self.along(i, target, evaluate, h)), 2) for i in range(len(target.xs))
        ]
        rows = [tuple(part[:, r] for part in slopes) for r in range(target.y.shape[1])]
        return reduce_rows(target.split(rows), norm)

    def along(
        self, i: int, target: Target, evaluate: Callable[..., Tensor], h: float
    ) -> Iterator[Tensor]:
        """Yield the derivatives ``[G, m]`` in each entry of the i-th variable."""
        starts = [x.detach() if x.is_leaf else x for x in target.xs]
        rows = as_rows(widened(target.xs[i].detach()), True)
        for entry in range(rows.shape[1]):
            ys = {}
            for offset in self.offsets:
                first = (i, entry, offset) == (0, 0, self.offsets[0])
                if first and isinstance(target.series, FirstTap):
                    y = target.y
                else:
                    moved = [*starts]
                    moved[i] = moved_along(starts[i], entry, offset * h)
                    y = evaluate(*moved)
                ys[offset] = widened(y)
            parts = [(ys[k] - ys[-k]) * weight for k, weight in TAPS[self.taps].items()]
            yield torch.stack(parts).sum(0) / h

    def begun(
        self,
        function: Callable[..., list[Tensor]],
        xs: tuple[Tensor, ...],
        order: int,
        rng: Source,
        step: int,
        metrics: tuple[Tensor, ...] | None,
    ) -> Begun:
        """Run the function at the first tap; the value at the points themselves is not needed."""
        at = moved_along(xs[0], 0, self.offsets[0] * self.step_at(step)), *xs[1:]
        scores = function(*at)
        return Begun(scores, [FirstTap()] * len(scores), at)


@dataclass(frozen=True)
class FirstTap:
    """Says that y is the output at the first tap."""

    def scaled(self, scale: Tensor | float) -> FirstTap:
        """Return itself: y is scaled."""
        return self


def moved_along(x: Tensor, entry: int, length: float) -> Tensor:
    """Return x ``[B, *S]`` with one entry of each sample moved."""
    move = torch.zeros_like(as_rows(widened(x.detach()), True))
    move[:, entry] = length
    return x + shaped(move, x)
