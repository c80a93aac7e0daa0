"""Penalties of a Jacobian's largest singular value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule
from gpkit.spectral import power_iteration

if TYPE_CHECKING:
    from typing_extensions import Unpack


def spectral_jacobian(weight: float | Schedule = 0.01, **axes: Unpack[Axes]) -> GradientPenalty:
    r"""Penalise the spectral norm of the Jacobian of the outputs (logits) in the inputs.

    .. math:: \lambda \, \text{mean}_i \,
              \sigma_{\max}\Big(\frac{\partial f(x_i)}{\partial x_i}\Big)^2

    There is no ½ inside. Called ``penalty(logits, x)`` with ``[B, C]``, or ``penalty(net, x)``,
    with ``x`` ``[B, *S]``; every sample has a singular value of its own.

    Args:
        weight: λ.
        **axes: of `GradientPenalty`; ``estimator`` is ``power_iteration(10)``, 22 backward passes.
            "exact" and "projection" are the Frobenius norm instead.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Johansson et al. (2022), arXiv:2206.13581.

    >>> import torch
    >>> A = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> penalty = spectral_jacobian(weight=1.0)
    >>> round(penalty(lambda x: x @ A.T, torch.zeros(5, 2)).item(), 4)  # 3², not 3² + 1²
    9.0
    """
    return preset(
        "spectral_jacobian",
        weight,
        Axes(of="output", wrt="input", estimator=power_iteration(10)),
        axes,
    )
