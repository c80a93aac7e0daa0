"""Penalties that evaluate a gradient at two points. L is the loss of the batch, ℓ of a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit import checks
from gpkit.differences import finite_difference
from gpkit.forms import norm
from gpkit.gradient_differences import curvature_difference
from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


def gnp(
    weight: float | Schedule | None = None,
    r: float = 0.05,
    alpha: float = 0.8,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Penalise the norm of the loss's gradient in the weights, as sharpness-aware training does.

    .. math:: \lambda \, \|\nabla_\theta L\|, \quad \lambda = \alpha r

    trained by a finite difference of length r, so that the gradient of the loss and penalty is

    .. math:: (1 - \alpha) \nabla L(\theta)
              + \alpha \nabla L(\theta + r \, \nabla L / \|\nabla L\|).

    α = 1 is exactly SAM. Called ``penalty.with_loss(closure, net)``, which gives loss and penalty
    for two forward and backward passes in all, or ``penalty(closure, net)`` to add to a loss of
    your own, for one more.

    Args:
        weight: λ, or a schedule of it; None is α·r.
        r: the length of the step, SAM's ρ.
        alpha: α, the part of the gradient that is taken at the other point.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Zhao, Zhang and Hu (2022), arXiv:2202.03599; SAM: Foret et al. (2021),
    arXiv:2010.01412.

    >>> import torch
    >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> total = gnp(r=0.5, alpha=1.0).with_loss(lambda: (w**2).sum() / 2, [w])  # ∇L = w
    >>> total.item(), torch.autograd.grad(total, w)[0]  # 25/2 + 0.5·5 and w + 0.5 w/‖w‖
    (15.0, tensor([3.3000, 4.4000]))
    """
    checks.number("gnp(r=...)", r, 0, strict=True)
    checks.number("gnp(alpha=...)", alpha, 0)
    return preset(
        "gnp",
        alpha * r if weight is None else weight,
        Axes(of="loss", wrt="weight", form=norm(), estimator=finite_difference(r)),
        axes,
    )


def cure(weight: float | Schedule = 4.0, h: float = 1.5, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the curvature of each sample's loss along the signs of its gradient: CURE.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla \ell_i(x_i + h z_i) - \nabla \ell_i(x_i)\|^2,
              \quad z_i = \mathrm{sign} \nabla \ell_i \, / \, \|\mathrm{sign} \nabla \ell_i\|

    There is no factor 1/h². Called ``penalty(f, x)`` with a function that gives losses ``[B]``; a
    graph alone is refused, as it is evaluated at two points.

    Args:
        weight: λ.
        h: the length of the step.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Moosavi-Dezfooli et al. (2019), arXiv:1811.09716.

    >>> import torch
    >>> f = lambda x: (x**2).sum(1)                    # ∇ℓ = 2x, so ‖2hz‖² = 4h²
    >>> cure(weight=1.0, h=1.5)(f, torch.tensor([[1.0, -2.0], [3.0, 0.0]])).item()
    9.0
    """
    return preset(
        "cure", weight, Axes(of="loss", wrt="input", estimator=curvature_difference(h)), axes
    )
