"""What an estimator is given, and what it must give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpkit.autodiff.numerics import per_pixel, wide
from gpkit.autodiff.random import Source
from gpkit.estimators.window import Window


@dataclass(eq=False)
class Target:
    """What is differentiated, with respect to what.

    Args:
        y: ``[G, m]``: m outputs for each of G groups; or one number of any shape, their sum.
        xs: the variables: ``[G, *S]`` each if ``batched``, else any shapes and G = 1.
        batched: whether group g of ``y`` depends on ``x[g]`` alone.
        evaluate: gives ``y`` anew, with the same random numbers: at the inputs that it is called
            with, or, called with nothing, at the weights as they are. None where only a graph is.
        pixels: whether every pixel of the ``xs`` ``[G, C, *S]`` has a norm of its own, at order 1.
        mean: whether ``y`` is but the sum over the groups, ``[1, 1]``.
        window: the micro-batches, or ranks, whose gradients are averaged with this one's.
        scale: what ``y`` was multiplied by, if it was, so that small gradients do not vanish.
        share: n² ``[G]`` -> ∂P/∂n² ``[G]``, constants, P being the reduced value of the penalty.
        times: what the gradient of ``y``, one number, is multiplied by: a constant, which only
            `exact` knows of. It saves the multiplication of ``y``, and its part of the graph.
    """

    y: Tensor
    xs: tuple[Tensor, ...]
    batched: bool
    evaluate: Callable[..., Tensor] | None = None
    pixels: bool = False
    mean: bool = False
    window: Window | None = None
    scale: Tensor | float | None = None
    share: Callable[[Tensor], Tensor] | None = None
    times: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.y.device

    def scaled(self, scale: Tensor | float) -> Target:
        """Return the target of ``y`` times a scale: its n² is that of ``y`` times scale²."""
        evaluate = self.evaluate

        def scaled(*xs: Tensor) -> Tensor:
            assert evaluate is not None
            y = evaluate(*xs)
            return y.to(wide(y)) * scale

        y = self.y.to(wide(self.y)) * scale
        return replace(self, y=y, evaluate=evaluate and scaled, scale=scale)

    def split(self, rows: Iterable[tuple[Tensor, ...]]) -> Iterable[tuple[Tensor, ...]]:
        """Return the rows of a derivative with one line for each norm: a group, or a pixel."""
        if not self.pixels:
            return rows
        return (tuple(map(per_pixel, row, self.xs)) for row in rows)


class Estimator:
    """How n² is obtained."""

    # Whether the graph of the function is enough; if not, the function itself is needed.
    reuses_graph = True
    # Whether a backward pass goes through each graph but once: then it needs no double backward.
    first_order = False
    # Whether gradients in the weights can be averaged over micro-batches before the norm is taken.
    pools = False
    # Whether each pixel of an image can have a norm of its own.
    by_pixel = False

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse what it does not estimate: of inputs if ``batched``, else of weights."""

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        raise NotImplementedError(f"{type(self).__name__} must define squared_norms")


def require_gradient(estimator: Estimator, order: int) -> None:
    """Refuse an order other than one.

    Raises:
        ValueError: if there is another.
    """
    if order > 1:
        raise ValueError(
            f"`estimator={type(estimator).__name__}()` takes order=1; got order={order}: use "
            "estimator='projection' or 'exact'"
        )


def require_function(estimator: Estimator, target: Target) -> Callable[..., Tensor]:
    """Return the function to evaluate, or refuse a graph alone, and several outputs.

    Raises:
        ValueError: if there is no function, or several outputs.
    """
    name = type(estimator).__name__
    if target.evaluate is None:
        call = "penalty(f, x)" if target.batched else "penalty(closure, net)"
        raise ValueError(
            f"`estimator={name}()` evaluates the function at other points, and got a tensor: give "
            f"it the function, {call}, or use estimator='exact'"
        )
    if target.y.shape[1] > 1:
        raise ValueError(
            f"`estimator={name}()` takes one output a group; got {target.y.shape[1]}: use "
            "estimator='projection' or 'exact'"
        )
    return target.evaluate
