"""Taylor mode: the k-th derivative along random directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import reduce_rows
from gpkit.autodiff.random import Source, has_ranks
from gpkit.autodiff.sharding.gathering import require_no_hooks
from gpkit.estimators.base import Begun, Estimator, Target
from gpkit.estimators.projection import DISTRIBUTIONS, projection


@dataclass(frozen=True)
class taylor(Estimator):
    r"""The k-th derivative along random directions, by Taylor mode: its cost is polynomial in k.

    .. math:: n^2 = \frac1N \sum_{j=1}^N \sum_o (D^k f_o[v_j, \dots, v_j])^2

    with independent v, E[v vᵀ] = I, for each sample and j. It estimates E_v ‖D^k f[v, ..., v]‖².
    This is the squared Frobenius norm for k = 1 only. For k = 2, with H the Hessian, it is

    - 2‖H‖_F² + (tr H)² for "gaussian" v,
    - 2‖H‖_F² + (tr H)² - 2 Σ_i H_ii² for "rademacher",
    - (2‖H‖_F² + (tr H)²) d / (d + 2) for "sphere", d the number of entries of a sample.

    With "gaussian" and "sphere" it is zero only if the k-th derivative is zero; with "rademacher"
    it is also zero for a Hessian such as diag(1, -1). For one-dimensional inputs v = 1, and
    n = |f^(k)| is exact. It works for inputs only, and runs the function on Taylor series, so give
    the penalty a callable, made of smooth operations; see `gpkit.directional_derivative`.

    Args:
        n: N, the number of directions.
        distribution: the distribution of v: "rademacher" (±1), "gaussian", or "sphere" (uniform on
            the sphere of radius √d).

    Raises:
        ValueError: if ``n`` < 1, or ``distribution`` is another name.

    Source: Griewank and Walther (2008), Evaluating Derivatives, chapter 13.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(order=3, estimator=taylor())
    >>> penalty(lambda x: (x**4).sum(1), torch.ones(8, 1)).item()  # (24 x)²
    576.0
    """

    n: int = 1
    distribution: str = "rademacher"

    reuses_graph = False
    on_jets = True
    elementary = True  # there are no rules for the fused ones

    def __post_init__(self) -> None:
        checks.integer("taylor(n=...)", self.n, 1)
        checks.choice("taylor(distribution=...)", self.distribution, DISTRIBUTIONS)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse weights, and norms other than l2.

        Raises:
            ValueError: if it is for weights, or the norm is not l2.
        """
        if not batched:
            raise ValueError(
                "`estimator=taylor()` is for inputs; got weights: use estimator='projection'"
            )
        if norm != "l2":
            raise ValueError(
                f"`estimator=taylor()` estimates the l2 norm; got norm={norm!r}: "
                "use estimator='exact'"
            )

    def is_random(self, target: Target, order: int) -> bool:
        """Whether n² is a random estimate: there is one direction if x has one entry."""
        return has_choice(target.xs)

    def begun(
        self,
        function: Callable[..., list[Tensor]],
        xs: tuple[Tensor, ...],
        order: int,
        rng: Source,
        step: int,
        metrics: tuple[Tensor, ...] | None,
    ) -> Begun:
        """Run the function on x + t v, with the first directions: the value is a part of it."""
        from gpkit.autodiff.taylor.directional import paths

        found = function(*paths(xs, self.directions(xs, rng), order))
        return Begun(list(map(value_of, found)), list(map(OnPath, found)), xs)

    def directions(self, xs: tuple[Tensor, ...], rng: Source) -> tuple[Tensor, ...]:
        """Return random directions v in the shapes of ``xs``; one where there is no other."""
        if not has_choice(xs):
            return tuple(torch.ones_like(x) for x in xs)
        vs = projection(1, self.distribution).draw(tuple(as_rows(x, True) for x in xs), rng)
        return tuple(v.reshape(x.shape) for v, x in zip(vs, xs, strict=True))

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate of n² ``[G]``, differentiable, in float32 or better.

        Args:
            target: an output with inputs as variables, and its function.
            order: k.
            norm: "l2".
            rng: the random numbers of the directions.

        Returns:
            n² ``[G]``.

        Raises:
            ValueError: if the target has no function to evaluate.
        """
        from gpkit.autodiff.taylor.directional import last_derivative, paths

        if target.evaluate is None:
            raise ValueError(
                "`estimator=taylor()` needs a callable, to run it on Taylor series; got a tensor: "
                "use penalty(f, x)"
            )
        if has_ranks():
            require_no_hooks(target.y, "`estimator=taylor()`")
        draws = []
        for i in range(self.n if has_choice(target.xs) else 1):
            if i == 0 and isinstance(target.series, OnPath):
                y = target.series.y
            else:
                vs = self.directions(target.xs, rng)
                y = target.evaluate(*paths(target.xs, vs, order))
            draws.append(reduce_rows([(last_derivative(y, order),)], norm))
        return draws[0] if len(draws) == 1 else torch.stack(draws).mean(0)


@dataclass(frozen=True, eq=False)
class OnPath:
    """The output on x + t v, a series in t; a tensor if it does not depend on x."""

    y: Tensor

    def scaled(self, scale: Tensor | float) -> OnPath:
        """Return the same for scale·y."""
        return OnPath(self.y * scale)


def value_of(y: Tensor) -> Tensor:
    """Return the value of an output on Taylor series, and any other output as it is."""
    from gpkit.autodiff.taylor.in_graph import coefficient

    return coefficient(y, 0)


def has_choice(xs: tuple[Tensor, ...]) -> bool:
    """Whether the samples have more than one entry, so that there is more than one direction."""
    return sum(x.shape[1:].numel() for x in xs) > 1
