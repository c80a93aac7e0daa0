"""Finite differences in the weights: the gradient here, and at moved weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import norms_of, times
from gpkit.autodiff.derivatives import as_rows, first_gradients
from gpkit.autodiff.gates import Gates, recorded
from gpkit.autodiff.known_gradient import (
    Difference,
    is_plain,
    known_gradient,
    node_of,
    perturbed,
    require_leaves,
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
        (leaves, base), gates = node.known, node.gates
    else:
        leaves = graph.leaves(target.y)
        with recorded(target.y) as gates:
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

    def gradient(moves: list[Tensor] | None) -> list[Tensor]:
        if moves is None:
            here = [widened(g) for g in zeros_for_none(base, leaves)]
            return pairwise_sums(here, window.earlier_sum(leaves, scale)) if window else here
        with perturbed(target.xs, moves, swap=True):
            y = evaluate()
            hold(gates, y)
            moved = first_gradients(y, tuple(leaves), retain=False)
            there = [widened(g) for g in zeros_for_none(moved, leaves)]
            if window is None:
                return there
            return pairwise_sums(there, window.rerun_sum(leaves, scale, hold))

    epsilon = spacing(target.y, *target.xs)
    plain = window is None and target.compared is None and norm == "l2"
    if plain and is_plain([*leaves, *grads]):
        n, difference = in_few_passes(fd, target.xs, grads, leaves, epsilon, gradient)
        return known_gradient(n.square().reshape(1), leaves, (), difference=difference)
    known, compared = (target.xs, grads, norm, epsilon, gradient), target.compared
    n, slopes = slopes_of(fd, *known, compared=compared)
    n2 = known_gradient(n.square().reshape(1), leaves, slopes)
    return n2 if compared is None else compared.pulled(n2, ascent(compared, grads, norm))


def in_few_passes(
    fd: Stepping,
    xs: Sequence[Tensor],
    grads: Sequence[Tensor],
    leaves: Sequence[Tensor],
    epsilon: float,
    gradient: Gradient,
) -> tuple[Tensor, Difference]:
    """Return what `slopes_of` does, for plain tensors and "l2": without v, the quotient undone."""
    n = size = torch.stack(norms_of(grads)).norm()
    if fd.step is None:  # a given step does not depend on the weights
        size = torch.stack(norms_of([x.detach() for x in xs])).norm()
    unit = length_for(size / sum(x.numel() for x in xs) ** 0.5, epsilon, fd.step, fd.side)
    unit = unit / torch.where(n > 0, n, 1)  # the move is along ∇L = n v
    a, b = SIGNS[fd.side]

    def ends(factor: float) -> Difference:
        h = unit * factor
        before, after = (gradient(times(grads, h * s) if s else None) for s in (a, b))
        return Difference(leaves, before, after, (n > 0) * 2 / ((b - a) * h))

    looking = look(fd, epsilon, xs)
    for factor in looking:
        looking.found = ends(factor).computed()
    return n, ends(looking.factor)


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
