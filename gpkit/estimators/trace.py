"""The trace of the second derivative: the Laplacian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import MAX_PASSES, as_rows, gradients
from gpkit.autodiff.numerics import widened
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_inputs
from gpkit.estimators.projection import projection


@dataclass(frozen=True)
class trace(Estimator):
    r"""The squared trace of the Hessian, the Laplacian, instead of its Frobenius norm.

    .. math:: n^2 = (\mathrm{tr} \, \nabla^2 f)^2, \quad \text{exactly, or as} \quad
              \frac{2}{N (N - 1)} \sum_{j<k} (v_j^\top H v_j) (v_k^\top H v_k)

    for ``order=2``. The exact trace takes one backward pass for each of the d entries of a sample,
    after one for the gradient. With N independent draws of random signs v it takes N; a product of
    two different draws has no bias, unlike the square of one. It may be negative, so forms that
    take a root need the exact trace. For several outputs the squares are added.

    Args:
        n: N >= 2, the number of draws; None for the exact trace.

    Raises:
        ValueError: if ``n`` < 2; in the call, if the exact trace would take more than ten thousand
            backward passes.

    Source: Hutchinson (1989), doi:10.1080/03610918908812806.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(order=2, estimator=trace(), form="norm")
    >>> penalty(lambda x: x[:, 0] ** 2 - 3 * x[:, 1] ** 2, torch.ones(4, 2)).item()  # |2 - 6|
    4.0
    """

    n: int | None = None

    def __post_init__(self) -> None:
        checks.optional_integer("trace(n=...)", self.n, 2)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but second derivatives in inputs.

        Raises:
            ValueError: if the order is another.
        """
        require_inputs(self, norm, batched)
        if order != 2:
            raise ValueError(
                f"`estimator=trace()` is the trace of a second derivative; got order={order}: use "
                "order=2"
            )

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better.

        Args:
            target: the output and the inputs.
            order: 2.
            norm: "l2".
            rng: the random numbers of the draws.

        Returns:
            n² ``[G]``.
        """
        total = torch.zeros(len(target.xs[0]), device=target.device)
        for y in target.y.unbind(1):
            grads = [as_rows(g, True) for g in gradients(y.sum(), target.xs)]
            if self.n is None:
                total = total + self.exactly(grads, target.xs).square()
                continue
            draws = torch.stack([self.drawn(grads, target.xs, rng) for _ in range(self.n)])
            pairs = draws.sum(0).square() - draws.square().sum(0)  # of two different draws
            total = total + pairs / (self.n * (self.n - 1))
        return total

    def exactly(self, grads: Sequence[Tensor], xs: tuple[Tensor, ...]) -> Tensor:
        """Return tr H ``[G]``, from gradients ``[G, n]``.

        Raises:
            ValueError: if it takes too many backward passes.
        """
        count = sum(g.shape[1] for g in grads)
        if count > MAX_PASSES:
            raise ValueError(
                f"the exact trace takes one backward pass for each of {count} entries of a sample, "
                f"over the limit of {MAX_PASSES}: use gpkit.trace(2)"
            )
        parts = []
        for g, x in zip(grads, xs, strict=True):
            for i, column in enumerate(g.unbind(1)):
                (row,) = gradients(column.sum(), (x,))
                parts.append(widened(as_rows(row, True)[:, i]))
        return torch.stack(parts).sum(0)

    def drawn(self, grads: Sequence[Tensor], xs: tuple[Tensor, ...], rng: Source) -> Tensor:
        """Return vᵀHv ``[G]`` for random signs v."""
        vs = projection(1).draw(tuple(grads), rng)
        along = torch.stack([(g * v).sum() for g, v in zip(grads, vs, strict=True)]).sum()
        rows = [as_rows(h, True) for h in gradients(along, xs)]
        parts = [(widened(h) * v).sum(1) for h, v in zip(rows, vs, strict=True)]
        return torch.stack(parts).sum(0)
