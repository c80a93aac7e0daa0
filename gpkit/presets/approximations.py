"""Penalties of a critic that take no gradient in the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.at import At, fake, real
from gpkit.axes.form import squared
from gpkit.axes.weight import Schedule
from gpkit.estimators.forwards.random_difference import random_difference
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def approximate_r1(
    weight: float | Schedule = 100.0, sigma: float = 0.01, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the change of a critic's score under noise on real samples: `r1` in two forwards.

    .. math:: \lambda \, \text{mean}_i (D(x_i) - D(x_i + \sigma \epsilon_i))^2,
              \quad \epsilon_i \sim N(0, I)

    Its expected value is that of ``r1(weight=2·λ·σ²)``, up to order σ⁴: here γ = 0.02. It takes no
    gradient in x and no double backward, as for large critics and fused attention. Call
    ``penalty(critic, real=x)``. The squares of several scores are added. Dropout is the same. In
    `gpkit.GANModule` D(x) is the score of the loss: a step takes one more forward pass.

    Args:
        weight: λ, the paper's λ: the difference is not divided by σ.
        sigma: σ of the noise. See `gpkit.random_difference` for bfloat16.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty. Its norms are those of the difference divided by σ.

    Source: Lin et al. (2025), arXiv:2501.08316.

    >>> import torch
    >>> x = torch.zeros(200_000, 2)
    >>> value = approximate_r1(seed=0)(lambda x: 3 * x[:, 0] + 4 * x[:, 1], real=x)
    >>> round(value.item(), 2)  # 100·0.01²·(3² + 4²)
    0.25
    """
    return preset("approximate_r1", weight, _difference(real(), sigma), axes)


def approximate_r2(
    weight: float | Schedule = 100.0, sigma: float = 0.01, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the change of a critic's score under noise on fake samples: `r2` in two forwards.

    .. math:: \lambda \, \text{mean}_i (D(y_i) - D(y_i + \sigma \epsilon_i))^2,
              \quad \epsilon_i \sim N(0, I)

    As `approximate_r1`, at fake samples, which are detached: ``penalty(critic, fake=y)``.

    Args:
        weight: λ, the paper's λ: the difference is not divided by σ.
        sigma: σ, the standard deviation of the noise.
        **axes: see `gpkit.presets`.

    Returns:
        The penalty.

    Source: Lin et al. (2025), arXiv:2501.08316.

    >>> import torch
    >>> y = torch.zeros(200_000, 2)
    >>> value = approximate_r2(seed=0)(lambda x: 3 * x[:, 0] + 4 * x[:, 1], fake=y)
    >>> round(value.item(), 2)  # 100·0.01²·(3² + 4²)
    0.25
    """
    return preset("approximate_r2", weight, _difference(fake(), sigma), axes)


def _difference(at: At, sigma: float) -> Axes:
    form = squared(scale=sigma**2)
    return Axes(wrt="input", form=form, at=at, estimator=random_difference(sigma))
