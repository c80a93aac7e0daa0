"""Finite differences in the weights: the gradient here, and at moved weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import norms_of
from gpkit.autodiff.derivatives import as_rows, first_gradients
from gpkit.autodiff.gates import Gates, recorded
from gpkit.autodiff.known_gradient import (
    Difference,
    Number,
    is_plain,
    known_gradient,
    node_of,
)
from gpkit.autodiff.numerics import (
    Over,
    over_all,
    pairwise_sums,
    reduce_rows,
    spacing,
    widened,
    zeros_for_none,
)
from gpkit.estimators.base import Target
from gpkit.estimators.compared import Compared
from gpkit.estimators.differences.moves import go, perturbed, require_leaves, ways
from gpkit.estimators.differences.step_factor import SIGNS, Stepping, ascent, length_for, look

Gradient = Callable[[list[Tensor] | None], list[Tensor]]  # moves (None: none) -> ∇L in all leaves


def of_weights(fd: Stepping, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
    """Return ‖∇L‖² ``[1]``, whose gradient in all leaves is 2n (∇L(θ + hv) - ∇L(θ)) / h.

    Args:
        fd: the step.
        target: L with its graph, or with a known gradient, which is used as it is.
        evaluate: recomputes L at the current weights.
        norm: "l2", "l1" or "linf".
    """
    require_leaves(target.xs)
    node: Any = node_of(target.y)
    leaves: Sequence[Tensor] = ()
    base: Sequence[Tensor | None] = ()
    if hasattr(node, "known"):
        (leaves, base), gates, casts = node.known, node.gates, node.epsilon
    else:
        nodes = [*graph.nodes(target.y)]
        leaves, casts = graph.leaves(target.y, nodes), graph.spacing_of(nodes)
        with recorded(target.y, nodes) as gates:
            base = first_gradients(target.y, tuple(leaves))
    places = {id(leaf): i for i, leaf in enumerate(leaves)}
    found = [base[places[id(x)]] if id(x) in places else None for x in target.xs]
    grads = zeros_for_none(found, target.xs)
    window, scale = target.window, target.scale
    if window is not None:
        grads = window.mean(grads, target.xs, scale)
    elif not any(id(x) in places for x in target.xs):
        rows = tuple(as_rows(widened(g), False) for g in grads)
        return reduce_rows(target.split([rows]), norm)

    def hold(gates: Gates, y: Tensor) -> None:
        if not fd.cross_kinks:
            gates.hold(y)

    def there() -> list[Tensor]:
        return gradient_there(evaluate, leaves, partial(hold, gates))

    def gradient(moves: list[Tensor] | None) -> list[Tensor]:
        if moves is None:
            here = [widened(g) for g in zeros_for_none(base, leaves)]
            return pairwise_sums(here, window.earlier_sum(leaves, scale)) if window else here
        with perturbed(target.xs, moves, swap=True):
            grads = there()
            return pairwise_sums(grads, window.rerun_sum(leaves, scale, hold)) if window else grads

    def along(h: Number) -> Sequence[Tensor]:
        if isinstance(h, float) and h == 0:
            return gradient(None)
        forth, back = ways(target.xs, grads, h)
        try:
            go(forth)
            return there()
        finally:
            go(back)

    epsilon = max(casts, spacing(target.y, *target.xs))
    plain = window is None and target.compared is None and norm == "l2"
    if plain and is_plain([*leaves, *grads]):
        size = size_of(target.xs) if fd.step is None else 0.0
        step, top = length_for(size, epsilon, fd.step, fd.side), torch.finfo(grads[0].dtype).max
        stride, looking = stride_of(length_of(grads), step, top), look(fd, epsilon, target.xs)
        difference = in_few_passes(stride, fd.side, looking, leaves, along)
        n2 = torch.as_tensor(stride.n, dtype=grads[0].dtype).square().reshape(1)
        return known_gradient(n2, leaves, (), difference=difference)
    known, compared = (target.xs, grads, norm, epsilon, gradient), target.compared
    length, slopes = slopes_of(fd, *known, compared=compared)
    n2 = known_gradient(length.square().reshape(1), leaves, slopes)
    return n2 if compared is None else compared.pulled(n2, ascent(compared, grads, norm))


def gradient_there(
    evaluate: Callable[[], Tensor], leaves: Sequence[Tensor], hold: Callable[[Tensor], None]
) -> list[Tensor]:
    """Return ∇L in all leaves, of L computed anew, in float32 or better.

    Args:
        evaluate: computes L.
        leaves: the tensors.
        hold: keeps L on the gates of another point.
    """
    y = evaluate()
    hold(y)
    moved = first_gradients(y, tuple(leaves), retain=False)
    return [widened(g) for g in zeros_for_none(moved, leaves)]


class Stride(NamedTuple):
    """The step along ∇L = n v in the weights, before a look at it.

    Args:
        n: ‖∇L‖.
        unit: h/n: the weights move by this multiple of ∇L.
        twice: 2, or zero where n is.
        top: the largest multiple.
    """

    n: Number
    unit: Number
    twice: Number
    top: float

    def times(self, factor: float) -> Number:
        """Return the multiple of ∇L that the weights move by, for a factor of the step."""
        h = self.unit * factor
        return min(h, self.top) if isinstance(h, float) else h

    def quotient(self, h: Number) -> Number:
        """Return 2n divided by the length of a step of this multiple of ∇L."""
        return math.inf if isinstance(h, float) and h == 0 else self.twice / h


def stride_of(n: Number, step: Any, top: float) -> Stride:
    """Return the step in the weights.

    Args:
        n: ‖∇L‖.
        step: its length.
        top: the largest number of the dtype.
    """
    if isinstance(n, float):
        return Stride(n, step / n if n > 0 else step, 2.0 * (n > 0), top)
    return Stride(n, step / torch.where(n > 0, n, 1), (n > 0) * 2, top)


def size_of(xs: Sequence[Tensor]) -> Number:
    """Return the root mean square of the entries of weights."""
    return length_of([x.detach() for x in xs]) / sum(x.numel() for x in xs) ** 0.5


def in_few_passes(
    stride: Stride,
    side: str,
    looking: look,
    leaves: Sequence[Tensor],
    along: Callable[[Number], Sequence[Tensor]],
) -> Difference:
    """Return what `slopes_of` does, for plain tensors and "l2": without v, the quotient undone.

    Args:
        stride: the step.
        side: of the difference.
        looking: at the step.
        leaves: all leaves of L.
        along: h -> ∇L in all leaves, at weights moved by h ∇L.

    Returns:
        The gradient of n² in all leaves.
    """
    a, b = SIGNS[side]

    def ends(factor: float) -> Difference:
        h = stride.times(factor)
        before, after = along(h * a if a else 0.0), along(h * b if b else 0.0)
        return Difference(leaves, before, after, stride.quotient((b - a) * h))

    for factor in looking:
        looking.found = ends(factor).computed(overwrite=b > 0)
    return ends(looking.factor)


def length_of(parts: Sequence[Tensor]) -> Number:
    """Return the norm over all entries: a float on a CPU, which other devices would wait for."""
    norms = norms_of(parts)
    if norms[0].device.type == "cpu":
        return math.hypot(*torch.stack(norms).tolist())
    length: Tensor = torch.stack(norms).norm()
    return length


def slopes_of(
    fd: Stepping,
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    norm: str,
    epsilon: float,
    gradient: Gradient,
    over: Over = over_all,
    compared: Compared | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Return n, the norm of the gradient in weights, and the gradient of n² in all leaves.

    Args:
        fd: the step.
        xs: the weights θ.
        grads: ∇L in ``xs``.
        norm: "l2", "l1" or "linf".
        epsilon: of the dtype that the loss is computed in.
        gradient: moves (None: none) -> ∇L in all leaves, at weights moved by them.
        over: the sum or maximum over all entries, see `over_all`.
        compared: what ∇L is compared with.

    Returns:
        n, a scalar, and 2n (∇L(θ + hv) - ∇L(θ)) / h, one tensor for each leaf.
    """
    n, v, directions = ascent(compared, grads, norm, over)
    length = over(v if fd.step else directions, torch.square, "sum").sqrt()
    weights = [x.detach() for x in xs]
    size = over(weights, torch.square, "sum").sqrt() / sum(x.numel() for x in xs) ** 0.5
    unit = length_for(size, epsilon, fd.step, fd.side)
    unit = unit / torch.where(length > 0, length, torch.ones_like(length))
    a, b = SIGNS[fd.side]

    def difference(factor: float) -> list[Tensor]:
        h = unit * factor

        def along(sign: float) -> list[Tensor]:
            if sign == 0:
                return gradient(None)
            pairs = zip(xs, directions, strict=True)
            return gradient([(h * sign * v).to(x.dtype) for x, v in pairs])

        times = 2 * n / ((b - a) * h)
        pairs = zip(along(a), along(b), strict=True)
        return [(widened(after) - before) * times for before, after in pairs]

    looking = look(fd, epsilon, xs, over)
    for factor in looking:
        looking.found = difference(factor)
    return n, difference(looking.factor)
