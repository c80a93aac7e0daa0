"""The change of a function over a random step, as in approximated R1."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import shaped, wide, widened
from gpkit.autodiff.random import Source, normal
from gpkit.estimators.base import Estimator, Target, require_gradient, require_inputs

ENOUGH = 4.0  # spacings; with a shorter step rounding adds more than a few per cent


@dataclass(frozen=True)
class random_difference(Estimator):
    r"""The squared change of f over a small random step: no gradient in x, no double backward.

    .. math:: n^2 = \frac1N \sum_{j=1}^N \frac{\|f(x + \sigma \epsilon_j) - f(x)\|^2}{\sigma^2},
              \quad \epsilon_j \sim N(0, I)

    Its expected value is ‖∇f‖², or ‖J‖_F² for several outputs, up to terms of order σ²: for
    f = xᵀHx/2 it is ‖Hx‖² + σ²/4 (2‖H‖_F² + (tr H)²). One draw has the variance 2‖∇f‖⁴, so a form
    that takes a root, such as two_sided, is biased. A step takes N + 1 forward passes and one
    ordinary backward pass. All passes draw the same numbers, as for dropout. Differences are in
    float32 or better.

    Rounding makes n² too large, how much depends on the net. Of the one net that was measured, in
    bfloat16 with entries of size 1, it was 1.31 times too large at σ = 0.01, and 1.06 times at
    0.05: measure your own, by the same call in float32.

    Args:
        sigma: σ > 0, the standard deviation of the step in each entry.
        n: N, the number of steps.

    Raises:
        ValueError: if an argument is out of range; in the call, if σ is below the spacing of the
            numbers that the function computes in.

    Warns:
        UserWarning: in the call, if σ is less than four spacings.

    Source: Lin et al. (2025), arXiv:2501.08316, without the division by σ².

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(estimator=random_difference(0.01), seed=0)
    >>> f = lambda x: 3 * x[:, 0] + 4 * x[:, 1]
    >>> round(penalty(f, torch.zeros(100_000, 2)).item())  # 3² + 4²
    25
    """

    sigma: float = 0.01
    n: int = 1

    reuses_graph = False
    continues = True
    differentiates = False
    first_order = True
    compares = True

    def __post_init__(self) -> None:
        checks.number("random_difference(sigma=...)", self.sigma, 0, strict=True)
        checks.integer("random_difference(n=...)", self.n, 1)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but the l2 norm of a first derivative in inputs."""
        require_gradient(self, order)
        require_inputs(self, norm, batched)

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate of n² ``[G]``, in float32 or better.

        Args:
            target: an output with inputs as variables, and its function.
            order: 1.
            norm: "l2".
            rng: the random numbers of the steps.

        Returns:
            n² ``[G]``.

        Raises:
            ValueError: if the target has no function of its own samples.
        """
        evaluate = target.function(self)
        here, xs, compared = widened(target.y), target.xs, target.compared
        # A sample that the penalty made for itself needs no gradient.
        starts = [x.detach() if x.is_leaf else x for x in xs]
        draws: list[Tensor] = []
        for _ in range(self.n):
            rows = [as_rows(normal(rng, x.shape, x.device, wide(x)), True) for x in xs]
            rows = rows if compared is None else compared.directed(rows)
            pairs = zip(starts, rows, strict=True)
            there = evaluate(*[x + shaped(self.sigma * row, x) for x, row in pairs])
            if not draws:
                self.require_resolution(target, there)
            change = (widened(there) - here) / self.sigma  # [G, m]
            if compared is not None:
                change = change - compared.along(rows).reshape(len(change), -1)
            draws.append(change.square().sum(1))
        return torch.stack(draws).mean(0)

    def require_resolution(self, target: Target, there: Tensor) -> None:
        """Refuse a step that is below the spacing of the numbers, and warn of one just above it.

        Raises:
            ValueError: if it is below.
        """
        epsilon = target.spacing(there)
        if torch.compiler.is_compiling():
            return
        if epsilon > COARSE:
            sizes = [float(widened(x.detach()).square().mean().sqrt()) for x in target.xs]
            epsilon *= max(1.0, *sizes)
        if self.sigma < epsilon:
            raise ValueError(
                f"`random_difference(sigma={self.sigma:g})` is below {epsilon:.2g}, the spacing of "
                "the numbers that the function computes in, so the difference is rounding: use a "
                "larger sigma, or float32"
            )
        if self.sigma < ENOUGH * epsilon:
            warnings.warn(
                f"`random_difference(sigma={self.sigma:g})` is less than {ENOUGH:g} times "
                f"{epsilon:.2g}, the spacing of the numbers that the function computes in: "
                "rounding makes n² too large, by a third at about 1; use more, or float32",
                stacklevel=2,
            )


COARSE = 1e-4  # a machine epsilon, as of half precision, at which the size of the numbers matters
