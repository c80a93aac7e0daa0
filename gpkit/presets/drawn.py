"""Penalties in the weights, of losses with labels drawn from the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
from gpkit.schedules import Schedule
from gpkit.variables import weights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def fisher(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of the loss in the weights, with labels drawn from the model.

    .. math:: \lambda \, \| \text{mean}_i \, \nabla_\theta \ell(x_i, \hat y_i) \|^2,
              \quad \hat y_i \sim \mathrm{softmax}(f(x_i))

    The labels are drawn anew at every call from the penalty's own generator; ℓ is the
    cross-entropy. In expectation over them it is tr F / B, the trace of the batch's Fisher matrix
    over its size. Called ``penalty(logits, net)`` with ``[B, C]``, whose graph is reused, or
    ``penalty(lambda: net(x), net)``.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*".
        **axes: of `GradientPenalty`; ``scope="sample"`` takes the norm of each sample's gradient,
            whose expectation is tr F whatever the batch size.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Jastrzebski et al. (2021), arXiv:2012.14193.

    >>> import torch
    >>> z = torch.zeros(1, 2, requires_grad=True)
    >>> fisher(weight=1.0)(z, [z]).item()              # ‖p - onehot‖² = ½² + ½², either label
    0.5
    """
    return preset("fisher", weight, Axes(of="sampled_loss", wrt=weights(match)), axes)
