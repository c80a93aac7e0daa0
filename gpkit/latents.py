"""What the path length of a generator is made of: a Gaussian Jᵀy, and the pixels of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit.derivatives import as_rows, gradients
from gpkit.draws import Source, normal
from gpkit.targets import Estimator, Target


@dataclass(frozen=True)
class per_pixel:  # noqa: N801  axes read as functions: of=per_pixel()
    """The output over the root of its number of pixels: f / √(H·W) of ``[B, C, H, W]``.

    The pixels are all dimensions but the first two; ``[B]`` and ``[B, C]`` have one pixel.

    >>> per_pixel()(torch.ones(1, 3, 2, 2))[0, 0, 0]
    tensor([0.5000, 0.5000])
    """

    def __call__(self, output: Tensor) -> Tensor:
        """Return the scaled output, of the same shape."""
        return output / math.sqrt(math.prod(output.shape[2:]))


@dataclass(frozen=True)
class gaussian_product(Estimator):  # noqa: N801  estimators read as functions
    r"""One product of the Jacobian with a Gaussian vector, whose length is itself the quantity.

    .. math:: n^2 = \frac1L \|J^\top y\|^2, \quad y \sim N(0, I)

    A variable ``[G, L, D]`` has L rows, whose squared lengths are averaged; ``[G, D]`` has one.
    Unlike ``projection(1, "gaussian")`` it draws y for one output as well. The mean of n² is
    ‖J‖_F² / L.

    Source: Karras et al. (2020), arXiv:1912.04958.
    """

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse what has no such product.

        Raises:
            ValueError: if it is not the l2 norm of a first derivative.
        """
        if order > 1 or norm != "l2":
            raise ValueError(
                "`estimator=gaussian_product()` is the l2 norm of a first derivative; "
                f"got order={order}, norm={norm!r}: use estimator='projection'"
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        wide = torch.promote_types(target.y.dtype, torch.float32)
        y = normal(rng, target.y.shape, target.y.device, wide).to(target.y.dtype)
        total = torch.zeros(len(target.y), device=y.device, dtype=wide)
        for x, g in zip(target.xs, gradients((target.y * y).sum(), target.xs), strict=True):
            rows = math.prod(x.shape[1:-1]) if target.batched else 1  # L
            entries = as_rows(g, target.batched)
            total = total + entries.to(wide).square().sum(1) / rows
        return total
