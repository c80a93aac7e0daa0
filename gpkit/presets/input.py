"""Penalties in the inputs. f is the net, ℓ its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.estimators import projection
from gpkit.forms import squared, two_sided
from gpkit.mixtures import Bound, mixture, uniform
from gpkit.penalty import Axes, GradientPenalty
from gpkit.points import At, data
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule

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


def jacobian(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the Jacobian of the outputs (logits) in the inputs.

    .. math:: \frac\lambda2 \, \text{mean}_i \,
              \Big\|\frac{\partial f(x_i)}{\partial x_i}\Big\|_F^2

    The ½ is inside. Called ``penalty(logits, x)`` with ``[B, C]``, or ``penalty(net, x)``.

    Args:
        weight: λ.
        **axes: of `GradientPenalty`; ``estimator`` is ``projection(1)``, one backward pass;
            "exact" takes C of them.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Hoffman, Roberts and Yaida (2019), arXiv:1908.02729.

    >>> import torch
    >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> penalty = jacobian(weight=1.0, estimator="exact")
    >>> penalty(lambda x: x @ A.T, torch.zeros(5, 2)).item()  # ½‖A‖² = 30 / 2
    15.0
    """
    return preset(
        "jacobian",
        weight,
        Axes(of="output", wrt="input", form=squared(scale=0.5), estimator=projection(1)),
        axes,
    )


def curvature(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the k-th derivative of the outputs in the inputs.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla^k_{x_i} f(x_i)\|_F^2

    The norm is over all outputs and all n^k entries, mixed ones as often as they occur. A large
    weight leaves polynomials of degree k - 1. Called ``penalty(f, x)`` or ``penalty(y, x)``.

    Args:
        weight: λ.
        **axes: of `GradientPenalty`; ``order`` is k, 2 if not given; ``estimator="projection"``
            takes k backward passes, "exact" 1 + n + ... + n^(k-1) of them for each output.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: the order 2 in one dimension is the cubic smoothing spline's, Reinsch (1967),
    doi:10.1007/BF02162161.

    >>> import torch
    >>> A = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> f = lambda x: torch.einsum("bi,ij,bj->b", x, A, x)
    >>> curvature(weight=1.0)(f, torch.ones(4, 2)).item()  # ‖A + Aᵀ‖² = 4 + 4 + 4 + 36
    48.0
    """
    return preset("curvature", weight, Axes(of="output", wrt="input", order=2), axes)


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
