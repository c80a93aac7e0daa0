"""Penalties of a critic D: x is a real sample, y a fake one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.at import fake, interpolate, perturb, real
from gpkit.axes.form import one_sided, power, squared, two_sided
from gpkit.axes.mixtures import mixture
from gpkit.axes.weight import Schedule
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def wgan_gp(
    weight: float | Schedule = 10.0, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Pull a critic's slope to one on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla D(\hat x_i)\| - 1)^2,
              \quad \hat x_i = \alpha_i x_i + (1 - \alpha_i) y_i, \quad \alpha_i \sim U[0, 1]

    Each sample has one α and one norm, over all of its entries (channels and pixels). Call
    ``penalty(critic, real=x, fake=y)`` with samples ``[B, *S]`` of the same number; they are
    detached. A critic with several scores (patches) is refused until you say which slope is meant:
    published code takes that of the sum, ``of=lambda scores: scores.flatten(1).sum(1)``. The slope
    of the mean is 1 / (number of patches) of it, so its weight and centre are not comparable.

    Args:
        weight: λ, the paper's λ.
        center: the slope that costs nothing, 1 in the formula.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Gulrajani et al. (2017), arXiv:1704.00028.

    >>> import torch
    >>> critic = lambda x: x.flatten(1) @ torch.tensor([3.0, 4.0])  # slope 5 everywhere
    >>> wgan_gp()(critic, real=torch.ones(8, 2), fake=torch.zeros(8, 2)).item()  # 10 (5 - 1)²
    160.0
    """
    return preset(
        "wgan_gp", weight, Axes(wrt="input", form=two_sided(center), at=interpolate()), axes
    )


