"""Penalties that keep a classifier sensitive to its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gpkit.forms import two_sided
from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule

if TYPE_CHECKING:
    from typing_extensions import Unpack


def class_sum(output: Tensor) -> Tensor:
    """Return the sum of the outputs of each sample: ``[B, C]`` to ``[B]``."""
    return output.reshape(len(output), -1).sum(1)


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
