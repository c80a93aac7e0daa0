"""Penalties on how the environments of a batch differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpkit.axes.environments import gradient_variance, scale_gradient
from gpkit.axes.weight import Schedule, switch
from gpkit.environment_penalty import EnvironmentPenalty, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack


IRM_WEIGHT = switch(1.0, 100.0, at=500)


FISHR_WEIGHT = switch(0.0, 1000.0, at=1500)


def irm(
    weight: float | Schedule = IRM_WEIGHT, halves: bool = False, **options: Unpack[Options]
) -> EnvironmentPenalty:
    r"""Penalise the gradient of each environment's risk in a scale on the logits: IRMv1.

    .. math:: \lambda \sum_e \Big(\frac{\partial}{\partial w} R_e(w \cdot f)
              \Big|_{w = 1}\Big)^2, \quad R_e = \text{mean}_{i \in e} \, \ell_i

    Called ``penalty(logits, y, env)`` with ``[B, C]`` (or ``[B, 1]``), ``[B]`` and integers
    ``[B]``; or ``penalty([(logits_1, y_1), (logits_2, y_2)])``, one pair for each environment. The
    values of its terms are E times the squares, since their mean is the sum. The paper's annealing
    divides the whole loss by the weight: ``weight=gpkit.rescaled(gpkit.switch(1.0, 1e4, at=190))``.

    Args:
        weight: λ; 1 for 500 steps and then 100 if not given.
        halves: take the product over two halves of each environment (its samples in turn) for the
            square: without bias, but it may be negative.
        **options: ``loss``, ``(logits, y) -> [B]``; ``every``, ``seed`` and ``name`` as in
            `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Arjovsky, Bottou, Gulrajani and Lopez-Paz (2019), arXiv:1907.02893.

    >>> import torch
    >>> f = torch.tensor([2.0, 2.0, 0.0], requires_grad=True)
    >>> y = torch.tensor([1.0, 0.0, 1.0])
    >>> square = lambda f, y: (f - y) ** 2 / 2          # d/dw at 1: f (f - y)
    >>> penalty = irm(weight=1.0, loss=square)
    >>> penalty(f, y, torch.tensor([0, 0, 1])).item()  # ((2 + 4) / 2)² + 0²
    9.0
    """
    merged: Options = {"name": "irm", **options}
    return EnvironmentPenalty(scale_gradient(halves), weight=weight, **merged)


def fishr(
    weight: float | Schedule = FISHR_WEIGHT, **options: Unpack[Options]
) -> EnvironmentPenalty:
    r"""Draw the variances of the environments' gradients in the classifier to one another.

    .. math:: \lambda \, \text{mean}_e \, \Big\| v_e - \text{mean}_{e'} v_{e'} \Big\|^2,
              \quad v_e = \text{Var}_{i \in e} \, \nabla_\omega \ell_i

    ω is the last linear layer, with a bias; the variance is of each of its entries, over the n_e
    samples (divided by n_e). The authors' code averages over the entries of ω where the norm here
    sums, and keeps moving averages of v_e. Called ``penalty((logits, a), y, env)`` with logits
    ``[B, C]`` and the layer's inputs a ``[B, d]``, as ``gpkit.features(net, x)`` gives them, or
    ``penalty(lambda: gpkit.features(net, x), y, env)``; or with one pair ``((logits, a), y)`` for
    each environment. No gradient of a single sample is formed.

    Args:
        weight: λ; 0 for 1500 steps and then 1000 if not given.
        **options: ``loss``, ``(logits, y) -> [B]``; ``every``, ``seed`` and ``name`` as in
            `GradientPenalty`.

    Returns:
        The penalty.

    Raises:
        ValueError: if an argument is out of its range.

    Source: Rame, Dancette and Cord (2022), arXiv:2109.02934.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 5.0, 5.0], requires_grad=True)
    >>> a = torch.zeros(4, 1)
    >>> penalty = fishr(weight=1.0, loss=lambda f, y: f**2 / 2)  # δ = f, of variance 1 and 0
    >>> penalty((f, a), torch.zeros(4), torch.tensor([0, 0, 1, 1])).item()  # mean of ½², ½²
    0.25
    """
    merged: Options = {"name": "fishr", **options}
    return EnvironmentPenalty(gradient_variance(), weight=weight, **merged)
