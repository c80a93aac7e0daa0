"""The nodes of autograd whose backward passes are written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.compat import keeps_graph
from gpkit.autodiff.derivatives import gradients, unhooked
from gpkit.autodiff.numerics import without_autocast
from gpkit.shortcut.chains.written_out import Inwards, Link, downwards, inwards, upwards
from gpkit.shortcut.compat import RUN


class HeldGradient:
    """What the node of a gradient needs, until its backward pass has run.

    Args:
        links: the values of the chain.
        delta: the gradient at the output of the last layer, a constant.
        of: y, x, and ones in the shape of y.
    """

    def __init__(self, links: list[Link], delta: Tensor, of: tuple[Tensor, Tensor, Tensor]) -> None:
        self.links, self.of = links, of
        with torch.no_grad():
            self.found = inwards(delta, links, through=True)

    def free(self) -> None:
        """Let go of it."""
        del self.links, self.of, self.found


class InputGradient(torch.autograd.Function):
    """The gradient in the input of a chain, of its parameters."""

    @staticmethod
    def forward(ctx: Any, held: HeldGradient, *parameters: Tensor) -> Tensor:
        """Return it."""
        ctx.held, ctx.count = held, len(parameters)
        ctx.save_for_backward(*parameters, *values(held.links))
        return held.found.products.pop()  # a node that holds its own result is never freed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients in the parameters."""
        saved, held = ctx.saved_tensors, ctx.held
        if torch.is_grad_enabled():  # create_graph=True
            (y, x, ones), parameters = held.of, saved[: ctx.count]
            (g,) = gradients(y, (x,), ones)
            return None, *differentiable_in(parameters, g, grad)
        nothing = [None] * len(held.links)
        with without_autocast(grad):
            _, hats, curves = upwards(held.links, held.found, nothing, grad)
            made = downwards(held.links, held.found, hats, curves, nothing, None)
        if not keeps_graph():
            held.free()
        return None, *made


class HeldTotal:
    """What the node of a loss with its penalty needs, until its backward pass has run.

    Args:
        links: the values of the chain.
        found: δ, G and h' of its layers.
        top: T, and what it is made of: a number in place of the mean loss, δ and a of the layers.
        middle: the mean loss and the δ of the last layer, with their graphs, and the edge at the
            output of the last layer, where these graphs begin.
        others: leaves outside of the chain.
        again: returns T with the graph of the loss itself.
    """

    def __init__(
        self,
        links: list[Link],
        found: Inwards,
        top: tuple[Tensor, Sequence[Tensor]],
        middle: tuple[Tensor, Tensor, Any],
        others: Sequence[Tensor],
        again: Callable[[], Tensor],
    ) -> None:
        self.links, self.found = links, found
        self.top, self.middle, self.others, self.again = top, middle, others, again

    def free(self) -> None:
        """Let go of it."""
        del self.links, self.found, self.top, self.middle, self.others, self.again


class Total(torch.autograd.Function):
    """A loss with its penalty, of the parameters of a chain and of other leaves."""

    @staticmethod
    def forward(ctx: Any, held: HeldTotal, *leaves: Tensor) -> Tensor:
        """Return it."""
        ctx.held, ctx.count = held, len(leaves)
        ctx.save_for_backward(*leaves, *values(held.links))
        return held.top[0].detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Return the gradients in the leaves."""
        saved, held = ctx.saved_tensors, ctx.held
        if torch.is_grad_enabled():  # create_graph=True
            return None, *differentiable_in(saved[: ctx.count], held.again(), grad)
        (total, parts), (mean, delta, edge) = held.top, held.middle
        count = len(held.links)
        with without_autocast(total), unhooked(held.others):
            at_mean, *found = derivatives((total,), (grad,), (*parts, *held.others))
            at_delta, at_a, of_form = (
                found[:count],
                found[count : 2 * count - 1],
                found[2 * count - 1 :],
            )
            at_last, hats, curves = upwards(held.links, held.found, at_delta, None)
            pairs = [(mean, at_mean), (delta, at_last)]
            given = [(y, v) for y, v in pairs if y.requires_grad and v is not None]
            ys, vs = zip(*given, strict=True) if given else ((), ())
            at_z, *of_loss = derivatives(ys, vs, (edge, *held.others))
            made = downwards(held.links, held.found, hats, curves, (*at_a, None), at_z)
        if not keeps_graph():
            held.free()
        return None, *made, *map(plus, of_form, of_loss)


def values(links: Sequence[Link]) -> list[Tensor]:
    """Return what a backward pass takes of links, to be saved: so writes to it are noted."""
    found = [link.a for link in links]
    return found + [x.s for x in links if x.activation is not None and not x.activation.of_result]


def derivatives(
    ys: Sequence[Tensor], grads: Sequence[Tensor], ends: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Return gradients without a graph, and keep that of ys: other losses may share a part of it.

    Args:
        ys: the outputs.
        grads: their factors.
        ends: tensors or edges.
    """
    return RUN((*ys,), (*grads,), True, False, (*ends,), True, accumulate_grad=False)


def differentiable_in(
    leaves: Sequence[Tensor], y: Tensor, factor: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of factor·y in leaves, with a graph."""
    with unhooked(leaves):
        return torch.autograd.grad(y, leaves, factor, create_graph=True, allow_unused=True)


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return a + b, where None is zero."""
    return a if b is None else b if a is None else a + b
