"""Values whose gradient is known already, and weights moved for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@contextmanager
def perturbed(tensors: Sequence[Tensor], moves: Sequence[Tensor]) -> Iterator[None]:
    """Move leaf tensors in place, and give their values back bit for bit at the end.

    Graphs that have saved the tensors stay good: autograd is not told, as it need not be when the
    values come back before any of these graphs is used.

    Args:
        tensors: what to move.
        moves: what to add to each.

    Yields:
        Nothing.
    """
    values = [t.data for t in tensors]  # the same memory, out of autograd's sight
    copies = [v.clone() for v in values]
    try:
        for value, move in zip(values, moves, strict=True):
            value.add_(move)
        yield
    finally:
        for value, copy in zip(values, copies, strict=True):
            value.copy_(copy)


def require_leaves(tensors: Sequence[Tensor]) -> None:
    """Refuse weights that were computed: moved in place, they would be computed as before.

    Raises:
        ValueError: if one is not a leaf.
    """
    if not all(t.is_leaf for t in tensors):
        raise ValueError(
            "finite differences move the weights in place, and one of them was computed from "
            "others: give the penalty the leaf parameters themselves"
        )


def known_gradient(
    value: Tensor,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    share: Tensor | None = None,
) -> Tensor:
    """Return a value whose gradients in ``leaves`` are ``grads``: backward computes nothing.

    Args:
        value: one number, of any shape; its own graph is cut. With ``share`` several, ``[G]``.
        leaves: the tensors that it depends on.
        grads: the derivative of the number in each, of the leaves' shapes; with ``share`` that of
            ⟨share, value⟩.
        share: c, ``[G]``: what comes in at the backward must be a multiple of it.

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
