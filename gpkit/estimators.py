"""Estimators: how the squared norm n² of a derivative is obtained. Each returns n² [G]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.derivatives import as_rows, derivative_rows, gradients
from gpkit.differences import finite_difference
from gpkit.draws import Source, normal
from gpkit.latents import gaussian_product
from gpkit.spectral import power_iteration
from gpkit.targets import HALF, Estimator, Target, reduce_rows, wide


@dataclass(frozen=True)
class exact(Estimator):  # noqa: N801  estimators read as functions: estimator=projection(4)
    """All entries of the derivative, by nested double backprop.

    m outputs in n variables take m·(1 + n + ... + n^(k-1)) backward passes: one for the gradient
    of a scalar, m for a Jacobian, n + 1 for a scalar's Hessian.
    """

    pools = True

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        if target.window is not None:
            return target.window.squared_norms(target, norm)
        if order > 1 or target.y.numel() > 1:
            rows = derivative_rows(target.y, target.xs, order, batched=target.batched)
            return reduce_rows(target.split(rows), norm)
        grads = gradients(target.y, target.xs, target.times)  # the same, of one number
        if norm == "l2" and not target.batched:
            return squared_length(grads)
        row = tuple(as_rows(g, target.batched) for g in grads)
        return reduce_rows(target.split([row]), norm)


def squared_length(parts: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of all squares ``[1]``, in float32 or better."""
    if sum(part.numel() for part in parts) < SMALL:
        parts = (torch.cat([part.reshape(-1) for part in parts]),)
    squares = [(p.float() if p.dtype in HALF else p).square().sum() for p in parts]
    total = squares[0]
    for square in squares[1:]:
        total = total + square
    return total.reshape(1)


SMALL = 2**18  # entries: below that a copy costs less than the operations that it saves


@dataclass(frozen=True)
class projection(Estimator):  # noqa: N801
    r"""Random projections: an unbiased estimate of the squared Frobenius norm.

    .. math:: n^2 = \frac1N \sum_{j=1}^N
              \|\nabla\, D_{v_{k-1}} \cdots D_{v_1} \langle v_0, f \rangle \|^2

    with fresh independent v of E[v vᵀ] = I for each level, sample and j. Each of the N takes k
    backward passes. It is exact, and one pass, where nothing is left to project: the gradient of a
    scalar. A form that takes the root of n² (norm, two-sided) sees the root of the estimate.

    Args:
        n: N, the number of projections.
        distribution: of v: "rademacher" (±1, the least variance), "gaussian", or "sphere"
            (uniform on the sphere of radius √d).

    Source: Hutchinson (1989); for Jacobians Hoffman, Roberts and Yaida (2019), arXiv:1908.02729.
    """

    n: int = 1
    distribution: str = "rademacher"

    def __post_init__(self) -> None:
        checks.integer("projection(n=...)", self.n, 1)
        checks.choice("projection(distribution=...)", self.distribution, DISTRIBUTIONS)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse other norms.

        Raises:
            ValueError: if the norm is not l2.
        """
        if norm != "l2":
            raise ValueError(
                f"`estimator=projection()` estimates the l2 norm; got norm={norm!r}: "
                "use estimator='exact'"
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate of n² ``[G]``, differentiable, in float32 or better."""
        random = order > 1 or target.y.shape[1] > 1
        draws = [self.once(target, order, norm, rng) for _ in range(self.n if random else 1)]
        return torch.stack(draws).mean(0)

    def once(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return one unbiased n² ``[G]``."""
        rows: tuple[Tensor, ...] = (target.y,)
        for _ in range(order):
            # One entry is not projected: v = ±1 would change nothing, a Gaussian would add noise.
            alone = len(rows) == 1 and rows[0].shape[1] == 1
            vs = [torch.ones_like(r) for r in rows] if alone else self.draw(rows, rng)
            along = sum((r * v).sum() for r, v in zip(rows, vs, strict=True))
            assert isinstance(along, Tensor)
            rows = tuple(as_rows(g, target.batched) for g in gradients(along, target.xs))
        return reduce_rows(target.split([rows]), norm)

    def draw(self, rows: tuple[Tensor, ...], rng: Source) -> list[Tensor]:
        """Return v in the shapes ``[G, n]`` of ``rows``, with E[v vᵀ] = I over a whole row."""
        vs = [normal(rng, r.shape, r.device, wide(r)) for r in rows]
        if self.distribution == "rademacher":
            vs = [torch.where(v < 0, -1.0, 1.0).to(v) for v in vs]
        elif self.distribution == "sphere":
            length = torch.stack([v.square().sum(1) for v in vs]).sum(0).sqrt()  # [G]
            radius = sum(v.shape[1] for v in vs) ** 0.5
            vs = [v * (radius / length).unsqueeze(1) for v in vs]
        return [v.to(r.dtype) for v, r in zip(vs, rows, strict=True)]


@dataclass(frozen=True)
class taylor(Estimator):  # noqa: N801
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
    It takes smooth functions, see `gpkit.directional.directional_derivative`.

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
        from gpkit.directional import last_derivative, paths

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


DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")
ESTIMATORS = {
    "exact": exact,
    "projection": projection,
    "finite_difference": finite_difference,
    "taylor": taylor,
    "power_iteration": power_iteration,
    "gaussian_product": gaussian_product,
}
