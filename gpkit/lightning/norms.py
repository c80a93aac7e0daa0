"""Gradient norms of a loss for the log: first-order, without a graph, whatever mode is on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from gpkit.autodiff.numerics import wide


def entries(grad: Tensor) -> Tensor:
    """Return the entries of a gradient, in one dimension.

    Args:
        grad: it may be sparse: then those that are there are meant; or a DTensor: then those of all
            ranks, and every rank must call.

    Returns:
        ``[n]``.
    """
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).reshape(-1)


def length(grad: Tensor) -> Tensor:
    """Return ‖g‖ over all entries, one number in float32 or better.

    Args:
        grad: g; it may be sparse, or a DTensor, whose norm is that of all ranks' shards: then every
            rank must call.

    Returns:
        One number; not finite where g is not.
    """
    grad = grad.coalesce().values() if grad.is_sparse else grad
    norm = torch.linalg.vector_norm(grad, dtype=wide(grad))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def lengths(grads: Mapping[Tensor, Tensor | None], scale: Tensor | float) -> dict[Tensor, Tensor]:
    """Return the norm of each parameter's gradient.

    Args:
        grads: by parameter; None stands for zero.
        scale: what the gradients were multiplied by.

    Returns:
        The norms by parameter.
    """
    return {
        p: torch.zeros((), device=p.device) if g is None else length(g) / scale
        for p, g in grads.items()
    }


def together(norms: Iterable[Tensor]) -> Tensor:
    """Return the norm of all entries of several tensors, of which the norms are given.

    >>> together([torch.tensor(3.0), torch.tensor(4.0)])
    tensor(5.)
    """
    norms = list(norms)
    dtype = reduce(torch.promote_types, [n.dtype for n in norms])
    return torch.stack([n.to(norms[0].device, dtype) for n in norms]).norm()


def sample_norms(grad: Tensor | None, x: Tensor) -> Tensor:
    """Return B‖∂L/∂x_i‖ of each sample, ``[B]``: ‖∂ℓ_i/∂x_i‖, where L is the mean of losses ℓ_i.

    Args:
        grad: ∂L/∂x, ``[B, *S]``; None stands for zero.
        x: ``[B, *S]``.

    Returns:
        ``[B]``.
    """
    if grad is None:
        return torch.zeros(len(x), dtype=wide(x), device=x.device)
    rows = grad.reshape(len(x), -1)
    return len(x) * torch.linalg.vector_norm(rows, dim=1, dtype=wide(grad))


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
