"""Estimators: how the squared norm n² of a derivative is obtained. Each returns n² [G]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.derivatives import as_rows, derivative_rows, gradients
from gpkit.draws import Source, normal


@dataclass(frozen=True)
class Target:
    """What is differentiated, with respect to what.

    Args:
        y: ``[G, m]``: m outputs for each of G groups.
        xs: the variables: ``[G, *S]`` each if ``batched``, else any shapes and G = 1.
        batched: whether group g of ``y`` depends on ``x[g]`` alone.
        evaluate: gives ``y`` anew, with the same random numbers: at the inputs that it is called
            with, or, called with nothing, at the weights as they are. None where only a graph is.
    """

    y: Tensor
    xs: tuple[Tensor, ...]
    batched: bool
    evaluate: Callable[..., Tensor] | None = None


class Estimator:
    """How n² is obtained."""

    # Whether the graph of the function is enough; if not, the function itself is needed.
    reuses_graph = True
    # Whether a backward pass goes through each graph but once: then it needs no double backward.
    first_order = False

    def check(self, order: int, batched: bool) -> None:
        """Refuse a derivative that it does not estimate: of inputs if ``batched``, else weights."""

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        raise NotImplementedError(f"{type(self).__name__} must define squared_norms")


@dataclass(frozen=True)
class exact(Estimator):  # noqa: N801  estimators read as functions: estimator=projection(4)
    """All entries of the derivative, by nested double backprop.

    m outputs in n variables take m·(1 + n + ... + n^(k-1)) backward passes: one for the gradient
    of a scalar, m for a Jacobian, n + 1 for a scalar's Hessian.
    """

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        return reduce_rows(
            derivative_rows(target.y, target.xs, order, batched=target.batched), norm
        )


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
        return reduce_rows([rows], norm)

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


DISTRIBUTIONS = ("rademacher", "gaussian", "sphere")
ESTIMATORS = {"exact": exact, "projection": projection}


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which norms are taken: float32 for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def reduce_rows(rows: object, norm: str) -> Tensor:
    """Return n² ``[G]`` of a derivative whose entries come in rows, each a tuple of ``[G, n]``."""
    total: Tensor | None = None
    for row in rows:  # type: ignore[attr-defined]
        for part in row:
            part = part.to(wide(part))
            if norm == "l2":
                part = part.square().sum(1)
            elif norm == "l1":
                part = part.abs().sum(1)
            else:
                part = part.abs().amax(1)
            if total is None:
                total = part
            else:
                total = torch.maximum(total, part) if norm == "linf" else total + part
    assert total is not None, "a derivative has at least one entry"
    return total if norm == "l2" else total.square()
