"""Penalties in the weights. L is the loss of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.penalty import Axes, GradientPenalty
from gpkit.presets.choice import preset
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
    return preset("none", 0.0, Axes(), axes)


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
    return preset("weight_grad_norm", weight, Axes(of="loss", wrt=weights(match)), axes)


def per_sample_grad_norm(
    weight: float | Schedule = 0.01, match: str = "*", **axes: Unpack[Axes]
) -> GradientPenalty:
    r"""Penalise the gradient of each sample's loss in the weights.

    .. math:: \lambda \, \text{mean}_i \, \|\nabla_\theta \ell_i\|^2

    It is λ times the trace of the empirical Fisher matrix, and exceeds `weight_grad_norm` by the
    variance of the samples' gradients. Called ``penalty(losses, net.parameters())`` with losses
    ``[B]``, or ``penalty(closure, net)``; a scalar loss is refused. It takes B backward passes.

    Args:
        weight: λ.
        match: the names of the parameters that take part, a shell pattern as "head.*"; other than
            "*" it needs the call with the module.
        **axes: of `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: for the empirical Fisher matrix Kunstner, Balles and Hennig (2019), arXiv:1905.12558.

    >>> import torch
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> losses = torch.stack([w[0] ** 2, 3 * w[1]])     # ∇ℓ = (2, 0) and (0, 3)
    >>> per_sample_grad_norm(weight=1.0)(losses, [w]).item()  # (4 + 9) / 2
    6.5
    """
    chosen = Axes(of="loss", wrt=weights(match), scope="sample")
    return preset("per_sample_grad_norm", weight, chosen, axes)
