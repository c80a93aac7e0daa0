"""Penalties of a scalar's gradient in the inputs: a loss, a field, a sum of outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.at import At, Bound, data, mixture, uniform
from gpkit.axes.form import squared, two_sided
from gpkit.axes.of import class_sum
from gpkit.axes.weight import Schedule
from gpkit.estimators.curvature_difference import curvature_difference
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def input_grad_norm(
    weight: float | Schedule = 1.0, norm: str = "l2", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of each sample's loss in its input: double backpropagation.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla_{x_i} \ell_i\|^2

    Called ``penalty(losses, x)`` with per-sample losses ``[B]`` or ``[B, 1]`` of an ``x``
    ``[B, *S]`` that requires grad, or ``penalty(f, x)``. A scalar loss is refused: its mean hides
    a factor 1/B in every gradient.

    Args:
        weight: λ.
        norm: "l2", or the duals of an adversary's L-inf and L1 balls: "l1", "linf".
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Drucker and LeCun (1992), doi:10.1109/72.165600; Ross and Doshi-Velez (2018),
    arXiv:1711.09404.

    >>> import torch
    >>> f = lambda x: (x**2).sum(1)                    # ∇ℓ = 2x
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> input_grad_norm(weight=1.0)(f, x).item()       # (4 + 16) / 2
    10.0
    """
    return preset(
        "input_grad_norm", weight, Axes(of="loss", wrt="input", form=squared(norm=norm)), axes
    )


def eikonal(
    weight: float | Schedule = 0.1,
    center: float = 1.0,
    low: Bound | None = None,
    high: Bound | None = None,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Draw the slope of a field to one, as that of a signed distance.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla_{x_i} f(x_i)\| - 1)^2

    Called ``penalty(f, x)`` with the points ``[B, d]`` of your choice. With a box, the mean is over
    x and as many uniform points in the box, as in the paper.

    Args:
        weight: λ.
        center: the slope wanted, 1.
        low: the box's lower end, a number or one for each dimension; None for no box.
        high: its upper end, likewise.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Gropp et al. (2020), arXiv:2002.10099.

    >>> import torch
    >>> eikonal(weight=0.1)(lambda x: 3 * x.sum(1), torch.zeros(4, 1)).item()  # 0.1 (3 - 1)²
    0.4000000059604645
    """
    if (low is None) != (high is None):
        raise ValueError(
            f"`eikonal(low=..., high=...)` needs both ends of the box, or none; got {low}, {high}"
        )
    at: At = data() if low is None or high is None else mixture("data", uniform(low, high))
    chosen = Axes(of="output", wrt="input", form=two_sided(center), at=at)
    return preset("eikonal", weight, chosen, axes)


def duq(
    weight: float | Schedule = 0.5, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Draw the slope of the sum over classes to one: sensitive to the input, and not too much.

    .. math:: \lambda \, \text{mean}_i \, \Big(\Big\|\nabla_{x_i} \sum_c f_c(x_i)\Big\| - 1\Big)^2

    Called ``penalty(outputs, x)`` with ``[B, C]``, or ``penalty(net, x)``. In the paper f are the
    kernel values of the classes. The softmax of logits has a constant sum: give it the logits.

    Args:
        weight: λ.
        center: the slope wanted, 1.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: van Amersfoort et al. (2020), arXiv:2003.02037.

    >>> import torch
    >>> f = lambda x: torch.cat([2 * x, 3 * x], 1)  # the sum has slope 5
    >>> duq(weight=0.5)(f, torch.zeros(4, 1)).item()  # ½ (5 - 1)²
    8.0
    """
    return preset("duq", weight, Axes(of=class_sum, wrt="input", form=two_sided(center)), axes)


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
