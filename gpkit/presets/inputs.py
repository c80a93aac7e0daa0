"""Penalties of one number's gradient in the inputs: a loss, a field, a sum of outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.at import At, data
from gpkit.axes.form import squared, two_sided
from gpkit.axes.given.keys import Key
from gpkit.axes.mixtures import Bound, mixture, uniform
from gpkit.axes.of import class_sum, log_probabilities
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

    Call ``penalty(losses, x)`` with one loss for each sample, ``[B]`` or ``[B, 1]``, and an ``x``
    ``[B, *S]`` that requires grad; or ``penalty(f, x)``. Of losses of steps ``[B, T]`` the loss of
    a sample is the sum, Σ_t w_it ℓ_it with weights or a mask of the steps, ``sample_weight=w``. A
    scalar loss is an error: its mean hides a factor 1/B in every gradient.

    Args:
        weight: λ, a factor of the whole square: there is no ½ inside.
        norm: "l2"; "l1" or "linf", the dual norms for an adversary in an L-inf or an L1 ball.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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


def sobolev(
    weight: float | Schedule = 1.0, target: Key = "gradient", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Fit the gradient of a function to given ones: Sobolev training, forces, normals.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla_{x_i} f(x_i) - g_i\|^2

    Call ``penalty(f, x, target=g)``, or ``penalty(y, x, target=g)`` with y ``[B]`` of an ``x``
    ``[B, *S]`` that requires grad, and g ``[B, *S]``. For forces, which are -∇E, use
    ``of=lambda energy: -energy``; the mean over the 3N components of N atoms has
    ``form=gpkit.squared(scale=1 / (3 * N))``. For several outputs g is the Jacobian ``[B, m, *S]``.

    Args:
        weight: λ, a factor of the whole square: there is no ½ inside.
        target: the key of g in the batches of `PenalizedModule` and `GradientPenaltyCallback`, or a
            function of the batch.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Raises:
        TypeError: in the call, if there is no target.

    Source: Czarnecki et al. (2017), arXiv:1706.04859.

    >>> import torch
    >>> x, g = torch.ones(4, 2), torch.tensor([3.0, 0.0]).expand(4, 2)
    >>> sobolev()(lambda x: (x**2).sum(1), x, target=g).item()  # ‖(2, 2) - (3, 0)‖²
    5.0
    """
    chosen = Axes(of="output", wrt="input", form=squared(), given={"target": target})
    return preset("sobolev", weight, chosen, axes)


def right_reasons(
    weight: float | Schedule = 1000.0, mask: Key = "mask", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise a classifier's gradient where the input should not matter.

    .. math:: \lambda \, \text{mean}_i \,
              \sum_d \Big( A_{id} \, \partial_d \sum_k \log p_k(x_i) \Big)^2

    p is the softmax of the net's outputs. Call ``penalty(net, x, metric=A)`` with A 1 where the
    input is irrelevant, and 0 elsewhere; or ``penalty(logits, x, metric=A)`` with logits ``[B, C]``
    of an ``x`` ``[B, *S]`` that requires grad. A broadcasts: ``[*S]`` is the same mask for all.

    Args:
        weight: λ, the paper's λ₁, with the mean over samples instead of their sum.
        mask: the key of A in the batches of `PenalizedModule` and `GradientPenaltyCallback`, or a
            function of the batch.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Raises:
        TypeError: in the call, if there is no metric.

    Source: Ross, Hughes and Doshi-Velez (2017), arXiv:1703.03717.

    >>> import torch
    >>> net = lambda x: torch.stack([2 * x[:, 0] + x[:, 1], 0 * x[:, 0]], 1)
    >>> mask = torch.tensor([1.0, 0.0])
    >>> value = right_reasons(weight=1.0)(net, torch.tensor([[1.0, -2.0]]), metric=mask)
    >>> value.item()  # z = (0, 0), p = (½, ½): ∂₀ Σ log p = 2·½ - 2·½
    0.0
    """
    chosen = Axes(of=log_probabilities, wrt="input", form=squared(), given={"metric": mask})
    return preset("right_reasons", weight, chosen, axes)


def eikonal(
    weight: float | Schedule = 0.1,
    center: float = 1.0,
    low: Bound | None = None,
    high: Bound | None = None,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Pull the slope of a field to one, as a signed distance has it.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla_{x_i} f(x_i)\| - 1)^2

    Call ``penalty(f, x)`` with points ``[B, d]`` of your choice. With a box, the mean is over x and
    B uniform points in the box, as in the paper.

    Args:
        weight: λ, the paper's λ.
        center: the slope that costs nothing, 1 in the formula.
        low: the lower end of the box, a number, or one for each dimension; None for no box.
        high: the upper end of the box, in the same way.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Raises:
        ValueError: if only one end of the box is given.

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
    r"""Pull the slope of the sum over classes to one: sensitive to the input, but not too much.

    .. math:: \lambda \, \text{mean}_i \, \Big(\Big\|\nabla_{x_i} \sum_c f_c(x_i)\Big\| - 1\Big)^2

    Call ``penalty(net, x)``, or ``penalty(outputs, x)`` with outputs ``[B, C]`` of an ``x``
    ``[B, *S]`` that requires grad. In the paper f are kernel values, one for each class. For a
    classifier give the logits: the sum of a softmax is constant.

    Args:
        weight: λ, a factor of the whole square: there is no ½ inside.
        center: the slope that costs nothing, 1 in the formula.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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

    Call ``penalty(f, x)`` with a function that gives losses ``[B]`` for ``x`` ``[B, *S]``. It is
    evaluated at two points, so a tensor of losses is an error.

    Args:
        weight: λ, the paper's γ: there is no factor 1/h² inside. The authors' code has the norm,
            not its square, of the gradient of the batch's mean loss, so at the same number it is
            another strength: its γ 4 at h 3 is no λ 4 here.
        h: the length of the step.
        **axes: see `gpkit.presets`. The authors' code has the net in eval mode meanwhile:
            ``forward="eval"``.

    Returns:
        The penalty.

    Source: Moosavi-Dezfooli et al. (2019), arXiv:1811.09716.

    >>> import torch
    >>> f = lambda x: (x**2).sum(1)                    # ∇ℓ = 2x, so ‖2hz‖² = 4h²
    >>> cure(weight=1.0, h=1.5)(f, torch.tensor([[1.0, -2.0], [3.0, 0.0]])).item()
    9.0
    """
    return preset(
        "cure", weight, Axes(of="loss", wrt="input", estimator=curvature_difference(h)), axes
    )
