"""The penalty on the curvature of the loss in the weights. L is the loss of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.estimators import projection
from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule
from gpkit.variables import weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def hessian(
    weight: float | Schedule = 1e-4, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the Hessian of the loss in the weights.

    .. math:: \lambda \, \|\nabla^2_\theta L\|_F^2, \quad L = \text{mean}_i \, \ell_i

    Estimated without bias as λ ‖∇²L v‖², v of ±1, in two backward passes for each projection.
    Called as `weight_grad_norm`: ``penalty(loss, net.parameters())``, or ``penalty(closure, net)``.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`; ``estimator`` is ``projection(1)``; "exact" takes a backward
            pass for every parameter.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: the estimate is Hutchinson's (1989), doi:10.1080/03610918908812806.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian(weight=1.0)(w[0] ** 3 + w[1] ** 3, [w]).item()  # ∇²L = diag(6, 12), 36 + 144
    180.0
    """
    chosen = Axes(of="loss", wrt=weights(match), order=2, estimator=projection(1))
    return preset("hessian", weight, chosen, axes)
