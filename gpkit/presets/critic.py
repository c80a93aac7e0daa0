"""Penalties of a critic D, in its inputs. x are real samples, y fake ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.forms import one_sided, squared, two_sided
from gpkit.penalty import Axes, GradientPenalty
from gpkit.points import fake, interpolate, real
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    return preset(
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
    return preset(
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
    return preset("r1", weight, Axes(wrt="input", form=squared(scale=0.5), at=real()), axes)


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
    return preset("r2", weight, Axes(wrt="input", form=squared(scale=0.5), at=fake()), axes)
