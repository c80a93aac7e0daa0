"""Penalties of a generator's output in its latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.average import running_average
from gpkit.axes.form import two_sided
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
    r"""Pull the path lengths of a generator g to their running average a, as StyleGAN2 does.

    .. math:: \lambda \, \text{mean}_i \, (n_i - a)^2, \quad
              n_i = \Big\|\frac{\partial g(w_i)}{\partial w_i}^\top y_i\Big\|, \quad
              y_i \sim N(0, I) / \sqrt{H W}

    Call ``penalty(generator, w)`` with latents w ``[B, D]``, or ``[B, L, D]`` for L layers: n² is
    then the mean of the squared lengths over L. The images are ``[B, C, *S]`` and H·W is the
    product of S; an output ``[B, C]`` has one pixel. At each call a is updated first,
    a ← decay·a + (1 - decay)·mean n, from 0 on; the new a is the centre, and the gradient passes
    through it, as in StyleGAN2's code. There the mean is over the samples of one GPU; here it is
    over all ranks, so that it does not depend on their number. For the new a as a constant, or the
    a before the call, set ``form=gpkit.two_sided(gpkit.running_average(0.99))``, or
    ``running_average(0.99, use="before")``. w is detached. To train what made w too, call
    ``penalty(generator(w), w)``.

    Args:
        weight: λ, StyleGAN2's ``pl_weight``; as there, it acts on every 4th step, times 4.
        decay: of the average a, which is in the penalty's ``state_dict()``.
        **axes: see `gpkit.presets`; ``every`` is 4 by default.

    Returns:
        The penalty.

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
            form=two_sided(running_average(decay, use="graph")),
            estimator=gaussian_product(),
            every=4,
        ),
        axes,
    )
