"""Values with a known gradient, and weights moved temporarily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def perturbed(tensors: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    """Move leaf tensors in place, and restore their values bit for bit at the end.

    Graphs that saved the tensors stay valid: the values are restored before such a graph is used,
    so autograd's version counters need not change.

    Args:
        tensors: the tensors to move.
        moves: the tensor to add to each.

    Yields:
        Nothing.
    """
    values = [t.data for t in tensors]  # the same memory, without version counting
    copies = [v.clone() for v in values]
    try:
        for value, move in zip(values, moves, strict=True):
            value.add_(move)
        yield
    finally:
        for value, copy in zip(values, copies, strict=True):
            value.copy_(copy)


def require_leaves(tensors: Sequence[Tensor]) -> None:
    """Refuse weights that are not leaves: a rerun would recompute them without the move.

    Raises:
        ValueError: if a tensor is not a leaf.
    """
    if not all(t.is_leaf for t in tensors):
        raise ValueError(
            "finite differences move the weights in place, and one of them is not a leaf tensor: "
            "give the penalty the leaf parameters"
        )


def known_gradient(
    value: Tensor,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    share: Tensor | None = None,
) -> Tensor:
    """Return a value whose gradients in ``leaves`` are ``grads``: its backward computes nothing.

    Args:
        value: one number, of any shape; its own graph is cut. With ``share``, values ``[G]``.
        leaves: the tensors that the value depends on.
        grads: the gradient of the value in each leaf; with ``share``, of ⟨share, value⟩.
        share: c ``[G]``: the incoming gradient of the backward pass must be a multiple of c.

    Returns:
        The value, differentiable once.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = known_gradient(torch.tensor(5.0), [w], [torch.tensor([3.0, 4.0])])
    >>> (2 * y).backward()
    >>> w.grad
    tensor([6., 8.])
    """
    share = torch.ones_like(value) if share is None else share
    out: Tensor = _KnownGradient.apply(value.detach(), share, len(leaves), *leaves, *grads)
    return out


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(share, *tensors[count:])
        ctx.dtypes = [t.dtype for t in tensors[:count]]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        share, *known = ctx.saved_tensors
        size = share.square().sum()
        factor = (grad * share).sum() / torch.where(size == 0, 1, size)
        grads = [(g * factor).to(dtype) for g, dtype in zip(known, ctx.dtypes, strict=True)]
        return None, None, None, *grads, *[None] * len(grads)
