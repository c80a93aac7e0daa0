"""Power iteration: the largest singular value of a Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows, gradients, products
from gpkit.autodiff.numerics import normalized, wide, widened
from gpkit.autodiff.random import Source, normal
from gpkit.estimators.base import Estimator, Target


@dataclass(frozen=True)
class power_iteration(Estimator):
    r"""The largest singular value σ of each group's Jacobian, instead of its Frobenius norm.

    .. math:: n^2 = \|J^\top u\|^2 \le \sigma_{\max}(J)^2, \quad
              v \leftarrow \frac{J^\top u}{\|J^\top u\|}, \quad u \leftarrow \frac{J v}{\|J v\|}

    Each group starts from a random u. The final u is a constant, so the gradient of n² is
    2σ uᵀ(dJ)v, the gradient of σ² if the largest singular value is simple. The error is of order
    (σ₂/σ₁)^(4K) in the value and (σ₂/σ₁)^(2K) in the gradient. n² has no correct second derivative,
    because u and v are constants. It takes 2K + 2 backward passes: one Jᵀu that is linear in u; a
    Jv, by a backward pass through it, and a Jᵀu for each of K steps; and the last Jᵀu, which the
    penalty trains. With one output only the last one is needed.

    Args:
        iterations: K, the number of steps.

    Raises:
        ValueError: if ``iterations`` < 1.

    Source: Golub and van Loan, Matrix Computations, 7.3; for nets Johansson et al. (2022),
    arXiv:2206.13581.

    >>> import gpkit
    >>> A = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> penalty = gpkit.GradientPenalty(estimator=power_iteration(50), seed=0)
    >>> round(penalty(lambda x: x @ A, torch.ones(1, 2)).item(), 4)  # σ² = 4²
    16.0
    """

    iterations: int = 10

    frobenius = False

    def __post_init__(self) -> None:
        checks.integer("power_iteration(iterations=...)", self.iterations, 1)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but the l2 norm of a first derivative.

        Raises:
            ValueError: if the order or the norm is another.
        """
        if order > 1 or norm != "l2":
            raise ValueError(
                "`estimator=power_iteration()` gives the spectral (l2) norm of a first derivative; "
                f"got order={order}, norm={norm!r}: use estimator='exact'"
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        y, xs, batched = target.y, target.xs, target.batched
        u = torch.ones_like(y)
        if y.shape[1] > 1:
            u = normalized([normal(rng, y.shape, y.device, wide(y))])[0].to(y.dtype)
            u = self.iterate(y, xs, u, batched)
        rows = [as_rows(g, batched) for g in gradients((y * u).sum(), xs)]
        return torch.stack([widened(r).square().sum(1) for r in rows]).sum(0)

    def iterate(self, y: Tensor, xs: tuple[Tensor, ...], u: Tensor, batched: bool) -> Tensor:
        """Return the left singular vectors ``[G, m]``, starting from ``u``."""
        free = u.clone().requires_grad_()
        pulled = gradients((y * free).sum(), xs)  # Jᵀu as a function of u, linear in it
        for _ in range(self.iterations):
            v = products([y], xs, [u])
            rows = normalized([as_rows(p, batched) for p in v])
            v = [r.reshape(x.shape).to(x.dtype) for r, x in zip(rows, xs, strict=True)]
            u = normalized(products(pulled, (free,), v))[0].to(y.dtype)
        return u
