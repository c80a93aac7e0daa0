"""Values with a known gradient, and weights moved temporarily."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpkit.autodiff.compat import (
    add_to,
    lerp,
    lerp_to,
    plus,
    scale_by,
    subtract_from,
    times,
    write_count,
)

Number = Tensor | float  # a scalar


def without_casts_kept(tensors: Sequence[Tensor]) -> bool:
    """Let autocast keep no casts of weights that move.

    Without autocast nothing changes, since compiled nets are compiled anew for such a switch.

    Args:
        tensors: the weights.

    Returns:
        Whether it kept them before.
    """
    before = torch.is_autocast_cache_enabled()
    if torch.is_autocast_enabled(tensors[0].device.type):
        torch.set_autocast_cache_enabled(False)
    return before


@contextmanager
def uncached(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Run without autocast's cache: it keeps the casts of weights that have moved since."""
    before = without_casts_kept(tensors)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def perturbed(
    tensors: Sequence[Tensor], moves: Sequence[Tensor], *, swap: bool = False
) -> Iterator[None]:
    """Move leaf tensors in place, and restore their values bit for bit at the end.

    Graphs that saved the tensors stay valid: the values are restored before such a graph is used,
    so autograd's version counters need not change.

    Args:
        tensors: the tensors to move.
        moves: the tensor to add to each.
        swap: exchange the memory of the tensors instead of writing to it, where no other tensor
            can share it. The moves are overwritten then.

    Yields:
        Nothing.
    """
    values = [t.data for t in tensors]  # the same memory, without version counting
    if swap and all(map(owns_memory, tensors)):
        add_to(moves, values)
        try:
            for tensor, moved in zip(tensors, moves, strict=True):
                tensor.data = moved
            with uncached(tensors):
                yield
        finally:
            for tensor, value in zip(tensors, values, strict=True):
                tensor.data = value
        return
    copies = [v.clone() for v in values]
    try:
        for value, move in zip(values, moves, strict=True):
            value.add_(move)
        with uncached(tensors):
            yield
    finally:
        for value, copy in zip(values, copies, strict=True):
            value.copy_(copy)


class moved:
    """A context in which leaf tensors are moved by ``factor · directions``, in one pass.

    The tensors exchange their memory for that of the moved ones, and get it back. Where another
    tensor may share it, they are moved in place instead, as in `perturbed`.

    Args:
        tensors: the tensors to move.
        directions: one for each of them.
        factor: a number.
    """

    def __init__(
        self, tensors: Sequence[Tensor], directions: Sequence[Tensor], factor: Number
    ) -> None:
        self.tensors, self.directions, self.factor = tensors, directions, factor

    def __enter__(self) -> None:
        tensors, factor = self.tensors, self.factor
        self.values = [t.data for t in tensors]
        self.inside: Any = None
        if isinstance(factor, float) and all(map(owns_memory, tensors)):
            there = plus(self.values, self.directions, alpha=factor)
            for tensor, value in zip(tensors, there, strict=True):
                tensor.data = value
            self.cached = without_casts_kept(tensors)
        else:
            self.inside = perturbed(tensors, times(self.directions, factor))
            self.inside.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self.inside is not None:
            self.inside.__exit__(*exception)
            return
        torch.set_autocast_cache_enabled(self.cached)
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.data = value


def owns_memory(tensor: Tensor) -> bool:
    """Whether a tensor is plain and has a whole piece of CPU memory, so that none shares it."""
    # On other devices kernels may rely on where weights lie, such as cuDNN's recurrent nets.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    memory = tensor.untyped_storage()
    whole = memory.nbytes() == tensor.numel() * tensor.itemsize
    return whole and tensor.is_contiguous() and not memory.is_shared()