def wgan_lp(
    weight: float | Schedule = 10.0, center: float = 1.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Keep a critic's slope at one or below on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, \max(0, \|\nabla D(\hat x_i)\| - 1)^2

    The points x̂, the call and the norm are the same as in `wgan_gp`. Smaller slopes cost nothing.

    Args:
        weight: λ, the paper's λ.
        center: the largest slope that costs nothing, 1 in the formula.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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

    Call ``penalty(critic, real=x)`` with samples ``[B, *S]``, or ``penalty(scores, x)`` with scores
    ``[B]`` or ``[B, 1]`` of an ``x`` that requires grad. StyleGAN2 uses it lazily: ``every=16``.

    Args:
        weight: γ, the paper's γ: the ½ is inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Mescheder, Geiger and Nowozin (2018), arXiv:1801.04406.

    >>> import torch
    >>> r1(weight=10.0)(lambda x: (x**2).sum(1) / 2, real=torch.full((4, 1), 2.0)).item()  # 10/2·2²
    20.0
    """
    return preset("r1", weight, Axes(wrt="input", form=squared(scale=0.5), at=real()), axes)


def r2(weight: float | Schedule = 10.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's gradient on fake samples.

    .. math:: \frac\gamma2 \, \text{mean}_i \, \|\nabla D(y_i)\|^2

    Call ``penalty(critic, fake=y)`` with samples ``[B, *S]``, which are detached, so that the
    penalty does not train the generator; or ``penalty(scores, y)`` with scores ``[B]`` or
    ``[B, 1]`` of a ``y`` that requires grad.

    Args:
        weight: γ, the paper's γ: the ½ is inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

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

    Call ``penalty(critic, real=x, fake=y)`` with samples ``[B, *S]`` and ``[C, *S]``; each kind has
    the mean of its own. The critic is evaluated once, on all samples; the norms of x come first.
    For two different weights use ``gpkit.sum({"r1": {"weight": 1}, "r2": {"weight": 2}})``.

    Args:
        weight: γ, the paper's γ: the ½ is inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Huang et al. (2024), R3GAN, arXiv:2501.05441.

    >>> import torch
    >>> x, y = torch.full((4, 1), 2.0), torch.full((4, 1), 4.0)
    >>> r1_r2(weight=1.0)(lambda x: (x**2).sum(1) / 2, real=x, fake=y).item()  # ½·2² + ½·4²
    10.0
    """
    at = mixture("real", "fake", balanced=True)  # γ times the mean of the two means
    return preset("r1_r2", weight, Axes(wrt="input", form=squared(), at=at), axes)


def dragan(
    weight: float | Schedule = 10.0,
    center: float = 1.0,
    scale: float = 0.5,
    noise: str = "uniform",
    **axes: Unpack[Axes],
) -> GradientPenalty:
    r"""Pull a critic's slope to one around the real samples.

    .. math:: \lambda \, \text{mean}_i \, (\|\nabla D(x_i + \alpha_i \delta_i)\| - 1)^2, \quad
              \delta_i = \tfrac12 \, \text{std}(x) \, u_i, \quad
              u_i \sim U[-1, 1]^d, \quad \alpha_i \sim U[0, 1]

    std(x) is one number: the standard deviation over all entries of the batch, on all ranks. Each
    sample has one α. Call ``penalty(critic, real=x)`` or ``penalty(critic, x)`` with samples
    ``[B, *S]``.

    Args:
        weight: λ, the paper's λ.
        center: the slope that costs nothing, 1 in the formula.
        scale: the ½ in δ.
        noise: "uniform", U[-1, 1], as above; "positive", U[0, 1), as the authors' notebook and most
            published code have it: the points then lie to one side of x; or "normal". The paper
            says only that the noise is small.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Kodali et al. (2017), arXiv:1705.07215.

    >>> import torch
    >>> critic = lambda x: x.flatten(1) @ torch.tensor([3.0, 4.0])  # slope 5 everywhere
    >>> dragan()(critic, real=torch.ones(8, 2)).item()  # 10 (5 - 1)²
    160.0
    """
    at = perturb(scale, noise=noise, relative=True, along=True)
    return preset("dragan", weight, Axes(wrt="input", form=two_sided(center), at=at), axes)


def zero_gp(weight: float | Schedule = 100.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Pull a critic's slope to zero on lines between real and fake samples.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla D(\hat x_i)\|^2

    The points x̂, the call and the norm are the same as in `wgan_gp`.

    Args:
        weight: λ, the paper's λ: there is no ½ inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Thanh-Tung, Tran and Venkatesh (2019), arXiv:1902.03984.

    >>> import torch
    >>> zero_gp(weight=100.0)(lambda x: 3 * x, real=torch.ones(8, 1), fake=-torch.ones(8, 1)).item()
    900.0
    """
    return preset("zero_gp", weight, Axes(wrt="input", form=squared(), at=interpolate()), axes)


def wgan_div(
    weight: float | Schedule = 2.0, p: float = 6.0, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise a high power of a critic's slope on lines between real and fake samples.

    .. math:: k \, \text{mean}_i \, \|\nabla D(\hat x_i)\|^p

    The points x̂, the call and the norm are the same as in `wgan_gp`. It does not bound the slope:
    with it the critic's optimum is a divergence, the Wasserstein divergence.

    Args:
        weight: k, the paper's k.
        p: the power.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Wu et al. (2018), arXiv:1712.01026.

    >>> import torch
    >>> wgan_div()(lambda x: 2 * x, real=torch.ones(8, 1), fake=-torch.ones(8, 1)).item()  # 2·2⁶
    128.0
    """
    return preset("wgan_div", weight, Axes(wrt="input", form=power(p), at=interpolate()), axes)


def max_gp(weight: float | Schedule = 1.0, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise a critic's largest slope on lines between real and fake samples.

    .. math:: \lambda \, \max_i \, \|\nabla D(\hat x_i)\|^2

    The points x̂, the call and the norm are the same as in `wgan_gp`. The maximum is over the
    micro-batch of one rank; if samples tie, they share its gradient.

    Args:
        weight: λ, a factor of the whole square: there is no ½ inside.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Zhou et al. (2019), Lipschitz GANs, arXiv:1902.05687.

    >>> import torch
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> max_gp()(lambda x: (x**2).sum(1) / 2, real=x, fake=x).item()  # of 1² and 3²
    9.0
    """
    chosen = Axes(wrt="input", form=squared(), at=interpolate(), reduce="max")
    return preset("max_gp", weight, chosen, axes)
