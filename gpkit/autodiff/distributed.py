"""Statistics over the ranks of a distributed run, and losses under DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_static_ddp
from gpkit.autodiff.random import has_ranks


def require_dynamic_graph(y: Tensor) -> None:
    """Refuse the output of a DistributedDataParallel module with a static graph, on its first step.

    Raises:
        RuntimeError: if ``y`` is, or was computed from, such an output.
    """
    if any(map(is_static_ddp, graph.nodes(y))):
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) takes the gradient inside of a penalty for "
            "the backward pass, and would leave the gradients of the step un-reduced: leave out "
            "static_graph=True"
        )


def tied(value: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Return ``value`` plus zero times each leaf in the graph of ``outputs``.

    DistributedDataParallel averages gradients once every parameter of its forward pass has one. The
    last bias gets none from a gradient of the output, so ``penalty.backward()`` alone would leave
    the gradients of each rank as they are.

    Args:
        value: one number with a graph.
        outputs: what was differentiated.
    """
    for leaf in (leaf for y in outputs for leaf in graph.leaves(y)):
        if not hasattr(leaf, "full_tensor"):  # FSDP averages the gradient of each parameter alone
            real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
            value = value + real.reshape(-1)[:0].sum().to(value)
    return value


def batch_std(x: Tensor) -> Tensor:
    r"""Return the standard deviation over all entries of the batch, a scalar in the dtype of ``x``.

    .. math:: \sqrt{\tfrac1N \sum x^2 - \big(\tfrac1N \sum x\big)^2}

    In a distributed run N, Σx and Σx² are sums over the batches of all ranks, so each rank must
    call it. The result has no graph.

    Args:
        x: ``[B, *S]``; B may differ between ranks.

    Returns:
        The standard deviation, without Bessel's correction.

    >>> batch_std(torch.tensor([[1.0], [3.0]]))
    tensor(1.)
    """
    x = x.detach()
    if not has_ranks():
        return x.std(correction=0) if x.numel() else x.sum()
    wide = x.double()  # a difference of squares loses digits
    moments = torch.stack([wide.new_tensor(x.numel()), wide.sum(), wide.square().sum()])
    distributed.all_reduce(moments)
    count, total, squares = moments.unbind()
    return (squares / count - (total / count).square()).clamp(min=0).sqrt().to(x.dtype)


def mean_of_ranks(measured: Tensor | float) -> float:
    """Return the mean of a scalar over the ranks of a distributed run."""
    if has_ranks() and isinstance(measured, Tensor):
        measured = measured.clone()
        distributed.all_reduce(measured)
        measured = measured / distributed.get_world_size()
    return float(measured)


def sum_of_ranks(x: Tensor) -> Tensor:
    """Return the sum of a tensor over the ranks of a distributed run.

    Its gradient is the sum of the gradients of all ranks. Where ranks average their gradients, as
    under DDP, the result is the gradient of the mean of the ranks' losses. So each rank must call
    it, and run its backward pass.
    """
    return x if not has_ranks() else _SumOfRanks.apply(x)


def means_of_ranks(values: dict[int, Tensor]) -> dict[int, Tensor]:
    """Return the mean of each tensor over the ranks that have its key, for the keys of all ranks.

    Args:
        values: tensors of one shape, on the rank's device; at least one. The keys may differ.
    """
    if not has_ranks():
        return values
    keys: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(keys, sorted(values))
    union = sorted({key for of_rank in keys for key in of_rank})
    zero = torch.zeros_like(next(iter(values.values())))
    total = torch.stack([values.get(key, zero) for key in union])
    distributed.all_reduce(total)
    counts = [sum(key in of_rank for of_rank in keys) for key in union]
    return {key: t / n for key, t, n in zip(union, total, counts, strict=True)}


class _SumOfRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_of_ranks(grad.contiguous())
