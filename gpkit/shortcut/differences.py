"""The shortcut of `with_loss` by finite differences: two forward and backward passes, and a sum."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, buffers_of
from gpkit.autodiff.gates import Gates, kinks, recorded
from gpkit.autodiff.isolation import isolated, run_again
from gpkit.autodiff.known_gradient import Number, are_apart, fitted, known_gradient
from gpkit.autodiff.numerics import dense, pairwise_sums
from gpkit.autodiff.random import has_ranks, random_state
from gpkit.autodiff.reached import CHECKPOINTS, LOOK_AGAIN, SEEN_ONCE, Reach, code_of
from gpkit.autodiff.state import Start, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.form import norm, squared
from gpkit.axes.parameters import weights
from gpkit.estimators.differences.moves import Owners, go, ways
from gpkit.estimators.differences.step_factor import look
from gpkit.estimators.differences.weight_difference import (
    gradient_there,
    in_few_passes,
    mix_there,
    stride_of,
)
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.repeats import SAME
from gpkit.shortcut.net import Choices, State, references

KNOWN = {SAME, *SEEN_ONCE}  # facts
MANY = 64
MISSES = 3  # steps that differ from the one before, after which a net has no shortcut


class Steps:
    """How earlier steps went, of losses with a penalty in the weights by finite differences."""

    def __init__(self) -> None:
        self.found: dict[Any, Step] = {}
        self.misses: dict[Any, int] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return Steps, ()

    def of(self, penalty: Any, closure: Any, net: Any, step: int | None) -> Step | None:
        """Return how an earlier step with the same code and net went, if this one may repeat it.

        Args:
            penalty: the penalty.
            closure: returns the loss.
            net: the module.
            step: the optimiser step; None counts the calls.
        """
        known = self.found.get((id(code_of(closure)), id(net))) if self.found else None
        return known if known is not None and known.repeats(penalty, closure, net, step) else None

    def note(self, axes: Any, closure: Any, net: Any, found: Reach, loss: Tensor) -> None:
        """Remember a step of a penalty that was found to train.

        Args:
            axes: the penalty.
            closure: that returned the loss.
            net: the module.
            found: what both reach.
            loss: whose gradient was taken.
        """
        key = id(code_of(closure)), id(net)
        if self.misses.get(key, 0) >= MISSES or not has_shortcut(axes, net, found, loss):
            return
        refers = references((closure, net))
        if key in self.found and self.found[key].refers != refers:
            self.missed(closure, net)
        if refers is not None:
            if len(self.found) >= MANY:
                self.found.clear()
            alive = weakref.ref(net, lambda _: self.found.pop(key, None))
            self.found[key] = Step(axes, refers, alive, found, loss)

    def missed(self, closure: Any, net: Any) -> None:
        """Forget a step whose loss was made in another way than the one before."""
        key = id(code_of(closure)), id(net)
        del self.found[key]
        if len(self.misses) >= MANY:
            self.misses.clear()
        self.misses[key] = self.misses.get(key, 0) + 1


def has_shortcut(axes: Any, net: Any, found: Reach, loss: Tensor) -> bool:
    """Whether a step is the plain case: one loss, and the l2 norm of its gradient in a module."""
    return (
        isinstance(net, nn.Module)
        and type(axes.estimator) is finite_difference
        and not axes.estimator.check_every
        and type(axes.wrt) is weights
        and axes.wrt.match == "*"
        and axes.of in ("output", "loss")
        and (axes.order, axes.scope, axes.forward) == (1, "batch", "isolated")
        and axes.form.norm == "l2"
        and not (axes.named or axes.metric or axes.given or axes.subsample or axes.elementary)
        and loss.numel() == 1
        and {*map(id, graph.leaves(loss))} <= {*map(id, found.parameters())}
        and found.known.facts >= KNOWN
        and CHECKPOINTS not in found.known.facts
        and not found.streams
        and not any(isinstance(module, torch.jit.ScriptModule) for module in found.family)
        and not has_ranks()
    )


class Step:
    """How an earlier step went, for steps that repeat it.

    Args:
        axes: the penalty.
        refers: what the closure refers to.
        net: a reference to the module.
        found: what both reach.
        loss: with its graph.
    """

    def __init__(self, axes: Any, refers: list[int], net: Any, found: Reach, loss: Tensor) -> None:
        owned = found.parameters()
        places = {id(p): i for i, p in enumerate(owned)}
        self.refers, self.net, self.known, self.choices = refers, net, found.known, Choices(axes)
        self.family = [*map(weakref.ref, found.family)]
        self.state = State(found.family)
        self.plain = not (found.known.own or any(map(buffers_of, found.family)))
        self.variables = [places[id(p)] for p in axes.wrt.chosen(net())]
        nodes = [*graph.nodes(loss)]
        self.kinds = [*map(type, nodes)]
        self.leaves = [places[id(leaf)] for leaf in graph.leaves(loss, nodes)]
        self.at = [i for i, node in enumerate(nodes) if hasattr(node, LEAF)]
        self.owners = Owners()
        self.kinked = bool(kinks(nodes)) and not axes.estimator.cross_kinks

    def repeats(self, penalty: Any, closure: Any, net: Any, step: int | None) -> bool:
        """Whether the penalty acts, and all that is known before the loss is as it was."""
        known = self.known
        if RECORDS or TRACES or is_compiling() or not torch.is_grad_enabled() or has_ranks():
            return False
        if (known.runs + 1) % LOOK_AGAIN == 0 or not known.facts >= KNOWN:
            return False
        if self.net() is not net or references((closure, net)) != self.refers:
            return False
        if not self.choices.hold(penalty):
            return False
        family: list[Any] = [ref() for ref in self.family]
        if None in family or not self.state.holds(family):
            return False
        return penalty.acts_at(step)

    def reach(self) -> Reach:
        """Return what the closure and the module reach."""
        family: list[Any] = [ref() for ref in self.family]
        return Reach(family, [], self.known)

    def start(self, found: Reach, device: torch.device) -> Start:
        """Return what the forward pass starts from."""
        if self.plain:
            return Start(random_state(device), [], {})
        return start_of(found, device)

    def total(
        self,
        penalty: Any,
        closure: Callable[[], Any],
        found: Reach,
        state: Start,
        loss: Any,
        step: int | None,
    ) -> Tensor | None:
        """Return the loss and the penalty as one scalar; None if the loss has another graph.

        Args:
            penalty: the penalty.
            closure: returns the loss.
            found: what it reaches.
            state: what the forward pass of ``loss`` started from.
            loss: that the closure has returned.
            step: the optimiser step; None counts the calls.
        """
        if type(loss) is not Tensor or loss.numel() != 1:
            return None
        device, dtype = loss.device, loss.dtype
        nodes, owned = [*graph.nodes(loss)], found.parameters()
        if [*map(type, nodes)] != self.kinds or torch.is_autocast_enabled(device.type):
            return None
        leaves, xs = [nodes[i].variable for i in self.at], [owned[i] for i in self.variables]
        if not all(map(operator.is_, leaves, [owned[i] for i in self.leaves])):
            return None
        alike = leaves if self.variables == self.leaves else [*leaves, *xs]
        if any(x.dtype != dtype or x.device != device for x in alike):
            return None
        weight = penalty.counted(step)
        penalty.next_seed()
        gates, base = self.gradient(loss, nodes, leaves)
        if alike is leaves:
            grads = base
        else:
            by_leaf = {id(leaf): g for leaf, g in zip(leaves, base, strict=True)}
            grads = dense([by_leaf.get(id(x)) for x in xs], xs)

        def evaluate() -> Tensor:
            if self.plain:
                return run_again(closure, found, state, device)
            with isolated(found, state, device, twice=False):
                y: Tensor = closure()
                return y

        fd, epsilon = penalty.estimator, torch.finfo(dtype).eps
        stride, looking = stride_of(fd, xs, grads, epsilon), look(fd, epsilon, xs)
        share, value = valued(penalty, stride.n, weight, loss)
        if fd.side == "forward" and not looking.asks and are_apart(base):
            for _ in looking:  # it counts the use
                pass
            h = stride.times(looking.factor)
            fraction = fitted(share * stride.quotient(h), dtype)
            there, back = ways(xs, grads, h, self.owners)
            try:
                go(there)
                together = mix_there(evaluate, leaves, gates.hold, base, fraction)
            finally:
                go(back)
        else:

            def along(h: Number) -> Sequence[Tensor]:
                if isinstance(h, float) and h == 0:
                    return base
                there, back = ways(xs, grads, h, self.owners)
                try:
                    go(there)
                    return gradient_there(evaluate, leaves, gates.hold)
                finally:
                    go(back)

            difference = in_few_passes(stride, fd.side, looking, leaves, along)
            if difference.starts_at(base):
                together = difference.added_to(base, share, overwrite=True)
            else:  # the two ends of a difference are others than this point
                together = pairwise_sums(base, [g * share for g in difference.computed()])
        plus = value() * weight
        total = loss.detach()
        if isinstance(plus, Tensor) and plus.requires_grad:  # of what the form is made of
            total, plus = total + plus.detach(), plus - plus.detach()
            return known_gradient(total, leaves, together, owned=True) + plus
        return known_gradient(total, leaves, together, plus=plus, owned=True)

    def gradient(
        self, loss: Tensor, nodes: Sequence[Any], leaves: Sequence[Tensor]
    ) -> tuple[Gates, Sequence[Tensor]]:
        """Return the gates of a loss, and its gradient in all leaves."""
        within = recorded(loss, nodes) if self.kinked else nullcontext(Gates())
        with within as gates:
            grads = torch.autograd.grad(loss, leaves)
        return gates, [g.to_dense() if g.is_sparse else g for g in grads]


def valued(
    penalty: Any, n: Number, weight: float, like: Tensor
) -> tuple[Number, Callable[[], Number]]:
    """Return λ times the derivative of a penalty in n², for one norm n, and how its value is noted.

    Args:
        penalty: the penalty.
        n: the norm.
        weight: λ.
        like: a tensor of the dtype and device of the loss.

    Returns:
        The derivative, and a function that lets the penalty see n, when it is known that the step
        succeeds, and returns the reduced value.
    """
    form = penalty.form
    if isinstance(n, float) and not callable(penalty.weight):
        if type(form) is squared:
            return weight * form.scale, lambda: form.scale * n * n
        if type(form) is norm and form.eps == 0:
            return weight * form.scale / (2 * n) if n else 0.0, lambda: form.scale * n
    n2 = torch.as_tensor(n, dtype=like.dtype).square().reshape(1).requires_grad_()
    called = form.for_call(n2)
    values = called(n2)
    reduced = formula.reduced(values, penalty.reduce)
    own = any(leaf is not n2 for leaf in graph.leaves(reduced))  # a graph of its own
    (share,) = torch.autograd.grad(reduced * weight, n2, retain_graph=True)

    def value() -> Number:
        form.observe(n2)
        penalty.observed(formula.Terms(n2, values, weight, reduced))
        return formula.reduced(called(n2.detach()), penalty.reduce) if own else reduced.detach()

    return share.sum(), value
