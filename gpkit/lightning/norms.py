"""Norms of first gradients for the log, without a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from gpkit.autodiff.derivatives import unhooked
from gpkit.autodiff.numerics import as_real, wide, widened
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.sharding.compat import as_in_graphs


def flat_entries(grad: Tensor) -> Tensor:
    """Return the entries of a gradient as a vector.

    Args:
        grad: a gradient. If it is sparse, only its stored entries are returned. If it is a DTensor,
            the entries of all ranks are, and every rank must call this function.

    Returns:
        The entries, ``[n]``.
    """
    grad = grad.coalesce().values() if grad.is_sparse else grad
    return (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).reshape(-1)


def gradient_norm(grad: Tensor) -> Tensor:
    """Return the l2 norm of a gradient over all of its entries.

    Args:
        grad: a gradient, dense or sparse. For a DTensor the norm is over the shards of all ranks,
            and every rank must call this function.

    Returns:
        The norm, one number in float32 or better. It is not finite if the gradient is not.
    """
    grad = grad.coalesce().values() if grad.is_sparse else grad
    norm = torch.linalg.vector_norm(grad, dtype=wide(grad))
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def gradient_norms(
    grads: Mapping[Tensor, Tensor | None], scale: Tensor | float
) -> dict[Tensor, Tensor]:
    """Return the l2 norm of each parameter's gradient.

    Args:
        grads: by parameter; None counts as zero.
        scale: the factor that the gradients contain, of a gradient scaler. Norms are divided by it.

    Returns:
        The norms by parameter, one number each.
    """
    return {
        p: torch.zeros((), device=p.device) if g is None else gradient_norm(g) / scale
        for p, g in grads.items()
    }


def total_norm(norms: Iterable[Tensor]) -> Tensor:
    """Return the norm of several tensors together, √(Σ n_i²), from their norms n_i.

    >>> total_norm([torch.tensor(3.0), torch.tensor(4.0)])
    tensor(5.)
    """
    norms = list(norms)
    dtype = reduce(torch.promote_types, [n.dtype for n in norms])
    return torch.stack([n.to(norms[0].device, dtype) for n in norms]).norm()


def sample_norms(grad: Tensor | None, x: Tensor) -> Tensor:
    """Return B ‖∂L/∂x_i‖ for each sample. It equals ‖∂ℓ_i/∂x_i‖ if L is the mean of losses ℓ_i.

    Args:
        grad: ∂L/∂x, ``[B, *S]``; None counts as zero.
        x: the samples, ``[B, *S]``.

    Returns:
        The norms, ``[B]``.
    """
    if grad is None:
        return torch.zeros(len(x), dtype=wide(x), device=x.device)
    rows = grad.reshape(len(x), -1)
    return len(x) * torch.linalg.vector_norm(rows, dim=1, dtype=wide(grad))


def weight_norm(loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """Return ‖∂L/∂θ‖ over all parameters that require grad. The graph is kept.

    It is the gradient of this process's own samples, also where FSDP2 has sharded θ.

    Args:
        loss: L, one number.
        parameters: θ.

    Returns:
        One number; 0 if L depends on none of them.
    """
    trained = [p for p in parameters if p.requires_grad]
    trained = as_in_graphs(trained) if has_ranks() else trained
    if not trained or not loss.requires_grad:
        return loss.new_zeros(())
    with unhooked(trained):
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    squares = [as_real(widened(g)).square().sum() for g in grads if g is not None]
    return torch.stack(squares).sum().sqrt() if squares else loss.new_zeros(())


def input_norms(losses: Tensor, x: Tensor) -> Tensor:
    """Return ‖∂ℓ_i/∂x_i‖ for each sample, over all of its dimensions. The graph is kept.

    Args:
        losses: ℓ, ``[B]``.
        x: ``[B, *S]``; it required grad when the losses were computed.

    Returns:
        The norms, ``[B]``; zeros if the losses do not depend on ``x``.
    """
    if not losses.requires_grad:
        return losses.new_zeros(len(x))
    (grad,) = torch.autograd.grad(losses.sum(), x, retain_graph=True, allow_unused=True)
    if grad is None:
        return losses.new_zeros(len(x))
    return grad.to(wide(grad)).reshape(len(x), -1).square().sum(1).sqrt()
