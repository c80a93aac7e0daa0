"""Power iteration: the largest singular value of a Jacobian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows, gradients, products
from gpkit.autodiff.numerics import length_of, normalized, shaped, wide, widened
from gpkit.autodiff.random import Source, normal
from gpkit.autodiff.tracing.points import variable
from gpkit.estimators.base import Estimator, Target


@dataclass(frozen=True)
class power_iteration(Estimator):
    r"""The largest singular value σ of each group's Jacobian, instead of its Frobenius norm.

    .. math:: n^2 = \|J^\top u\|^2 \le \sigma_{\max}(J)^2, \quad
              u \propto J J^\top \arg\max_{w \in W} \|J^\top w\| / \|w\|, \quad
              W = \mathrm{span}\{u_1, (J J^\top) u_1, \dots, (J J^\top)^{K-1} u_1\}

    Each group starts from a random u₁. Plain power iteration keeps only the last of these vectors;
    the best vector of their span (Lanczos) costs the same backward passes and is much nearer. With
    K outputs or fewer n = σ up to rounding, also if the largest singular values are close, as they
    are for a fresh ReLU net. The final u is a constant, so the gradient of n² is 2σ uᵀ(dJ)v, the
    gradient of σ² if the largest singular value is simple. n² has no correct second derivative,
    because u and v are constants. For m outputs it takes 2 min(K, m) + 2 backward passes: one Jᵀu
    that is linear in u; a Jᵀu, and a Jv by a backward pass through it, for each step; and the last
    Jᵀu, which the penalty trains. With one output only the last one is needed.

    Args:
        iterations: K, the largest number of steps.

    Raises:
        ValueError: if ``iterations`` < 1.

    Source: Golub and van Loan, Matrix Computations, 10.1 and 10.4; for nets Johansson
    et al. (2022), arXiv:2206.13581.

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
            u = self.iterate(y, xs, normal(rng, y.shape, y.device, wide(y)), batched)
        rows = [as_rows(g, batched) for g in gradients((y * u).sum(), xs)]
        return torch.stack([widened(r).square().sum(1) for r in rows]).sum(0)

    def iterate(self, y: Tensor, xs: tuple[Tensor, ...], u: Tensor, batched: bool) -> Tensor:
        """Return the left singular vectors ``[G, m]``, starting from ``u``."""
        u = normalized([u])[0].to(y.dtype)
        free = variable(u.clone())
        pulled = gradients((y * free).sum(), xs)  # Jᵀu as a function of u, linear in it
        basis, images = [], []  # orthonormal u_k, and J Jᵀ u_k / s²
        scale = y.new_zeros(())  # s ``[G, 1]``, against underflow and overflow
        for _ in range(min(self.iterations, y.shape[1])):
            basis.append(widened(u))
            rows = [as_rows(widened(p), batched) for p in products([y], xs, [u])]
            if not basis[1:]:
                scale = torch.stack([r.abs().amax(1, keepdim=True) for r in rows]).amax(0)
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            v = [shaped(r, x) for r, x in zip(normalized(rows), xs, strict=True)]
            w = widened(products(pulled, (free,), v)[0]) / scale
            images.append(w * length_of([r / scale for r in rows]).unsqueeze(1))
            for _ in range(2):  # once more, because rounding leaves a part of a short remainder
                w = w - torch.stack([b * (b * w).sum(1, keepdim=True) for b in basis]).sum(0)
                w = normalized([w])[0]
            u = w.to(y.dtype)
        ours, theirs = torch.stack(basis, 1), torch.stack(images, 1)  # [G, K, m]
        inner = ours @ theirs.mT  # [G, K, K]
        best = torch.linalg.eigh((inner + inner.mT) / 2)[1][:, :, -1:]  # of the largest eigenvalue
        return normalized([(theirs * best).sum(1)])[0].to(y.dtype)
