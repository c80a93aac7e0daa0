"""Values with a known gradient."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpkit.autodiff.compat import (
    add_to,
    keeps_graph,
    lerp,
    lerp_to,
    scale_by,
    subtract_from,
    write_count,
)

Number = Tensor | float  # a scalar


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


class Difference(NamedTuple):
    """The gradient of a value as a difference of two, ``times · (after - before)``."""

    leaves: Sequence[Tensor]
    before: Sequence[Tensor]
    after: Sequence[Tensor]
    times: Number

    def parts(self) -> list[Tensor]:
        """Return the tensors that the gradients are computed from."""
        return [*self.before, *self.after]

    def computed(self, *, overwrite: bool = False) -> Sequence[Tensor]:
        """Return the gradients.

        Args:
            overwrite: whether they may be written to ``after``, where memory allows it.
        """
        if overwrite and are_apart(self.after):
            subtract_from(self.after, self.before)
            scale_by(self.after, self.times)
            return self.after
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
            overwrite: whether the result may be written to ``grads``, where memory allows it.
        """
        if not self.after:
            return grads
        factor = fitted(share * self.times, self.after[0].dtype)
        if isinstance(factor, float):
            if not (overwrite and are_apart(grads)):
                return lerp(grads, self.after, factor)
            lerp_to(grads, self.after, factor)
            return grads
        if not are_apart(self.after):
            return [g + (after - g) * factor for g, after in zip(grads, self.after, strict=True)]
        subtract_from(self.after, grads)  # on other devices a number would wait for the device
        scale_by(self.after, factor)
        add_to(self.after, grads)
        return self.after


NBYTES = attrgetter("nbytes")


def are_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether each entry of tensors has memory of its own, so that they can be written to.

    The gradients of w and b in ``x @ (w + b)`` are one tensor; that of ``w.sum()`` is one number.

    Returns:
        False as well for rare layouts that would need a closer look.

    >>> g = torch.ones(3)
    >>> are_apart([g, torch.ones(3)]), are_apart([g, g]), are_apart([torch.ones(1).expand(3)])
    (True, False, False)
    """
    if all(map(Tensor.is_contiguous, tensors)):
        starts = [*map(Tensor.data_ptr, tensors)]
        spans = sorted(zip(starts, map(NBYTES, tensors), strict=True))
        starts.sort()
        return all(map(operator.le, map(sum, spans), starts[1:]))  # no end behind the next start
    memories = {t.untyped_storage().data_ptr() for t in tensors}
    return len(memories) == len(tensors) and not any(0 in t.stride() for t in tensors)


def fitted(factor: Number, dtype: torch.dtype) -> Number:
    """Return a number as a dtype has it, infinite if it is too large; a float on a CPU."""
    if not isinstance(factor, float) and factor.device.type != "cpu":
        return factor
    x = float(factor)
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
    *,
    owned: bool = False,
) -> Tensor:
    """Return a value whose gradients in ``leaves`` are ``grads``: its backward computes nothing.

    A backward pass that does not retain the graph gives the gradients away: no copy is made.

    Args:
        value: one number, of any shape; its own graph is cut. With ``share``, values ``[G]``.
        leaves: the tensors that the value depends on.
        grads: the gradient of the value in each leaf; with ``share``, of ⟨share, value⟩.
        share: c ``[G]``: the incoming gradient of the backward pass must be a multiple of c.
        difference: what ``grads`` are; then these are empty, and computed when they are needed.
        plus: a number to add to the value.
        owned: whether nobody else has the gradients, which then may be overwritten; they have the
            dtypes of the leaves, and the value has no graph.

    Returns:
        The value, differentiable once.

    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> y = known_gradient(torch.tensor(5.0), [w], [torch.tensor([3.0, 4.0])])
    >>> (2 * y).backward()
    >>> w.grad
    tensor([6., 8.])
    """
    if owned:
        own: Tensor = OwnedGradient.apply(value, plus or 0.0, [*grads], *leaves)
        return own
    kept = Kept(grads, share, difference)
    out: Tensor = _KnownGradient.apply(value.detach(), plus, kept, *leaves)
    if difference is not None and out.grad_fn is not None:
        out.grad_fn.difference = difference  # type: ignore[attr-defined]
    return out


class Kept:
    """Gradients that a backward pass will hand out, which others have as well.

    Args:
        grads: the gradients.
        share: see `known_gradient`.
        difference: what they are, or None.
    """

    def __init__(
        self, grads: Sequence[Tensor], share: Tensor | None, difference: Difference | None
    ) -> None:
        self.share, self.difference = share, difference
        self.parts = [*grads] if difference is None else difference.parts()
        self.versions = [*map(write_count, self.parts)]

    def handed_out(self, *, keep: bool) -> list[Tensor]:
        """Return the gradients.

        Args:
            keep: whether they are handed out again later: then the caller gets copies.

        Raises:
            RuntimeError: if they were handed out before, or if a part was written to since.
        """
        parts = self.parts
        if parts is None:
            raise RuntimeError(GIVEN_AWAY)
        if self.versions != [*map(write_count, parts)]:
            raise RuntimeError("a gradient of the penalty was modified by an inplace operation")
        difference = self.difference
        if not keep:
            self.parts = self.difference = None  # type: ignore[assignment]
        if difference is not None:
            return [*difference.computed()]
        return [part.clone() for part in parts] if keep else parts


GIVEN_AWAY = (
    "a second backward pass through a loss with a penalty by finite differences, whose gradient "
    "the first pass has given away: call backward(retain_graph=True) first"
)


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, plus: Number | None, kept: Kept, *leaves: Tensor
    ) -> Tensor:
        ctx.kept, ctx.dtypes = kept, [leaf.dtype for leaf in leaves]
        return value.clone() if plus is None else value + plus

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept: Kept = ctx.kept
        share = kept.share
        if share is None:
            factor = grad if grad.ndim == 0 else grad.sum()
        else:
            size = share.square().sum()
            factor = (grad * share).sum() / torch.where(size == 0, 1, size)
        grads = kept.handed_out(keep=keeps_graph())
        if factor.device.type != "cpu" or factor.item() != 1:  # another device would be waited for
            grads = [g * factor for g in grads]
        if [g.dtype for g in grads] != ctx.dtypes:
            grads = [g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, None, None, *grads


def _given_away(ctx: Any, grad: Tensor) -> Any:
    if torch.is_grad_enabled():  # create_graph=True
        return _given_away.once(ctx, grad)  # type: ignore[attr-defined]
    grads = ctx.grads
    if grads is None:
        raise RuntimeError(GIVEN_AWAY)
    if keeps_graph():
        grads = [g.clone() for g in grads]
    else:
        ctx.grads = None
    factor: Number = grad.item() if grad.device.type == "cpu" else grad.reshape(())
    if isinstance(factor, Tensor) or factor != 1:
        if are_apart(grads):
            scale_by(grads, factor)
        else:
            grads = [g * factor for g in grads]
    return None, None, None, *grads


_given_away.once = once_differentiable(_given_away)  # type: ignore[attr-defined]


class OwnedGradient(torch.autograd.Function):
    """The same in few steps, for gradients that nobody else has.

    It is applied to the value, a number to add to it, the gradients in a list, and the leaves.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, plus: Number, grads: list[Tensor], *leaves: Tensor
    ) -> Tensor:
        """Return the sum of the first two."""
        ctx.grads = grads
        return value + plus

    backward = staticmethod(_given_away)
