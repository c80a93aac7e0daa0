"""Gradient norms of a loss for the log: first-order, without a graph, whatever mode is on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gpkit.targets import wide


def weight_norm(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return ‖∂L/∂θ‖ over all parameters that require grad. The graph is kept.

    Args:
        loss: L, one number.
        parameters: θ.

    Returns:
        One number; zero if no parameter takes part.
    """
    trained = [p for p in parameters if p.requires_grad]
    if not trained or not loss.requires_grad:
        return loss.new_zeros(())
    grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    squares = [g.to(wide(g)).square().sum() for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())


def input_norms(losses: Tensor, x: Tensor) -> Tensor:
    """Return ‖∂ℓ_i/∂x_i‖ of each sample, ``[B]``, over all of its dimensions. The graph is kept.

    Args:
        losses: ℓ, ``[B]``.
        x: ``[B, *S]``, which required grad when the losses were computed.

    Returns:
        ``[B]``; zeros if the losses do not depend on ``x``.
    """
    if not losses.requires_grad:
        return losses.new_zeros(len(x))
    (grad,) = torch.autograd.grad(losses.sum(), x, retain_graph=True, allow_unused=True)
    if grad is None:
        return losses.new_zeros(len(x))
    return grad.to(wide(grad)).reshape(len(x), -1).square().sum(1).sqrt()
