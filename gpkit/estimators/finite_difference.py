"""Finite differences: the norm of a gradient without double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import as_rows, first_gradients
from gpkit.autodiff.known_gradient import known_gradient, perturbed, require_leaves
from gpkit.autodiff.numerics import (
    Over,
    Rows,
    dual,
    length_of,
    nonzero_mask,
    over_all,
    pairwise_sums,
    reduce_rows,
    root,
    spacing,
    steepest,
    widened,
    zeros_for_none,
)
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_function, require_gradient

SIDES = ("forward", "backward", "central")


@dataclass(frozen=True)
class finite_difference(Estimator):
    r"""The norm of the gradient by finite differences, with first derivatives only.

    Let v be the direction of steepest ascent, a constant. In the inputs

    .. math:: n = \frac{f(x + h v) - f(x)}{h}, \quad v = \nabla f(x) / \|\nabla f(x)\|,

    and training differentiates this quotient. In the weights n = ‖∇L‖ is exact, and its gradient is

    .. math:: \nabla_\theta \, n^2 = 2 H \nabla L
              \approx 2 n \, \frac{\nabla L(\theta + h v) - \nabla L(\theta)}{h}.

    "backward" uses (f(x) - f(x - hv)) / h, "central" (f(x + hv) - f(x - hv)) / 2h. The error is of
    order h, or h² for "central". For a piecewise-linear net n is correct, but kinks within h change
    its gradient by an amount that does not vanish as h -> 0. All samples move at once, so n is
    wrong if samples are coupled, as by batch norm in training mode.

    Each graph is differentiated once, so it works with compiled nets, fused attention, cuDNN's
    recurrent nets and once-differentiable Functions; a net compiled for dynamic shapes needs
    ``torch._functorch.config.donated_buffer = False``. Give the penalty a callable, not a tensor.
    In the weights it takes one forward and backward pass for the gradient and one for each other
    point; with `GradientPenalty.with_loss` two in total, including the loss. The weights are moved
    in place and restored bit for bit, also after an error. With norm="l1" or "linf", v is the dual
    direction: the signs of the gradient, or the sign of its largest entry.

    Args:
        step: the Euclidean length of the step, h·‖v‖. None is 2√ε, or ε^(1/3)/2 for "central",
            where ε is the machine epsilon of the coarsest dtype used (autocast included), times
            the root mean square of the entries that are moved, if that is above 1. In float32 this
            is 7e-4 and 2e-3. A step of ε∇L, as some papers write it, has h = ε‖∇L‖.
        side: "forward", "backward" or "central".

    Raises:
        ValueError: if ``step`` is not > 0, or ``side`` is another name.

    Source: Finlay and Oberman (2021), arXiv:1905.11468; in the weights Karakida et al. (2023),
    arXiv:2210.02720.

    >>> import gpkit
    >>> x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    >>> f = lambda x: (x**2).sum(1) / 2  # (|x + hv|² - |x|²) / 2h = 5 + h/2
    >>> penalty = gpkit.input_grad_norm(form="norm", estimator=finite_difference(0.5))
    >>> penalty(f, x).item()
    5.25
    """

    step: float | None = None
    side: str = "forward"

    reuses_graph = False
    first_order = True
    pools = True

    def __post_init__(self) -> None:
        if self.step is not None:
            checks.number("finite_difference(step=...)", self.step, 0, strict=True)
        checks.choice("finite_difference(side=...)", self.side, SIDES)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse orders above one.

        Raises:
            ValueError: if ``order`` > 1.
        """
        require_gradient(self, order)

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable once, in float32 or better."""
        evaluate = require_function(self, target)
        if target.mean:
            return self.of_mean(target, evaluate, norm)
        if target.batched:
            return self.of_inputs(target, evaluate, norm)
        return self.of_weights(target, evaluate, norm)

    def of_inputs(self, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
        """Return ((f(x + hv) - f(x)) / h)² ``[G]``, or that of the chosen side."""
        grads = first_gradients(target.y, target.xs)
        rows = [as_rows(widened(g), True) for g in zeros_for_none(grads, target.xs)]
        directions = steepest(rows, norm)
        lengths = self.lengths(target, directions)  # h, [G]

        def along(sign: float) -> Tensor:
            if sign == 0:
                y = target.y
            else:
                moves = [(lengths * sign).unsqueeze(1) * v for v in directions]
                pairs = zip(target.xs, moves, strict=True)
                y = evaluate(*[x + move.reshape(x.shape).to(x.dtype) for x, move in pairs])
            return widened(y).squeeze(1)

        (a, b), n2 = SIGNS[self.side], reduce_rows([tuple(rows)], norm)
        if not any(g is not None for g in grads):
            return n2  # y does not depend on x
        slope = (along(b) - along(a)) / ((b - a) * lengths)
        return (slope * nonzero_mask(n2)).square()

    def of_weights(self, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
        """Return ‖∇L‖² ``[1]``, whose gradient in all leaves is 2n (∇L(θ + hv) - ∇L(θ)) / h."""
        require_leaves(target.xs)
        leaves = graph.leaves(target.y)
        where = [next((i for i, p in enumerate(leaves) if p is x), None) for x in target.xs]
        base = first_gradients(target.y, tuple(leaves))
        grads = zeros_for_none([None if i is None else base[i] for i in where], target.xs)
        window, scale = target.window, target.scale
        if window is not None:
            grads = window.mean(grads, target.xs, scale)
        elif all(i is None for i in where):
            return reduce_rows([tuple(as_rows(widened(g), False) for g in grads)], norm)

        def gradient(moves: list[Tensor] | None) -> list[Tensor]:
            if moves is None:
                here = [widened(g) for g in zeros_for_none(base, leaves)]
                return pairwise_sums(here, window.earlier_sum(leaves, scale)) if window else here
            with perturbed(target.xs, moves):
                moved = first_gradients(evaluate(), tuple(leaves), retain=False)
                there = [widened(g) for g in zeros_for_none(moved, leaves)]
                return pairwise_sums(there, window.rerun_sum(leaves, scale)) if window else there

        epsilon = spacing(target.y, *target.xs)
        n, slopes = self.slopes(target.xs, grads, norm, epsilon, gradient)
        return known_gradient(n.square().reshape(1), leaves, slopes)

    def slopes(
        self,
        xs: Sequence[Tensor],
        grads: Sequence[Tensor],
        norm: str,
        epsilon: float,
        gradient: Callable[[list[Tensor] | None], list[Tensor]],
        over: Over = over_all,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return n, the norm of the gradient in weights, and the gradient of n² in all leaves.

        Args:
            xs: the weights θ.
            grads: ∇L with respect to ``xs``.
            norm: "l2", "l1" or "linf".
            epsilon: the machine epsilon of the dtype that the loss is computed in.
            gradient: moves -> ∇L with respect to all leaves, at weights moved by ``moves``; None
                is no move.
            over: the sum or maximum over all entries of several tensors, see `over_all`.

        Returns:
            n, a scalar, and 2n (∇L(θ + hv) - ∇L(θ)) / h, one tensor for each leaf.
        """
        n, directions = dual(grads, norm, over)
        length = over(directions, torch.square, "sum").sqrt()
        weights = [x.detach() for x in xs]
        size = over(weights, torch.square, "sum").sqrt() / sum(x.numel() for x in xs) ** 0.5
        h = self.length(size, epsilon) / torch.where(length > 0, length, torch.ones_like(length))

        def along(sign: float) -> list[Tensor]:
            if sign == 0:
                return gradient(None)
            pairs = zip(xs, directions, strict=True)
            return gradient([(h * sign * v).to(x.dtype) for x, v in pairs])

        a, b = SIGNS[self.side]
        factor = 2 * n / ((b - a) * h)
        pairs = zip(along(a), along(b), strict=True)
        return n, [(widened(after) - before) * factor for before, after in pairs]

    def of_mean(self, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
        r"""Return n² ``[G]`` of the samples if only their mean loss L is known.

        n_i is the norm of g_i = B ∂L/∂x_i. Training only needs the gradient of Σ c_i n_i², where
        c_i = ∂P/∂n_i² is a constant. One moved loss gives it, because ⟨g_i, v_i⟩ = n_i:

        .. math:: \nabla_\theta \sum_i c_i n_i^2 \approx
                  \frac{\nabla_\theta B L(x + h w) - \nabla_\theta B L(x)}{h}, \quad
                  w_i = 2 c_i n_i v_i
        """
        assert target.share is not None
        leaves = [p for p in graph.leaves(target.y) if not any(p is x for x in target.xs)]
        all_grads = first_gradients(target.y, (*target.xs, *leaves))
        count = len(target.xs)
        grads = zeros_for_none(all_grads[:count], target.xs)
        base = zeros_for_none(all_grads[count:], leaves)
        rows = [as_rows(widened(g), True) for g in grads]
        n2 = reduce_rows([tuple(rows)], norm)
        c = target.share(n2 if target.scale is None else n2 / target.scale / target.scale)
        ws = [(2 * c * root(n2)).unsqueeze(1) * v for v in steepest(rows, norm)]
        longest = length_of(ws).amax()
        h = self.lengths(target, [torch.ones_like(n2).unsqueeze(1)]).amin()
        h = h / torch.where(longest > 0, longest, torch.ones_like(longest))

        def along(sign: float) -> list[Tensor]:
            if sign == 0:
                return [widened(g) for g in base]
            pairs = zip(target.xs, ws, strict=True)
            moved = [x + (sign * h * w).reshape(x.shape).to(x.dtype) for x, w in pairs]
            there = zeros_for_none(first_gradients(evaluate(*moved), tuple(leaves)), leaves)
            return [widened(g) for g in there]

        a, b = SIGNS[self.side]
        pairs = zip(along(a), along(b), strict=True)
        slopes = [(after - before) / ((b - a) * h) for before, after in pairs]
        return known_gradient(n2, leaves, slopes, c)

    def lengths(self, target: Target, directions: Rows) -> Tensor:
        """Return h ``[G]``, such that h·‖v‖ is the length of the step."""
        length = length_of(directions)
        rows = [as_rows(widened(x.detach()), target.batched) for x in target.xs]
        size = length_of(rows) / sum(row.shape[1] for row in rows) ** 0.5
        step = self.length(size, spacing(target.y, *target.xs))
        return step / torch.where(length > 0, length, torch.ones_like(length))

    def length(self, size: Tensor, epsilon: float) -> Tensor:
        """Return the Euclidean length of the step, in the shape of ``size``.

        Args:
            size: the root mean square of the entries that are moved.
            epsilon: the machine epsilon of the dtype that the function is computed in.
        """
        if self.step is not None:
            return torch.full_like(size, self.step)
        step = epsilon ** (1 / 3) / 2 if self.side == "central" else 2 * epsilon**0.5
        return step * size.clamp(min=1)


SIGNS = {"forward": (0.0, 1.0), "backward": (-1.0, 0.0), "central": (-1.0, 1.0)}
