"""The exact derivative, by nested double backward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gpkit.autodiff.derivatives import as_rows, derivative_rows, gradients
from gpkit.autodiff.layers.batch import Watch, batch_norm
from gpkit.autodiff.layers.norms import sample_norms
from gpkit.autodiff.numerics import reduce_rows, squared_length
from gpkit.autodiff.random import Source
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.estimators.base import Estimator, Target


@dataclass(frozen=True)
class exact(Estimator):
    r"""All entries of the derivative, by nested double backward.

    .. math:: n = \|D^k f\|, \text{ the l2, l1 or linf norm of the form}

    For m outputs, n variables and order k it takes m·(1 + n + ... + n^(k-1)) backward passes: one
    for the gradient of a scalar, m for a Jacobian, n + 1 for the Hessian of a scalar.

    >>> import gpkit, torch
    >>> penalty = gpkit.GradientPenalty(estimator=exact(), order=2)  # ‖Hessian‖²
    >>> penalty(lambda x: (x**3).sum(1), torch.ones(4, 2)).item()  # Hessian 6 I: 2·36
    72.0
    """

    pools = True
    compares = True
    by_pixel = True
    by_layer = True
    by_group = True

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        if target.layers is not None:
            known = target.y.reshape(-1), target.xs, target.layers
            if len(target.y) == 1:
                n2 = batch_norm(*known)
            elif TRACES:
                n2 = sample_norms(*known)
            else:
                with Watch(target.layers.calls) as watch:
                    n2 = sample_norms(*known, watch.gradients)
            return n2 if target.rows is None else n2[target.rows]
        if target.window is not None:
            window, compared = target.window, target.compared
            return window.squared_norms(target.y, target.xs, target.scale, norm, compared)
        plain = not target.pixels and target.compared is None
        groups = () if target.groups is None else (target.groups, len(target.y))
        if order > 1 or target.y.shape[-1:] > (1,):
            rows = derivative_rows(target.y, target.xs, order, batched=target.batched)
            return reduce_rows(rows if plain else target.split(rows), norm, *groups)
        # the faster case of one number, or one number for each group
        y = target.y if target.y.numel() == 1 else target.y.sum()
        grads = gradients(y, target.xs, target.times)
        if norm == "l2" and not target.batched and target.compared is None:
            return squared_length(grads)
        row = tuple([as_rows(g, target.batched) for g in grads])
        return reduce_rows([row] if plain else target.split([row]), norm, *groups)
