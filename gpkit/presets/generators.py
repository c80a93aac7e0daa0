"""Penalties of a generator, in its latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.form import running_average, two_sided
from gpkit.axes.of import per_pixel
from gpkit.axes.weight import Schedule
from gpkit.estimators.gaussian_product import gaussian_product
from gpkit.gradient_penalty import Axes, GradientPenalty
from gpkit.presets.base import preset

if TYPE_CHECKING:
    from typing_extensions import Unpack


def path_length(
    weight: float | Schedule = 2.0, decay: float = 0.99, **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Draw the path lengths of a generator g to their running average a, as StyleGAN2 does.

    .. math:: \lambda \, \text{mean}_i \, (n_i - a)^2, \quad
              n_i = \Big\|\frac{\partial g(w_i)}{\partial w_i}^\top y_i\Big\|, \quad
              y_i \sim N(0, I) / \sqrt{H W}

    Called ``penalty(generator, w)`` with latents ``w`` ``[B, D]``, or ``[B, L, D]`` for L layers,
    where n² is the mean over L of the squared lengths. The images are ``[B, C, *S]``, H·W being the
    product of S: ``[B, C]`` has one pixel. First a ← decay·a + (1 - decay)·mean n, over all ranks
    and from a = 0, and then that a, a constant, is the centre. Given the function, w is detached:
    to train what made w as well, call ``penalty(generator(w), w)``.

    Args:
        weight: λ.
        decay: of the average a, which is part of the penalty's ``state_dict()``.
        **axes: of `GradientPenalty`; ``every`` is 4, with four times the weight on those steps.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Karras et al. (2020), arXiv:1912.04958.

    >>> import torch
    >>> A = torch.tensor([[3.0], [4.0]])
    >>> penalty = path_length(weight=1.0, every=1, seed=0)
    >>> n = penalty.terms(lambda w: w @ A, torch.zeros(4000, 2)).norms  # 5 |y|, y ~ N(0, 1)
    >>> abs(n.square().mean() - 25).item() < 2
    True
    """
    return preset(
        "path_length",
        weight,
        Axes(
            of=per_pixel(),
            wrt="input",
            form=two_sided(running_average(decay)),
            estimator=gaussian_product(),
            every=4,
        ),
        axes,
    )
