"""The named penalties. Each is one choice on every axis of `GradientPenalty`.

Every preset takes that class's arguments as well (``order``, ``estimator``, ``every``, ``scope``,
...), which replace its own choice. ``weight`` is the factor λ of the formula; where a paper writes
γ/2, the ½ is inside and ``weight`` is γ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.estimators import projection
from gpkit.forms import one_sided, squared, two_sided
from gpkit.penalty import Axes, GradientPenalty
from gpkit.points import fake, interpolate, real
from gpkit.schedules import Schedule
from gpkit.variables import weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def none(weight: float | Schedule = 0.0, **axes: Unpack[Axes]) -> GradientPenalty:
    """No penalty: 0, the baseline of every comparison. Nothing is evaluated.

    Args:
        weight: accepted, so that a sweep over penalties can set it, and without effect.
        **axes: of `GradientPenalty`; likewise.

    Returns:
        A penalty that is zero whatever it is called with.

    >>> import torch
    >>> none()(torch.tensor(3.0), [])
    tensor(0.)
    """
    return _preset("none", 0.0, Axes(), axes)


def weight_grad_norm(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of the loss in the weights.

    .. math:: \lambda \, \|\nabla_\theta L\|^2, \quad L = \text{mean}_i \, \ell_i

    Called ``penalty(loss, net.parameters())`` with a loss ``[]`` (or losses ``[B]``, whose mean is
    taken), or ``penalty(closure, net)``. The norm is that of the micro-batch's mean gradient, over
    all parameters together. Strength: Barrett and Dherin write the implicit penalty of a step lr as
    (lr/4) ‖∇L‖²; here λ is the whole factor.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`. With ``order=k`` >= 2 the norm is that of the k-th derivative,
            estimated by projections unless ``estimator`` says otherwise.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Barrett and Dherin (2021), arXiv:2009.11162; Smith et al. (2021), arXiv:2101.12176.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> loss = (w**2).sum()                            # ∇L = 2w, ‖∇L‖² = 4·5
    >>> weight_grad_norm(weight=0.1)(loss, [w]).item()
    2.0
    """
    return _preset("weight_grad_norm", weight, Axes(of="loss", wrt=weights(match)), axes)


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
    return _preset(
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
    return _preset(
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
    return _preset("curvature", weight, Axes(of="output", wrt="input", order=2), axes)


def eikonal(
    weight: float | Schedule = 0.1, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Draw the slope of a field to one, as that of a signed distance.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla_{x_i} f(x_i)\| - 1)^2

    Called ``penalty(f, x)`` with the points ``[B, d]`` of your choice.

    Args:
        weight: λ.
        center: the slope wanted, 1.
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
    return _preset("eikonal", weight, Axes(of="output", wrt="input", form=two_sided(center)), axes)


def wgan_gp(
    weight: float | Schedule = 10.0, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Draw a critic's slope to one on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla D(\hat x_i)\| - 1)^2,
              \quad \hat x_i = \alpha_i x_i + (1 - \alpha_i) y_i, \quad \alpha_i \sim U[0, 1]

    One α for each sample; the norm is over all entries of a sample, channels and pixels included.
    Called ``penalty(critic, real=x, fake=y)``, ``[B, *S]`` both; the samples are detached. A critic
    of several scores (patches) has the Frobenius norm of its Jacobian, a backward pass for each
    score: for the gradient of the mean score use ``of=lambda scores: scores.flatten(1).mean(1)``.

    Args:
        weight: λ.
        center: the slope wanted, 1.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Gulrajani et al. (2017), arXiv:1704.00028.

    >>> import torch
    >>> critic = lambda x: x.flatten(1) @ torch.tensor([3.0, 4.0])  # slope 5 everywhere
    >>> wgan_gp()(critic, real=torch.ones(8, 2), fake=torch.zeros(8, 2)).item()
    160.0
    """
    return _preset(
        "wgan_gp", weight, Axes(wrt="input", form=two_sided(center), at=interpolate()), axes
    )


def wgan_lp(
    weight: float | Schedule = 10.0, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Keep a critic's slope under one on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, \max(0, \|\nabla D(\hat x_i)\| - 1)^2

    The interpolates, the call and the norm are those of `wgan_gp`; smaller slopes cost nothing.

    Args:
        weight: λ.
        center: the largest slope that is free, 1.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Petzka, Fischer and Lukovnikov (2018), arXiv:1709.08894.

    >>> import torch
    >>> x = torch.ones(8, 1)
    >>> [wgan_lp()(lambda x: a * x, real=x, fake=-x).item() for a in (0.5, 3.0)]
    [0.0, 40.0]
    """
    return _preset(
        "wgan_lp", weight, Axes(wrt="input", form=one_sided(center), at=interpolate()), axes
    )


def r1(weight: float | Schedule = 10.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's gradient on real samples.

    .. math:: \frac\gamma2 \, \text{mean}_i \, \|\nabla D(x_i)\|^2

    The ½ is inside: ``weight`` is γ. Called ``penalty(critic, real=x)``, or ``penalty(scores, x)``
    with scores ``[B]`` or ``[B, 1]`` of an ``x`` that requires grad. Lazily, as in StyleGAN2, with
    ``every=16``.

    Args:
        weight: γ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406.

    >>> import torch
    >>> r1(weight=10.0)(lambda x: (x**2).sum(1) / 2, real=torch.full((4, 1), 2.0)).item()  # 10/2·2²
    20.0
    """
    return _preset("r1", weight, Axes(wrt="input", form=squared(scale=0.5), at=real()), axes)


def r2(weight: float | Schedule = 10.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's gradient on fake samples.

    .. math:: \frac\gamma2 \, \text{mean}_i \, \|\nabla D(y_i)\|^2

    The ½ is inside: ``weight`` is γ. Called ``penalty(critic, fake=y)``, or ``penalty(scores, y)``;
    the samples are detached, so the generator is not trained by it.

    Args:
        weight: γ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406.

    >>> import torch
    >>> r2(weight=10.0)(lambda x: (x**2).sum(1) / 2, fake=torch.full((4, 1), 2.0)).item()
    20.0
    """
    return _preset("r2", weight, Axes(wrt="input", form=squared(scale=0.5), at=fake()), axes)


def _preset(name: str, weight: float | Schedule, chosen: Axes, axes: Axes) -> GradientPenalty:
    """Return the penalty of the axes that a preset chose, where the caller chose no other."""
    merged: Axes = {"name": name, **chosen, **axes}
    return GradientPenalty(weight=weight, **merged)


PRESETS = {
    preset.__name__: preset
    for preset in (
        none,
        weight_grad_norm,
        input_grad_norm,
        jacobian,
        curvature,
        eikonal,
        wgan_gp,
        wgan_lp,
        r1,
        r2,
    )
}
