"""Window: the micro-batches and ranks whose gradients are averaged before the norm is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import as_rows, first_gradients, gradients, unhooked
from gpkit.autodiff.gates import Gates, carry, recorded
from gpkit.autodiff.known_gradient import known_gradient
from gpkit.autodiff.numerics import (
    reduce_rows,
    root,
    steepest,
    wide,
    without_autocast,
    zeros_for_none,
)
from gpkit.estimators.compared import Compared

POOLED = ("accumulated", "global")  # scopes that average gradients over a window


class Window:
    r"""Micro-batches whose gradients are averaged before the norm n is taken.

    Let ḡ = (1/A) Σ_a g_a be the mean over A micro-batches (and then over ranks), and H_a the
    Hessian of micro-batch a:

    .. math:: \nabla_\theta \|\bar g\|^2 = \frac{2}{A} \sum_a H_a \, \bar g ,

    so a second backward pass through each micro-batch, with the constant vector ḡ, gives the whole
    gradient. Earlier micro-batches are rerun for it one at a time, so no graph is kept longer than
    its micro-batch. The penalty's gradient is 2 H_a ḡ for each micro-batch; training averages these
    over micro-batches and ranks, as it does with all gradients.

    Args:
        size: A, the number that training divides the sum of the micro-batches' gradients by.
        ranks: whether to average over the ranks of a distributed run too.
    """

    def __init__(self, size: int = 1, *, ranks: bool = False) -> None:
        self.size = size
        self.ranks = ranks
        self._functions: list[tuple[Callable[[], Tensor], Gates]] = []
        self._sums: dict[Tensor, Tensor] = {}  # by parameter, of the earlier micro-batches

    def add(
        self,
        function: Callable[[], Tensor],
        leaves: Iterable[Tensor],
        grads: Iterable[Tensor],
        gates: Gates,
    ) -> None:
        """Add a micro-batch: the function of its loss, the leaves, their gradients, its gates."""
        self._functions.append((function, gates))
        for leaf, grad in zip(leaves, grads, strict=True):
            grad = grad.detach().to(wide(grad))
            self._sums[leaf] = self._sums[leaf] + grad if leaf in self._sums else grad

    def mean(
        self, grads: Sequence[Tensor], xs: Sequence[Tensor], scale: Tensor | float | None
    ) -> list[Tensor]:
        """Return ḡ, the mean of the earlier gradients and these: constants in float32 or better.

        Args:
            grads: scale·∇L of this micro-batch, one tensor for each of ``xs``.
            xs: the parameters.
            scale: the factor that the loss was multiplied by, or None.

        Returns:
            scale·ḡ, one tensor for each of ``xs``.
        """
        means = [g.detach().to(wide(g)) for g in grads]
        for i, x in enumerate(xs):
            if x in self._sums:
                means[i] = means[i] + scaled(self._sums[x], scale)
        if self.ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            flat = torch.cat([g.reshape(-1) for g in means])
            torch.distributed.all_reduce(flat)
            flat /= torch.distributed.get_world_size()
            parts = flat.split([g.numel() for g in means])
            means = [part.reshape(g.shape) for part, g in zip(parts, means, strict=True)]
        return [g / self.size for g in means]

    def squared_norms(
        self,
        y: Tensor,
        xs: Sequence[Tensor],
        scale: Tensor | float | None,
        norm: str,
        compared: Compared | None = None,
    ) -> Tensor:
        """Return n² = ‖ḡ‖² ``[1]``, whose gradient is (2/A) Σ H_a ḡ, see the class."""
        local = gradients(y.sum(), tuple(xs))
        rows = [as_rows(g, False) for g in self.mean(local, xs, scale)]
        rows = rows if compared is None else compared.row(rows)
        n2 = reduce_rows([tuple(rows)], norm)
        pull = [2 * root(n2.detach()) * v for v in steepest([r.detach() for r in rows], norm)]
        pull = pull if compared is None else compared.times(pull)  # ∂n²/∂ḡ

        def along(grads: Sequence[Tensor]) -> Tensor:
            flat = [as_rows(g.to(wide(g)), False) for g in grads]
            return torch.stack(
                [((g - g.detach()) * p).sum() for g, p in zip(flat, pull, strict=True)]
            ).sum()

        n2 = n2 + along(local)
        sums: dict[Tensor, Tensor] = {}
        for function, _ in self._functions:
            y = scaled(function(), scale)
            part = along(gradients(y, tuple(xs)))
            leaves = graph.leaves(part)
            for leaf, grad in zip(leaves, first_gradients(part, tuple(leaves)), strict=True):
                if grad is not None:
                    sums[leaf] = sums[leaf] + grad if leaf in sums else grad
        if sums:
            n2 = n2 + known_gradient(torch.zeros_like(n2), list(sums), list(sums.values()))
        return n2

    def earlier_sum(self, leaves: Sequence[Tensor], scale: Tensor | float | None) -> list[Tensor]:
        """Return scale times the sum of the gradients of the earlier micro-batches."""
        zeros = [torch.zeros_like(x, dtype=wide(x)) for x in leaves]
        return [
            scaled(self._sums.get(x, zero), scale) for x, zero in zip(leaves, zeros, strict=True)
        ]

    def rerun_sum(
        self,
        leaves: Sequence[Tensor],
        scale: Tensor | float | None,
        hold: Callable[[Gates, Tensor], None],
    ) -> list[Tensor]:
        """Return the same sum at the current weights: reruns each earlier micro-batch.

        Args:
            leaves: the parameters.
            scale: the factor that the loss was multiplied by, or None.
            hold: keeps the output of a rerun on the gates of the first run.

        Returns:
            A tensor for each leaf.
        """
        totals = [torch.zeros_like(x, dtype=wide(x)) for x in leaves]
        for function, gates in self._functions:
            y = scaled(function(), scale)
            hold(gates, y)
            grads = zeros_for_none(first_gradients(y, tuple(leaves), retain=False), leaves)
            totals = [t + g for t, g in zip(totals, grads, strict=True)]
        return totals


def scaled(x: Tensor, scale: Tensor | float | None) -> Tensor:
    """Return ``x * scale``, or ``x`` if ``scale`` is None."""
    return x if scale is None else x * scale


def summarised(
    loss: Tensor,
    scale: Tensor | float | None = None,
    *,
    retain: bool = False,
    windows: Iterable[tuple[Window, Callable[[], Tensor]]] = (),
) -> Tensor:
    """Return a loss whose graph is replaced by the computed gradients of its leaves.

    Args:
        loss: one number, or losses whose sum is differentiated.
        scale: a factor against underflow while the gradients are computed, or None.
        retain: whether to keep the graph of ``loss`` for other uses.
        windows: windows to add the gradients to, each with a function that recomputes the loss.

    Returns:
        The loss, with the same value; its backward pass computes nothing.
    """
    nodes = list(graph.nodes(loss))
    leaves = graph.leaves(loss, nodes)
    with without_autocast(loss), unhooked(leaves), recorded(loss, nodes) as gates:
        y = loss.sum() if scale is None else loss.sum() * scale
        grads = torch.autograd.grad(y, leaves, retain_graph=retain)
    grads = tuple(g.to_dense() if g.is_sparse else g for g in grads)
    if scale is not None:
        grads = tuple(g.to(wide(g)) / scale for g in grads)
    shared = False
    for window, function in windows:
        window.add(function, leaves, grads, gates)
        shared = True
    known = None if shared else (leaves, grads)
    return carry(known_gradient(loss, leaves, grads), gates, known, graph.spacing_of(nodes))
