"""The shortcut of `with_loss` by finite differences: two forward and backward passes, and a sum."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import buffers_of
from gpkit.autodiff.gates import Gates, kinks, recorded
from gpkit.autodiff.isolation import isolated, run_again
from gpkit.autodiff.known_gradient import Number, known_gradient, moved
from gpkit.autodiff.numerics import dense, pairwise_sums
from gpkit.autodiff.random import has_ranks, random_state
from gpkit.autodiff.reached import CHECKPOINTS, LOOK_AGAIN, SEEN_ONCE, Reach, code_of
from gpkit.autodiff.state import Start, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.form import norm, squared
from gpkit.axes.parameters import weights
from gpkit.estimators.differences.weight_difference import gradient_there, in_few_passes
from gpkit.estimators.finite_difference import finite_difference
from gpkit.estimators.repeats import SAME
from gpkit.shortcut.net import CHOICES, references, state_of

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
        self.refers, self.net, self.known, self.choices = refers, net, found.known, CHOICES(axes)
        self.family = [*map(weakref.ref, found.family)]
        self.state = state_of(found.family, ())
        self.plain = not (found.known.own or any(map(buffers_of, found.family)))
        self.variables = [places[id(p)] for p in axes.wrt.chosen(net())]
        nodes = [*graph.nodes(loss)]
        self.kinds = [*map(type, nodes)]
        self.leaves = [places[id(leaf)] for leaf in graph.leaves(loss, nodes)]
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
        if not all(map(operator.is_, CHOICES(penalty), self.choices)):
            return False
        family: list[Any] = [ref() for ref in self.family]
        if None in family or state_of(family, ()) != self.state:
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
        device = loss.device
        nodes, owned = [*graph.nodes(loss)], found.parameters()
        if [*map(type, nodes)] != self.kinds or torch.is_autocast_enabled(device.type):
            return None
        leaves, xs = graph.leaves(loss, nodes), [owned[i] for i in self.variables]
        if not all(map(operator.is_, leaves, [owned[i] for i in self.leaves])):
            return None
        if not all(x.dtype == loss.dtype and x.device == device for x in (*xs, *leaves)):
            return None
        weight = penalty.counted(step)
        penalty.next_seed()
        gates, base = self.gradient(loss, nodes, leaves)
        by_leaf = {id(leaf): g for leaf, g in zip(leaves, base, strict=True)}
        grads = dense([by_leaf.get(id(x)) for x in xs], xs)

        def evaluate() -> Tensor:
            if self.plain:
                return run_again(closure, found, state, device)
            with isolated(found, state, device, twice=False):
                y: Tensor = closure()
                return y

        def along(h: Number) -> Sequence[Tensor]:
            if isinstance(h, float) and h == 0:
                return base
            with moved(xs, grads, h):
                return gradient_there(evaluate, leaves, gates.hold)

        fd, epsilon = penalty.estimator, torch.finfo(loss.dtype).eps
        n, difference = in_few_passes(fd, xs, grads, leaves, epsilon, along)
        reduced, share = valued(penalty, n, weight, loss)
        if difference.starts_at(base):
            together = difference.added_to(base, share, overwrite=True)
        else:  # the two ends of a difference are others than this point
            together = pairwise_sums(base, [g * share for g in difference.computed()])
        return known_gradient(loss.detach(), leaves, together, plus=reduced * weight)

    def gradient(
        self, loss: Tensor, nodes: Sequence[Any], leaves: Sequence[Tensor]
    ) -> tuple[Gates, Sequence[Tensor]]:
        """Return the gates of a loss, and its gradient in all leaves."""
        if not self.kinked:
            return Gates(), torch.autograd.grad(loss, leaves)
        with recorded(loss, nodes) as gates:
            return gates, torch.autograd.grad(loss, leaves)


def valued(penalty: Any, n: Number, weight: float, like: Tensor) -> tuple[Number, Number]:
    """Return the reduced value of a penalty for one norm n, and λ times its derivative in n²."""
    form = penalty.form
    if isinstance(n, float) and not callable(penalty.weight):
        if type(form) is squared:
            return form.scale * n * n, weight * form.scale
        if type(form) is norm and form.eps == 0:
            return form.scale * n, weight * form.scale / (2 * n) if n else 0.0
    n2 = torch.as_tensor(n, dtype=like.dtype).square().reshape(1).requires_grad_()
    terms = penalty.observed(formula.terms(penalty, n2, weight, observe=True))
    (share,) = torch.autograd.grad(terms.penalty, n2)
    return terms.reduced.detach(), share.sum()
