"""Penalties of how the environments of a batch differ."""

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

    .. math:: \lambda \, \text{mean}_e \Big(\frac{\partial}{\partial w} R_e(w \cdot f)
              \Big|_{w = 1}\Big)^2, \quad R_e = \text{mean}_{i \in e} \, \ell_i

    Call ``penalty(logits, y, env)`` with logits ``[B, C]`` or ``[B, 1]``, targets ``[B]`` and the
    environment of each sample, integers ``[B]``; or ``penalty([(logits_1, y_1), (logits_2, y_2)])``
    with one pair for each environment.

    Args:
        weight: λ: 1 for the first 500 steps, then 100, which is DomainBed's. The authors' code and
            DomainBed take the mean over environments, of the risks and of the squares; so does
            this. The paper's formula has the sum of both: with ``reduce="sum"`` the loss is
            its number times as large. The authors' code also divides the whole loss by the weight:
            ``weight=gpkit.rescaled(gpkit.switch(1.0, 1e4, at=100))``.
        halves: multiply the derivatives of two halves of each environment (its samples in turn)
            instead of squaring the derivative of all, as DomainBed does; the authors' code squares.
            It has no bias, but it may be negative.
        **options: ``loss``, ``(logits, y) -> [B]``; ``reduce`` over the environments, "mean",
            "sum" or "max"; ``every``, ``seed`` and ``name`` as in `GradientPenalty`.

    Returns:
        The penalty.

    Source: Arjovsky, Bottou, Gulrajani and Lopez-Paz (2019), arXiv:1907.02893.

    >>> import torch
    >>> f = torch.tensor([2.0, 2.0, 0.0], requires_grad=True)
    >>> y = torch.tensor([1.0, 0.0, 1.0])
    >>> square = lambda f, y: (f - y) ** 2 / 2          # d/dw at 1: f (f - y)
    >>> penalty = irm(weight=1.0, loss=square)
    >>> penalty(f, y, torch.tensor([0, 0, 1])).item()  # mean of ((2 + 4) / 2)² and 0²
    4.5
    """
    merged: Options = {"name": "irm", **options}
    return EnvironmentPenalty(scale_gradient(halves), weight=weight, **merged)


def fishr(
    weight: float | Schedule = FISHR_WEIGHT, ema: float = 0.95, **options: Unpack[Options]
) -> EnvironmentPenalty:
    r"""Pull the variances of the environments' gradients in the classifier to their mean.

    .. math:: \lambda \, \text{mean}_e \, \frac{1}{|\omega|}
              \Big\| \hat v_e - \text{mean}_{e'} \hat v_{e'} \Big\|^2, \quad
              \hat v_e = v_e + \frac{\gamma}{1 - \gamma} m_e, \quad
              v_e = \text{Var}_{i \in e} \, \nabla_\omega \ell_i

    m_e is the moving average of v_e before the call, m_e ← γ m_e + (1 - γ) v_e, from 0 on. So v̂_e
    is the new average divided by 1 - γ, of which v_e alone is differentiated.

    ω is the last linear layer, which must have a bias. Each entry of ω has a variance over the n_e
    samples of an environment (the sum of squares over n_e). Call ``penalty((logits, a), y, env)``
    with logits ``[B, C]``, the layer's inputs a ``[B, d]``, targets ``[B]`` and environments
    ``[B]``, or ``penalty(lambda: gpkit.features(net, x), y, env)``; `features` gives logits and a.
    Or give one pair ``((logits, a), y)`` for each environment. The gradient of a single sample is
    never formed.

    Args:
        weight: λ: 0 for the first 1500 steps, then 1000, as in the authors' code. There it
            multiplies the mean over the entries of ω, as here; the paper's formula has their sum,
            so its λ is ``weight`` / |ω|. Nothing is evaluated on a step of weight 0: the averages
            begin with the first step of another weight, where theirs begin with the first of all.
        ema: γ in [0, 1), 0.95 in the authors' code for DomainBed; 0 is without an average. The
            averages are in the penalty's ``state_dict()``. In a distributed run they are over all
            ranks, and each rank must make the same calls.
        **options: ``loss``, ``(logits, y) -> [B]``; ``reduce`` over the environments, "mean",
            "sum" or "max"; ``every``, ``seed`` and ``name`` as in `GradientPenalty`.

    Returns:
        The penalty.

    Source: Rame, Dancette and Cord (2022), arXiv:2109.02934.

    >>> import torch
    >>> f = torch.tensor([1.0, 3.0, 5.0, 5.0], requires_grad=True)
    >>> a = torch.zeros(4, 1)
    >>> penalty = fishr(weight=1.0, loss=lambda f, y: f**2 / 2)  # δ = f, of variance 1 and 0
    >>> penalty((f, a), torch.zeros(4), torch.tensor([0, 0, 1, 1])).item()  # 4 entries, 2 of them 0
    0.125
    """
    merged: Options = {"name": "fishr", **options}
    return EnvironmentPenalty(gradient_variance(ema), weight=weight, **merged)
