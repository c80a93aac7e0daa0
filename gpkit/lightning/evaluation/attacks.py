"""Inputs that are moved to raise the loss: FGSM and PGD, in the maximum norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]


def fgsm(losses: Losses, x: Tensor, epsilon: float, low: float, high: float) -> Tensor:
    r"""Move each input by one step along the sign of its gradient (Goodfellow et al. 2015).

    .. math:: x + \varepsilon \, \mathrm{sign} \, \nabla_x \ell

    Args:
        losses: inputs -> losses ``[B]``.
        x: the inputs ``[B, *S]``.
        epsilon: ε, the largest change of an entry.
        low: the least value of an entry.
        high: the largest value of an entry.

    Returns:
        The moved inputs ``[B, *S]``, without a graph.

    >>> x, w = torch.zeros(1, 2), torch.tensor([3.0, -2.0])
    >>> fgsm(lambda x: x @ w, x, 0.1, -1.0, 1.0)
    tensor([[ 0.1000, -0.1000]])
    """
    return (x + epsilon * _gradient(losses, x).sign()).clamp(low, high)


def pgd(
    losses: Losses,
    x: Tensor,
    epsilon: float,
    low: float,
    high: float,
    *,
    steps: int,
    step_size: float,
    rng: torch.Generator,
) -> Tensor:
    r"""Move each input by projected gradient steps, from a random start (Madry et al. 2018).

    .. math:: x_{k+1} = \Pi \big( x_k + a \, \mathrm{sign} \, \nabla_x \ell(x_k) \big), \quad
              x_0 = \Pi(x + u), \; u \sim U[-\varepsilon, \varepsilon]

    Π puts each entry into [x - ε, x + ε], and then into [low, high].

    Args:
        losses: inputs -> losses ``[B]``.
        x: the inputs ``[B, *S]``.
        epsilon: ε, the largest change of an entry.
        low: the least value of an entry.
        high: the largest value of an entry.
        steps: the number of steps.
        step_size: a.
        rng: draws the starts, on the CPU.

    Returns:
        The moved inputs ``[B, *S]``, without a graph.
    """
    start = torch.rand(x.shape, generator=rng).to(x) * 2 - 1
    moved = (x + epsilon * start).clamp(low, high)
    for _ in range(steps):
        moved = moved + step_size * _gradient(losses, moved).sign()
        moved = (x + (moved - x).clamp(-epsilon, epsilon)).clamp(low, high)
    return moved


def _gradient(losses: Losses, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(losses(x).sum(), x)[0]