def is_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether operations on lists do for these: plain, dense, real tensors of one wide dtype."""
    kinds = {(type(t), t.dtype, t.device, t.layout) for t in tensors}
    dtypes = {dtype for _, dtype, *_ in kinds}
    return (
        {kind for kind, *_ in kinds} <= {Tensor, nn.Parameter}
        and len({kind[1:] for kind in kinds}) == 1
        and dtypes <= {torch.float32, torch.float64}
        and all(t.layout == torch.strided for t in tensors)
    )


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


class Difference(NamedTuple):
    """The gradient of a value as a difference of two, ``times · (after - before)``."""

    leaves: Sequence[Tensor]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    times: Number

    def parts(self) -> list[Tensor]:
        """Return the tensors that the gradients are computed from."""
        return [*self.before, *self.after]

    def computed(self) -> list[Tensor]:
        """Return the gradients."""
        pairs = zip(self.before, self.after, strict=True)
        return [(after - before) * self.times for before, after in pairs]

    def starts_at(self, grads: Sequence[Tensor]) -> bool:
        """Whether the gradients before are these."""
        same = (a is b for a, b in zip(grads, self.before, strict=False))
        return len(grads) == len(self.before) and all(same)

    def added_to(
        self, grads: Sequence[Tensor], share: Number, *, overwrite: bool
    ) -> Sequence[Tensor]:
        """Return ``grads + share · times · (after - before)``, where ``before`` are ``grads``.

        Args:
            grads: the gradients before.
            share: a constant factor, a scalar.
            overwrite: whether the result may be written to ``grads``.
        """
        factor = share * self.times
        if isinstance(factor, float) or factor.device.type == "cpu":
            factor = fitting(float(factor), self.after[0].dtype)
            if not overwrite:
                return lerp(grads, self.after, factor)
            lerp_to(grads, self.after, factor)
            return grads
        subtract_from(self.after, grads)  # on other devices a number would wait for the device
        scale_by(self.after, factor)
        add_to(self.after, grads)
        return self.after


def fitting(x: float, dtype: torch.dtype) -> float:
    """Return a number as a dtype has it: infinite if it is too large."""
    return x if abs(x) <= torch.finfo(dtype).max else math.copysign(math.inf, x) if x == x else x


def node_of(value: Tensor) -> Any:
    """Return the node that computed a number, behind changes of its shape."""
    node = value.grad_fn
    while node is not None and node.name() in ("ViewBackward0", "ReshapeAliasBackward0"):
        node = node.next_functions[0][0]
    return node


def known_gradient(
    value: Tensor,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    share: Tensor | None = None,
    difference: Difference | None = None,
    plus: Number | None = None,
) -> Tensor:
    """Return a value whose gradients in ``leaves`` are ``grads``: its backward computes nothing.

    Args:
        value: one number, of any shape; its own graph is cut. With ``share``, values ``[G]``.
        leaves: the tensors that the value depends on.
        grads: the gradient of the value in each leaf; with ``share``, of ⟨share, value⟩.
        share: c ``[G]``: the incoming gradient of the backward pass must be a multiple of c.
        difference: what ``grads`` are; then these are empty, and computed when they are needed.
        plus: a number to add to the value.

    Returns:
        The value, differentiable once.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = known_gradient(torch.tensor(5.0), [w], [torch.tensor([3.0, 4.0])])
    >>> (2 * y).backward()
    >>> w.grad
    tensor([6., 8.])
    """
    made = difference and Made(difference, [*map(write_count, difference.parts())])
    out: Tensor = _KnownGradient.apply(
        value.detach(), plus, share, made, len(leaves), *leaves, *grads
    )
    if out.grad_fn is not None:
        out.grad_fn.difference = difference  # type: ignore[attr-defined]
    return out


class Made(NamedTuple):
    """A difference, and how often its parts had been written to: autograd does not hold them."""

    difference: Difference
    versions: list[int]

    def computed(self) -> list[Tensor]:
        """Return the gradients.

        Raises:
            RuntimeError: if a part was written to since.
        """
        if self.versions != [*map(write_count, self.difference.parts())]:
            raise RuntimeError("a gradient of the penalty was modified by an inplace operation")
        return self.difference.computed()


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        plus: Number | None,
        share: Tensor | None,
        made: Made | None,
        count: int,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(share, *tensors[count:])
        ctx.made, ctx.dtypes = made, [t.dtype for t in tensors[:count]]
        return value.clone() if plus is None else value + plus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        share, *known = ctx.saved_tensors
        if share is None:
            factor = grad if grad.ndim == 0 else grad.sum()
        else:
            size = share.square().sum()
            factor = (grad * share).sum() / torch.where(size == 0, 1, size)
        grads = known if ctx.made is None else ctx.made.computed()
        if factor.device.type != "cpu" or factor.item() != 1:  # another device would be waited for
            grads = [g * factor for g in grads]
        pairs = zip(grads, ctx.dtypes, strict=True)
        grads = [g if g.dtype == dtype else g.to(dtype) for g, dtype in pairs]
        return None, None, None, None, None, *grads, *[None] * len(known)
