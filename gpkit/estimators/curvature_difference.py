"""How far a gradient changes over a step: a curvature, by a difference of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff.derivatives import as_rows, gradients
from gpkit.autodiff.numerics import length_of, nonzero_mask, reduce_rows, steepest, wide
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_function, require_gradient


@dataclass(frozen=True)
class curvature_difference(Estimator):
    r"""How far the gradient changes over a step along its signs.

    .. math:: n^2 = \|\nabla f(x + h z) - \nabla f(x)\|^2,
              \quad z = \mathrm{sign} \nabla f(x) \, / \, \|\mathrm{sign} \nabla f(x)\|

    z is a constant. It is about h‖Hz‖ for a small h, and zero where the gradient is. The penalty
    must be given the function itself, and takes a double backward.

    Args:
        h: the Euclidean length of the step.

    Source: Moosavi-Dezfooli et al. (2019), arXiv:1811.09716.
    """

    h: float = 1.5

    reuses_graph = False

    def __post_init__(self) -> None:
        checks.number("curvature_difference(h=...)", self.h, 0, strict=True)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse all but gradients in the inputs.

        Raises:
            ValueError: for a higher order, or for weights.
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
        xs = tuple(x + (v * scale).reshape(x.shape).to(x.dtype) for x, v in pairs)
        there = gradients(evaluate(*xs).sum(), xs)
        moved = nonzero_mask(length).unsqueeze(1)  # [G, 1]
        changes = [
            as_rows(b.to(wide(b)) - a, True) * moved for a, b in zip(here, there, strict=True)
        ]
        return reduce_rows([tuple(changes)], norm)
