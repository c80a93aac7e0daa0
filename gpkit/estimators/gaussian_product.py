"""The product of the Jacobian with a Gaussian vector, as in StyleGAN2."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit.autodiff.derivatives import as_rows, gradients
from gpkit.autodiff.numerics import wide
from gpkit.autodiff.random import Source, normal
from gpkit.estimators.base import Estimator, Target


@dataclass(frozen=True)
class gaussian_product(Estimator):
    r"""The norm of the product of the Jacobian with one Gaussian vector.

    .. math:: n^2 = \frac1L \|J^\top y\|^2, \quad y \sim N(0, I)

    A variable ``[G, L, D]`` has L rows, whose squared lengths are averaged; ``[G, D]`` has one.
    Unlike ``projection(1, "gaussian")`` it draws y for a single output too. The expected value of
    n² is ‖J‖_F² / L.

    Source: Karras et al. (2020), StyleGAN2, arXiv:1912.04958.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(estimator=gaussian_product(), seed=0)
    >>> round(penalty(lambda x: 3 * x[:, 0], torch.ones(100_000, 2)).item())  # 9 E[y²]
    9
    """

    frobenius = False

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but the l2 norm of a first derivative.

        Raises:
            ValueError: if the order or the norm is another.
        """
        if order > 1 or norm != "l2":
            raise ValueError(
                "`estimator=gaussian_product()` gives the l2 norm of a first derivative; "
                f"got order={order}, norm={norm!r}: use estimator="
                + ("'projection'" if norm == "l2" else "'exact'")
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        y = normal(rng, target.y.shape, target.y.device, wide(target.y)).to(target.y.dtype)
        total = torch.zeros(len(target.y), device=y.device, dtype=wide(y))
        for x, g in zip(target.xs, gradients((target.y * y).sum(), target.xs), strict=True):
            rows = math.prod(x.shape[1:-1]) if target.batched else 1  # L
            entries = as_rows(g, target.batched)
            total = total + entries.to(total.dtype).square().sum(1) / rows
        return total
