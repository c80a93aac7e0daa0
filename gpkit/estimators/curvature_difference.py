"""The change of a gradient over a step: a measure of curvature, as in CURE."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows, gradients, mended
from gpkit.autodiff.numerics import length_of, nonzero_mask, reduce_rows, shaped, steepest, wide
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_function, require_gradient


@dataclass(frozen=True)
class curvature_difference(Estimator):
    r"""The norm of the change of the gradient over a step along its signs.

    .. math:: n^2 = \|\nabla f(x + h z) - \nabla f(x)\|^2,
              \quad z = \mathrm{sign} \nabla f(x) \, / \, \|\mathrm{sign} \nabla f(x)\|

    z is a constant. For small h, n is about h‖Hz‖, with H the Hessian; n is zero if the gradient is
    zero. Give the penalty a callable, not a tensor. It needs a double backward.

    Args:
        h: the Euclidean length of the step, > 0.

    Raises:
        ValueError: if ``h`` is not > 0.

    Source: Moosavi-Dezfooli et al. (2019), arXiv:1811.09716.

    >>> import gpkit
    >>> penalty = gpkit.GradientPenalty(estimator=curvature_difference(0.5))
    >>> penalty(lambda x: (x**2).sum(1), torch.ones(4, 1)).item()  # (2·(1 + ½) - 2·1)²
    1.0
    """

    h: float = 1.5

    reuses_graph = False

    def __post_init__(self) -> None:
        checks.number("curvature_difference(h=...)", self.h, 0, strict=True)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse orders above one, and weights.

        Raises:
            ValueError: if ``order`` > 1, or the variables are weights.
        """
        require_gradient(self, order)
        if not batched:
            raise ValueError("`estimator=curvature_difference()` needs wrt='input'; got weights")

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        evaluate = require_function(self, target)
        here = gradients(target.y.sum(), target.xs)
        signs = steepest([as_rows(g.detach().to(wide(g)), True) for g in here], "l1")
        length = length_of(signs)
        scale = (self.h / torch.where(length > 0, length, torch.ones_like(length))).unsqueeze(1)
        pairs = zip(target.xs, signs, strict=True)
        xs = tuple(x + shaped(v * scale, x) for x, v in pairs)
        moved_y = evaluate(*xs)
        with mended(moved_y):
            there = gradients(moved_y.sum(), xs)
        moved = nonzero_mask(length).unsqueeze(1)  # [G, 1]
        changes = [
            as_rows(b.to(wide(b)) - a, True) * moved for a, b in zip(here, there, strict=True)
        ]
        return reduce_rows([tuple(changes)], norm)
