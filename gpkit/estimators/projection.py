"""Random projections, an unbiased estimate of the squared Frobenius norm."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows, gradients
from gpkit.autodiff.numerics import reduce_rows, wide
from gpkit.autodiff.random import Source, normal
from gpkit.estimators.base import Estimator, Target

DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")


@dataclass(frozen=True)
class projection(Estimator):
    r"""Random projections: an unbiased estimate of the squared Frobenius norm.

    .. math:: n^2 = \frac1N \sum_{j=1}^N
              \|\nabla\, D_{v_{k-1}} \cdots D_{v_1} \langle v_0, f \rangle \|^2

    with independent v, E[v vᵀ] = I, for each level, sample and j. Each projection takes k backward
    passes. The gradient of a scalar needs no projection: it is exact, and takes one pass. Forms
    that take the root of n² (norm, two-sided) use the root of the estimate, which is biased.

    Args:
        n: N, the number of projections.
        distribution: the distribution of v: "rademacher" (±1, the smallest variance), "gaussian",
            or "sphere" (uniform on the sphere of radius √d).

    Raises:
        ValueError: if ``n`` < 1, or ``distribution`` is another name.

    Source: Hutchinson (1989); for Jacobians Hoffman, Roberts and Yaida (2019), arXiv:1908.02729.

    >>> import gpkit
    >>> A = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    >>> penalty = gpkit.GradientPenalty(estimator=projection(2), seed=0)
    >>> round(penalty(lambda x: x @ A, torch.ones(10_000, 2)).item())  # ‖A‖_F², on average
    25
    """

    n: int = 1
    distribution: str = "rademacher"

    by_pixel = True
    by_group = True
    compares = True

    def __post_init__(self) -> None:
        checks.integer("projection(n=...)", self.n, 1)
        checks.choice("projection(distribution=...)", self.distribution, DISTRIBUTIONS)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse norms other than l2.

        Raises:
            ValueError: if the norm is not l2.
        """
        if norm != "l2":
            raise ValueError(
                f"`estimator=projection()` estimates the l2 norm; got norm={norm!r}: "
                "use estimator='exact'"
            )

    def is_random(self, target: Target, order: int) -> bool:
        """Whether n² is a random estimate: the gradient of one number is exact."""
        return order > 1 or target.y.shape[1] > 1

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return the estimate of n² ``[G]``, differentiable, in float32 or better."""
        count = self.n if self.is_random(target, order) else 1
        draws = [self.once(target, order, norm, rng) for _ in range(count)]
        return torch.stack(draws).mean(0)

    def once(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return one unbiased estimate of n² ``[G]``."""
        rows: tuple[Tensor, ...] = (target.y,)
        compared = target.compared
        if compared is not None and order > 1:
            raise ValueError(
                "`estimator=projection()` takes target= and metric= at order=1; got "
                f"order={order}: use estimator='exact'"
            )
        for _ in range(order):
            # A single entry is not projected: v = ±1 changes nothing, a Gaussian v adds noise.
            alone = len(rows) == 1 and rows[0].shape[1] == 1
            vs = [torch.ones_like(r) for r in rows] if alone else self.draw(rows, rng)
            along = sum((r * v).sum() for r, v in zip(rows, vs, strict=True))
            assert isinstance(along, Tensor)
            compared = compared and compared.projected(vs[0])
            rows = tuple(as_rows(g, target.batched) for g in gradients(along, target.xs))
        split = replace(target, compared=compared).split([rows])
        return reduce_rows(split, norm, target.groups, len(target.y))

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
