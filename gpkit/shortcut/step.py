"""A step of `with_loss` by finite differences that repeats an earlier one."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, buffers_of, lerp
from gpkit.autodiff.derivatives import unhooked
from gpkit.autodiff.gates import Gates, kinks, recorded
from gpkit.autodiff.isolation import RUNNING, isolated, run_again
from gpkit.autodiff.known_gradient import Number, OwnedGradient, are_apart, fitted, known_gradient
from gpkit.autodiff.numerics import pairwise_sums
from gpkit.autodiff.random import has_ranks, random_state
from gpkit.autodiff.reached import LOOK_AGAIN, SEEN_ONCE, Reach
from gpkit.autodiff.state import Start, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.estimators.differences.moves import Owners, go, ways
from gpkit.estimators.differences.step_factor import FINE, length_for, look
from gpkit.estimators.differences.weight_difference import (
    in_few_passes,
    length_of,
    size_of,
    stride_of,
)
from gpkit.estimators.repeats import SAME
from gpkit.hints import ExplainedError
from gpkit.shortcut.compat import applied, gradients
from gpkit.shortcut.net import Choices, State, references
from gpkit.shortcut.products.mixed import LARGE, dense, mixed

KNOWN = {SAME, *SEEN_ONCE}  # facts


class Begun(NamedTuple):
    """What the forward pass of a step started from.

    Args:
        found: what the closure and the module reach.
        state: of buffers and random numbers.
        owned: the parameters.
        at: the optimiser step.
        weight: λ there.
        device: of the parameters.
    """

    found: Reach
    state: Start
    owned: list[Tensor]
    at: int
    weight: float
    device: torch.device


class Step:
    """How an earlier step went, for steps that repeat it.

    Args:
        axes: the penalty.
        refers: what the closure refers to.
        net: references to the module, or to each of the parameters that were given.
        found: what both reach.
        loss: with its graph.
    """

    def __init__(
        self, axes: Any, refers: list[int], net: list[Any], found: Reach, loss: Tensor
    ) -> None:
        owned, fd, given = found.parameters(), axes.estimator, [part() for part in net]
        named: Any = given[0] if isinstance(given[0], nn.Module) else given
        known = {*map(id, owned)}
        self.bare = [r for r in net if isinstance(r(), Tensor) and id(r()) not in known]
        owned += [r() for r in self.bare]
        self.fd = fd
        places = {id(p): i for i, p in enumerate(owned)}
        self.refers, self.net, self.known, self.choices = refers, net, found.known, Choices(axes)
        self.family = [*map(ref, found.family)]
        self.state = State(found.family)
        self.plain = not (found.known.own or any(map(buffers_of, found.family)))
        self.variables = [places[id(p)] for p in axes.wrt.chosen(named)]
        nodes, self.make = graph.walked(loss)
        self.at = [i for i, node in enumerate(nodes) if hasattr(node, LEAF)]
        self.leaves = [places[id(nodes[i].variable)] for i in self.at]
        at = {place: i for i, place in enumerate(self.leaves)}
        self.order = [at.get(place) for place in self.variables]  # of variables among the leaves
        self.large = any(owned[i].numel() >= LARGE for i in self.leaves)
        self.kinked = bool(kinks(nodes)) and not fd.cross_kinks
        self.dtype, self.owners = loss.dtype, Owners()
        self.top, casts = torch.finfo(loss.dtype).max, graph.spacing_of(nodes)
        self.epsilon = max(torch.finfo(loss.dtype).eps, casts)
        self.least: float = length_for(0.0, self.epsilon, fd.step, fd.side)
        self.given, self.adapts = fd.step is not None, fd.step is None and self.epsilon > FINE
        self.size: Any = math.inf  # of the weights, when they were looked at last
        self.looks, self.ones = 0, torch.ones(0)

    def begin(self, penalty: Any, closure: Any, net: Any, step: int | None) -> Begun | None:
        """Return what the step starts from, if it acts and what is known before is as it was."""
        known = self.known
        if RECORDS or TRACES or is_compiling() or not torch.is_grad_enabled() or has_ranks():
            return None
        if (known.runs + 1) % LOOK_AGAIN == 0 or not known.facts >= KNOWN:
            return None
        if not all(map(operator.is_, [r() for r in self.net], parts_of(net))):
            return None
        if references((closure, net)) != self.refers:
            return None
        if not self.choices.hold(penalty):
            return None
        family: list[Any] = [ref() for ref in self.family]
        if None in family or not self.state.holds(family):
            return None
        at = penalty.step if step is None else step
        weight = penalty.weight_at(at)
        if weight == 0:
            return None
        found = Reach(family, [], known)
        owned = found.parameters()
        if self.bare:
            owned += [r() for r in self.bare]
        device = owned[self.variables[0]].device
        plain = Start(random_state(device), [], {}) if self.plain else None
        return Begun(found, plain or start_of(found, device), owned, at, weight, device)

    def taken(
        self, penalty: Any, closure: Callable[[], Any], begun: Begun, loss: Any
    ) -> tuple[Tensor, Tensor, Callable[[], Any]] | None:
        """Return the step, see `with_loss`; None if the loss has another graph.

        Args:
            penalty: the penalty.
            closure: returns the loss.
            begun: what the forward pass of ``loss`` started from.
            loss: that the closure has returned.
        """
        if type(loss) is not Tensor or loss.numel() != 1 or loss.dtype != self.dtype:
            return None
        _, _, owned, at, weight, device = begun
        nodes, make = graph.walked(loss)
        if make != self.make or torch.is_autocast_enabled(device.type):
            return None
        leaves, xs = [nodes[i].variable for i in self.at], [owned[i] for i in self.variables]
        if not all(map(operator.is_, leaves, [owned[i] for i in self.leaves])):
            return None
        same = self.variables == self.leaves
        for x in (loss, *leaves) if same else (loss, *leaves, *xs):
            if x.dtype != self.dtype or x.device != device:
                return None
        penalty.evaluated_at, penalty.step = at, at + 1
        if penalty.seed is None:
            penalty.next_seed()
        else:  # nothing is drawn from it
            penalty.draws += 1
        with unhooked(leaves):
            with recorded(loss, nodes) if self.kinked else nullcontext() as gates:
                base = self.gradients(loss, leaves)
            del nodes
            together, value = self.together(
                penalty, closure, begun, gates, (loss, base), leaves, xs
            )
        reduced, terms = value()
        plus, mean = (
            reduced * weight,
            loss.detach() if loss.ndim == 0 else loss.detach().reshape(()),
        )
        if isinstance(plus, Tensor) and plus.requires_grad:  # of what the form is made of
            known = known_gradient(mean + plus.detach(), leaves, together, owned=True)
            return known + (plus - plus.detach()), mean, terms
        return applied(OwnedGradient, mean, plus, [*together], *leaves), mean, terms

    def together(
        self,
        penalty: Any,
        closure: Callable[[], Any],
        begun: Begun,
        gates: Gates | None,
        at_loss: tuple[Tensor, list[Tensor]],
        leaves: list[Tensor],
        xs: list[Tensor],
    ) -> tuple[Sequence[Tensor], Callable[[], tuple[Number, Callable[[], Any]]]]:
        """Return the gradient of loss and penalty in all leaves, and how its value is noted.

        Args:
            penalty: the penalty.
            closure: returns the loss.
            begun: what the forward pass of the loss started from.
            gates: of the loss.
            at_loss: the loss, and its gradient in the leaves.
            leaves: all of them.
            xs: the weights that the penalty is of.
        """
        (loss, base), grads = at_loss, at_loss[1]
        if self.variables != self.leaves:
            pairs = zip(self.order, xs, strict=True)
            grads = [torch.zeros_like(x) if i is None else base[i] for i, x in pairs]

        stride = stride_of(length_of(grads), self.length_at(xs), self.top)
        share, value = formula.of_one_norm(penalty, stride.n, begun.weight, loss)
        uses, factor = self.fd.factors.recall(xs[0]) if self.adapts else (1, 1.0)
        small = not self.large and isinstance(stride.n, float)  # then a copy is cheap
        if uses and self.fd.side == "forward" and (small or are_apart(base)):
            h = stride.times(factor)
            fraction = fitted(share * stride.quotient(h), self.dtype)
            there, back = ways(xs, grads, h, self.owners)
            whole = isinstance(fraction, float) and fraction == 1  # as in SAM
            try:
                go(there)
                if whole:  # nothing of the gradient here is left
                    base.clear()
                    grads = []
                y = self.run(closure, begun, gates)
                if whole:
                    together: Sequence[Tensor] = self.gradients(y, leaves)
                elif small:
                    together = lerp(base, self.gradients(y, leaves), fraction)
                else:
                    together = mixed(y, leaves, base, fraction, self.derivatives)
            finally:
                go(back)
        else:

            def along(h: Number) -> Sequence[Tensor]:
                if isinstance(h, float) and h == 0:
                    return base
                there, back = ways(xs, grads, h, self.owners)
                try:
                    go(there)
                    return self.gradients(self.run(closure, begun, gates), leaves)
                finally:
                    go(back)

            looking = look(self.fd, self.epsilon, xs)
            difference = in_few_passes(stride, self.fd.side, looking, leaves, along)
            if difference.starts_at(base):
                together = difference.added_to(base, share, overwrite=True)
            else:  # the two ends of a difference are others than this point
                together = pairwise_sums(base, [g * share for g in difference.computed()])
        return together, value

    def run(self, closure: Callable[[], Any], begun: Begun, gates: Gates | None) -> Tensor:
        """Return the loss, computed anew from the same start, and held on gates."""
        y: Tensor
        found, state, device = begun.found, begun.state, begun.device
        if not self.plain:
            with isolated(found, state, device, twice=False):
                y = closure()
        elif device.type != "cpu":
            y = run_again(closure, found, state, device)
        else:  # the same without a call for each step
            generator = torch.default_generator
            now = generator.get_state()
            found.known.runs += 1
            RUNNING.append(True)
            try:
                generator.set_state(state.torch[0])
                y = closure()
            finally:
                RUNNING.pop()
                generator.set_state(now)
        if gates is not None:
            gates.hold(y)
        return y

    def derivatives(self, y: Tensor, ends: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Return the gradient of a loss in leaves or at edges; None where it does not reach."""
        ones = self.ones
        if ones.shape != y.shape or ones.dtype != y.dtype or ones.device != y.device:
            ones = self.ones = torch.ones_like(y)
        try:
            return gradients(y, (*ends,), ones)
        except RuntimeError as error:
            raise ExplainedError(error) from error

    def gradients(self, y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient of a loss in all leaves."""
        return dense(self.derivatives(y, leaves), leaves)

    def length_at(self, xs: Sequence[Tensor]) -> Number:
        """Return the length of the step, see `length_for`.

        It grows with the root mean square of the weights where that is above one. While it is below
        a half, it is looked at in every eighth step.
        """
        if self.given:
            return self.least
        self.looks += 1
        if isinstance(self.size, Tensor) or not self.size <= 0.5 or self.looks % 8 == 0:
            self.size = size_of(xs)
        size = self.size
        return self.least * (size.clamp(min=1) if isinstance(size, Tensor) else max(size, 1.0))


def parts_of(net: Any) -> Sequence[Any]:
    """Return what a call names: the module, or each of the tensors."""
    return net if type(net) is list or type(net) is tuple else (net,)
