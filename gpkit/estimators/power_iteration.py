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
    r"""The largest singular value of each group's Jacobian, instead of its Frobenius norm.

    .. math:: n^2 = \|J^\top u\|^2 \le \sigma_{\max}(J)^2, \quad
              v \leftarrow \frac{J^\top u}{\|J^\top u\|}, \quad u \leftarrow \frac{J v}{\|J v\|}

    u starts anywhere, one for each group, and is a constant at the end: then the gradient of n² is
    2σ uᵀ(dJ)v, that of σ² where it is the only largest singular value. The error is of the order
    (σ₂/σ₁)^(4K) in the value and (σ₂/σ₁)^(2K) in the gradient. There is no second derivative of
    n² (u and v are constants). It takes 2K + 2 backward passes: Jᵀu and Jv for each step, where Jv
    is a backward pass through a first Jᵀu, linear in u; and the last Jᵀu, the one whose graph the
    penalty trains. One output needs that one alone.

    Args:
        iterations: K, the number of steps.

    Source: Golub and van Loan, Matrix Computations, 7.3; for nets Johansson et al. (2022),
    arXiv:2206.13581.
    """

    iterations: int = 10

    def __post_init__(self) -> None:
        checks.integer("power_iteration(iterations=...)", self.iterations, 1)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse what has no spectral norm here.

        Raises:
            ValueError: if it is not the l2 norm of a first derivative.
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
        """Return the left singular vectors ``[G, m]``, from where ``u`` starts."""
        free = u.clone().requires_grad_()
        pulled = gradients((y * free).sum(), xs)  # Jᵀu as a function of u, linear in it
        for _ in range(self.iterations):
            v = products([y], xs, [u])
            rows = normalized([as_rows(p, batched) for p in v])
            v = [r.reshape(x.shape).to(x.dtype) for r, x in zip(rows, xs, strict=True)]
            u = normalized(products(pulled, (free,), v))[0].to(y.dtype)
        return u
