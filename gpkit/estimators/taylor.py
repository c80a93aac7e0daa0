"""Taylor mode: the k-th derivative along one random direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows
from gpkit.autodiff.numerics import reduce_rows
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target
from gpkit.estimators.projection import DISTRIBUTIONS, projection


@dataclass(frozen=True)
class taylor(Estimator):
    r"""The k-th derivative along one random direction, by Taylor mode: polynomial in k.

    .. math:: n^2 = \frac1N \sum_{j=1}^N \sum_o (D^k f_o[v_j, \dots, v_j])^2

    with fresh v of E[v vᵀ] = I for each sample and j. It estimates E_v ‖D^k f[v, ..., v]‖², which
    is the squared Frobenius norm at k = 1 only: at k = 2 it is, with H the Hessian,

    - 2‖H‖_F² + (tr H)² for "gaussian" v,
    - 2‖H‖_F² + (tr H)² - 2 Σ_i H_ii² for "rademacher",
    - (2‖H‖_F² + (tr H)²) d / (d + 2) for "sphere", d the number of entries of a sample.

    It vanishes where the k-th derivative does for "gaussian" and "sphere"; with "rademacher" a
    Hessian such as diag(1, -1) goes unseen. For inputs of one number v = 1, and n = |f^(k)| is
    exact. It is for inputs, and evaluates the function itself on jets: give the penalty a callable.
    It takes smooth functions, see `gpkit.directional_derivative`.

    Args:
        n: N, the number of directions.
        distribution: of v: "rademacher" (±1), "gaussian", or "sphere" (of radius √d).

    Source: Griewank and Walther (2008), Evaluating Derivatives, chapter 13.
    """

    n: int = 1
    distribution: str = "rademacher"

    reuses_graph = False

    def __post_init__(self) -> None:
        checks.integer("taylor(n=...)", self.n, 1)
        checks.choice("taylor(distribution=...)", self.distribution, DISTRIBUTIONS)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse other norms.

        Raises:
            ValueError: if the norm is not l2.
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

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate ``[G]``, differentiable, in float32 or better.

        Args:
            target: one of inputs, with its function.
            order: k.
            norm: "l2".
            rng: draws directions.

        Returns:
            n² of each group.

        Raises:
            ValueError: if there is no function to evaluate.
        """
        from gpkit.autodiff.taylor.directional import last_derivative, paths

        if target.evaluate is None:
            raise ValueError(
                "`estimator=taylor()` evaluates the function itself, and got a tensor: "
                "give a callable and samples, penalty(f, x)"
            )
        flat = tuple(as_rows(x, True) for x in target.xs)  # [G, n]
        alone = sum(x.shape[1] for x in flat) == 1
        draws = []
        for _ in range(1 if alone else self.n):
            vs = projection(1, self.distribution).draw(flat, rng)
            vs = [torch.ones_like(v) for v in vs] if alone else vs
            shaped = tuple(v.reshape(x.shape) for v, x in zip(vs, target.xs, strict=True))
            y = last_derivative(target.evaluate(*paths(target.xs, shaped, order)), order)
            draws.append(reduce_rows([(y,)], norm))
        return torch.stack(draws).mean(0)
