"""Finite differences: the norm of a gradient without double backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.derivatives import as_rows, first_gradients
from gpkit.autodiff.gates import Gates, recorded
from gpkit.autodiff.known_gradient import known_gradient
from gpkit.autodiff.numerics import (
    Rows,
    length_of,
    nonzero_mask,
    over_rows,
    reduce_rows,
    root,
    shaped,
    widened,
    zeros_for_none,
)
from gpkit.autodiff.random import Source
from gpkit.estimators.base import Estimator, Target, require_function, require_gradient
from gpkit.estimators.differences.step_factor import SIGNS, Known, ascent, length_for, look
from gpkit.estimators.differences.weight_difference import of_weights


@dataclass(frozen=True)
class finite_difference(Estimator):
    r"""The norm of the gradient by finite differences, with first derivatives only.

    Let v be the direction of steepest ascent, a constant. In the inputs

    .. math:: n = \frac{f(x + h v) - f(x)}{h}, \quad v = \nabla f(x) / \|\nabla f(x)\|,

    and training differentiates this quotient; with the default step, n itself is ‖∇f(x)‖, which no
    rounding of f disturbs. In the weights n = ‖∇L‖ is exact, and its gradient is

    .. math:: \nabla_\theta \, n^2 = 2 H \nabla L
              \approx 2 n \, \frac{\nabla L(\theta + h v) - \nabla L(\theta)}{h}.

    "backward" uses (f(x) - f(x - hv)) / h, "central" (f(x + hv) - f(x - hv)) / 2h. The error is of
    order h, or h² for "central". All samples move at once: they must not be coupled (batch norm).
    With a metric A, v is that of A ∘ ∇f, and the step moves by h A ∘ v, as in adaptive SAM.

    Kinks: a ReLU that changes sides within h adds a spike of order 1/h, which double backprop does
    not have. So at the moved point every unit keeps its piece of the first point, read off the
    autograd graph: of ReLU and its kind, abs, clamp, ``torch.where``, maxima, sorting and max
    pooling. Kinks that the graph hides, in a compiled net or a custom Function, are not held.
    What the loss detaches, as SimSiam does with its target, is moved as well: the difference has
    the derivative through it, and double backprop has not.

    Curvature and rounding: on the first use with a net, in float32 or coarser, the differences at
    the default h and h/2 are compared. If they differ by more than 2 %, other steps are tried and
    the best is kept for this net (in distributed runs only under FSDP2); by 10 %, it warns.

    Each graph is differentiated once, so it works with compiled nets, fused attention, cuDNN's
    recurrent nets and once-differentiable Functions; a net compiled for dynamic shapes needs
    ``torch._functorch.config.donated_buffer = False``. Give the penalty a callable, not a tensor.
    In the weights it takes one forward and backward pass for the gradient and one for each other
    point; with `GradientPenalty.with_loss` two in total, including the loss. The weights are moved
    in place and restored bit for bit. With norm="l1" or "linf", v is the dual direction: the signs
    of the gradient, or the sign of its largest entry.

    Args:
        step: the length of the step, h·‖v‖. None is 2√ε, or ε^(1/3)/2 for "central",
            where ε is the machine epsilon of the coarsest dtype used (autocast included), times
            the root mean square of the entries that are moved, if that is above 1, and times the
            factor that the comparison found. (Steps of `with_loss` look at it in every eighth step
            while it is below a half.) In float32 this is 7e-4 and 2e-3. A step of ε∇L, as
            some papers write it, has h = ε‖∇L‖.
        side: "forward", "backward" or "central".
        cross_kinks: whether units may change pieces within the step, as in SAM, whose gradient is
            the one at the moved weights.
        check_every: compare the differences at h and h/2 at every k-th use with a net, with a
            given ``step`` and in float64 too; a given step is only checked, not changed. 0: once.

    Raises:
        ValueError: if ``step`` is not > 0, ``side`` is another name, or ``check_every`` < 0.

    Warns:
        UserWarning: if the differences at h and h/2 differ by more than 10 %, or the function has
            other piecewise operations when it runs again.

    Source: Finlay and Oberman (2021), arXiv:1905.11468; Karakida et al. (2023), arXiv:2210.02720.

    >>> import gpkit
    >>> x, f = torch.tensor([[3.0, 4.0]]), lambda x: (x**2).sum(1) / 2
    >>> penalty = gpkit.input_grad_norm(form="norm", estimator=finite_difference(0.5))
    >>> penalty(f, x).item()  # (|x + hv|² - |x|²) / 2h = 5 + h/2
    5.25
    """

    step: float | None = None
    side: str = "forward"
    cross_kinks: bool = field(default=False, kw_only=True)
    check_every: int = field(default=0, kw_only=True)
    factors: Known = field(default_factory=Known, init=False, repr=False, compare=False)

    reuses_graph = False
    continues = True
    first_order = True
    pools = True
    compares = True

    def __post_init__(self) -> None:
        if self.step is not None:
            checks.number("finite_difference(step=...)", self.step, 0, strict=True)
        checks.choice("finite_difference(side=...)", self.side, SIGNS)
        checks.integer("finite_difference(check_every=...)", self.check_every, 0)

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse orders above one."""
        require_gradient(self, order)

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, differentiable once, in float32 or better."""
        evaluate = require_function(self, target)
        if target.mean:
            return self.of_mean(target, evaluate, norm)
        if target.batched:
            return self.of_inputs(target, evaluate, norm)
        return of_weights(self, target, evaluate, norm)

    def of_inputs(self, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
        """Return n² ``[G]``, whose gradient is that of ((f(x + hv) - f(x)) / h)²."""
        with recorded(target.y) as gates:
            grads = first_gradients(target.y, target.xs)
        rows = [as_rows(widened(g), True) for g in zeros_for_none(grads, target.xs)]
        n2 = reduce_rows(target.split([tuple(rows)]), norm)
        if all(g is None for g in grads):
            return n2  # y does not depend on x
        n2, compared = n2.detach(), target.compared
        _, v, directions = ascent(compared, rows, norm, over_rows)
        lengths = self.lengths(target, v if self.step else directions)  # h, [G]
        (a, b), n = SIGNS[self.side], root(n2)

        def slope(factor: float) -> Tensor:
            h = lengths * factor

            def along(sign: float) -> Tensor:
                if sign == 0:
                    return widened(target.y).squeeze(1)
                moves = [(h * sign).unsqueeze(1) * v for v in directions]
                pairs = zip(target.xs, moves, strict=True)
                y = evaluate(*[x + shaped(move, x) for x, move in pairs])
                self.hold(gates, y)
                return widened(y).squeeze(1)

            change = (along(b) - along(a)) / ((b - a) * h)
            if compared is not None:
                change = change - compared.along(directions)
            return change * nonzero_mask(n2)

        def difference(factor: float) -> list[Tensor]:
            total = (n * slope(factor)).sum()
            return zeros_for_none(first_gradients(total, tuple(leaves)), leaves)

        if self.step is not None:
            return slope(1.0).square()
        leaves = [p for p in graph.leaves(target.y) if not any(p is x for x in target.xs)]
        looking = look(self, target.spacing(), leaves)
        for factor in looking:
            looking.found = difference(factor)
        change = slope(looking.factor)
        return n2 + 2 * n * (change - change.detach())  # n is known, and its gradient is not

    def of_mean(self, target: Target, evaluate: Callable[..., Tensor], norm: str) -> Tensor:
        r"""Return n² ``[G]`` of the samples if only their mean loss L is known.

        n_i is the norm of g_i = B ∂L/∂x_i. Training needs the gradient of Σ c_i n_i² for constants
        c_i = ∂P/∂n_i². One moved loss gives it, because ⟨g_i, v_i⟩ = n_i:

        .. math:: \nabla_\theta \sum_i c_i n_i^2 \approx
                  \frac{\nabla_\theta B L(x + h w) - \nabla_\theta B L(x)}{h}, \quad
                  w_i = 2 c_i n_i v_i
        """
        assert target.share is not None
        leaves = [p for p in graph.leaves(target.y) if not any(p is x for x in target.xs)]
        with recorded(target.y) as gates:
            all_grads = first_gradients(target.y, (*target.xs, *leaves))
        count = len(target.xs)
        grads = zeros_for_none(all_grads[:count], target.xs)
        base = zeros_for_none(all_grads[count:], leaves)
        rows = [as_rows(widened(g), True) for g in grads]
        n2 = reduce_rows(target.split([tuple(rows)]), norm).detach()
        c = target.share(n2 if target.scale is None else n2 / target.scale / target.scale)
        vs = ascent(target.compared, rows, norm, over_rows)[2]
        ws = [(2 * c * root(n2)).unsqueeze(1) * v for v in vs]
        longest = length_of(ws).amax()
        unit = self.lengths(target, [torch.ones_like(n2).unsqueeze(1)]).amin()
        unit = unit / torch.where(longest > 0, longest, torch.ones_like(longest))
        a, b = SIGNS[self.side]

        def difference(factor: float) -> list[Tensor]:
            h = unit * factor

            def along(sign: float) -> list[Tensor]:
                if sign == 0:
                    return [widened(g) for g in base]
                pairs = zip(target.xs, ws, strict=True)
                y = evaluate(*[x + shaped(sign * h * w, x) for x, w in pairs])
                self.hold(gates, y)
                there = first_gradients(y, tuple(leaves))
                return [widened(g) for g in zeros_for_none(there, leaves)]

            pairs = zip(along(a), along(b), strict=True)
            return [(after - before) / ((b - a) * h) for before, after in pairs]

        looking = look(self, target.spacing(), leaves)
        for factor in looking:
            looking.found = difference(factor)
        slopes = difference(looking.factor)
        return known_gradient(n2, leaves, slopes, c)

    def hold(self, gates: Gates, y: Tensor) -> None:
        """Keep a moved output on the pieces of the first point."""
        if not self.cross_kinks:
            gates.hold(y)

    def lengths(self, target: Target, directions: Rows) -> Tensor:
        """Return h ``[G]``, such that h·‖v‖ is the length of the step."""
        rows = [as_rows(widened(x.detach()), target.batched) for x in target.xs]
        size = length_of(rows) / sum(row.shape[1] for row in rows) ** 0.5
        step = length_for(size, target.spacing(), self.step, self.side)
        length = length_of(directions)
        return step / torch.where(length > 0, length, torch.ones_like(length))
