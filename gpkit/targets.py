"""What is differentiated, with respect to what, and what an estimator makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpkit.draws import Source
from gpkit.pixels import per_pixel

if TYPE_CHECKING:
    from gpkit.window import Window


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

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse what it does not estimate: of inputs if ``batched``, else of weights."""

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable, in float32 or better."""
        raise NotImplementedError(f"{type(self).__name__} must define squared_norms")


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype in which norms are taken: float32 for half precision."""
    return torch.float32 if x.dtype in HALF else x.dtype


HALF = (torch.float16, torch.bfloat16)


def reduce_rows(rows: object, norm: str) -> Tensor:
    """Return n² ``[G]`` of a derivative whose entries come in rows, each a tuple of ``[G, n]``."""
    total: Tensor | None = None
    for row in rows:  # type: ignore[attr-defined]
        for part in row:
            part = part.to(wide(part)) if part.dtype in HALF else part
            if norm == "l2":
                part = part.square().sum(1)
            elif norm == "l1":
                part = part.abs().sum(1)
            else:
                part = part.abs().amax(1)
            if total is None:
                total = part
            else:
                total = torch.maximum(total, part) if norm == "linf" else total + part
    assert total is not None, "a derivative has at least one entry"
    return total if norm == "l2" else total.square()
