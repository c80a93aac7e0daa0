"""Penalties of critics D: x is real, y is fake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.at import fake, interpolate, mixture, perturb, real
from gpkit.axes.form import one_sided, power, squared, two_sided
from gpkit.axes.weight import Schedule
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

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


def r1_r2(weight: float | Schedule = 1.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's gradient on real and on fake samples: the sum of `r1` and `r2`.

    .. math:: \frac\gamma2 \, \text{mean}_i \, \|\nabla D(x_i)\|^2
              + \frac\gamma2 \, \text{mean}_i \, \|\nabla D(y_i)\|^2

    The ½ is inside: ``weight`` is γ. Called ``penalty(critic, real=x, fake=y)``, as many of both;
    the critic is evaluated once, on all of them, and its 2B norms are those of x, then of y. For
    two weights use ``gpkit.sum({"r1": {"weight": 1}, "r2": {"weight": 2}})``.

    Args:
        weight: γ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Huang et al. (2024), R3GAN, arXiv:2501.05441.

    >>> import torch
    >>> x, y = torch.full((4, 1), 2.0), torch.full((4, 1), 4.0)
    >>> r1_r2(weight=1.0)(lambda x: (x**2).sum(1) / 2, real=x, fake=y).item()  # ½·2² + ½·4²
    10.0
    """
    # γ times the mean over both is γ/2 times the sum of both means, where they are as many.
    at = mixture("real", "fake", equal=True)
    return preset("r1_r2", weight, Axes(wrt="input", form=squared(), at=at), axes)


def dragan(
    weight: float | Schedule = 10.0,
    center: float = 1.0,
    scale: float = 0.5,
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Draw a critic's slope to one around the real samples.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla D(x_i + \alpha_i \delta_i)\| - 1)^2, \quad
              \delta_i = \tfrac12 \, \text{std}(x) \, u_i, \quad
              u_i \sim U[-1, 1]^d, \quad \alpha_i \sim U[0, 1]

    The standard deviation is one number: over all entries of the batch, on all ranks. One α for
    each sample. Called ``penalty(critic, real=x)`` or ``penalty(critic, x)``, ``[B, *S]``.

    Args:
        weight: λ.
        center: the slope wanted, 1.
        scale: the ½ in δ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Kodali et al. (2017), arXiv:1705.07215.

    >>> import torch
    >>> critic = lambda x: x.flatten(1) @ torch.tensor([3.0, 4.0])  # slope 5 everywhere
    >>> dragan()(critic, real=torch.ones(8, 2)).item()
    160.0
    """
    at = perturb(scale, noise="uniform", relative=True, along=True)
    return preset("dragan", weight, Axes(wrt="input", form=two_sided(center), at=at), axes)


def zero_gp(weight: float | Schedule = 100.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Draw a critic's slope to zero on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla D(\hat x_i)\|^2

    The interpolates, the call and the norm are those of `wgan_gp`.

    Args:
        weight: λ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Thanh-Tung, Tran and Venkatesh (2019), arXiv:1902.03984.

    >>> import torch
    >>> zero_gp(weight=100.0)(lambda x: 3 * x, real=torch.ones(8, 1), fake=-torch.ones(8, 1)).item()
    900.0
    """
    return preset("zero_gp", weight, Axes(wrt="input", form=squared(), at=interpolate()), axes)


def wgan_div(
    weight: float | Schedule = 2.0, p: float = 6.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise a high power of a critic's slope between real and fake samples.

    .. math:: k \, \text{mean}_i \, \|\nabla D(\hat x_i)\|^p

    The interpolates, the call and the norm are those of `wgan_gp`. It bounds no slope: it makes the
    critic's optimum a divergence, the Wasserstein divergence.

    Args:
        weight: k.
        p: the power, 6.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Wu et al. (2018), arXiv:1712.01026.

    >>> import torch
    >>> wgan_div()(lambda x: 2 * x, real=torch.ones(8, 1), fake=-torch.ones(8, 1)).item()  # 2·2⁶
    128.0
    """
    return preset("wgan_div", weight, Axes(wrt="input", form=power(p), at=interpolate()), axes)


def max_gp(weight: float | Schedule = 1.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's largest slope between real and fake samples.

    .. math:: \lambda \, \max_i \, \|\nabla D(\hat x_i)\|^2

    The interpolates, the call and the norm are those of `wgan_gp`. The maximum is over the
    micro-batch of one rank; samples that tie share its gradient.

    Args:
        weight: λ.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Zhou et al. (2019), Lipschitz GANs, arXiv:1902.05687.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> max_gp()(lambda x: (x**2).sum(1) / 2, real=x, fake=x).item()  # of 1² and 3²
    9.0
    """
    chosen = Axes(wrt="input", form=squared(), at=interpolate(), reduce="max")
    return preset("max_gp", weight, chosen, axes)
