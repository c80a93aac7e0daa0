"""The shortcut of `with_loss` with exact norms: a look at the loss's graph, and the arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit import formula
from gpkit.autodiff import graph
from gpkit.autodiff.compat import hooks_made
from gpkit.autodiff.layers.norms import is_proven
from gpkit.autodiff.layers.recording import Recording
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import code_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.average import running_average
from gpkit.estimators.base import Recomputable, Target
from gpkit.formula import Terms
from gpkit.shortcut.losses import LossGraph, is_loss
from gpkit.shortcut.net import Choices
from gpkit.shortcut.products.summed import note_joins, with_summed_products

MANY = 64


class ExactSteps:
    """How earlier steps went, of losses with an exact penalty in the weights."""

    def __init__(self) -> None:
        self.found: dict[Any, ExactStep] = {}
        self.latest: ExactStep | None = None  # that was noted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactSteps)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return ExactSteps, ()

    def of(self, penalty: Any, closure: Any, net: Any, step: int | None) -> ExactStep | None:
        """Return how an earlier step with the same code and net went, if this one may repeat it.

        Args:
            penalty: the penalty.
            closure: returns the loss.
            net: the module.
            step: the optimiser step; None counts the calls.
        """
        known = self.found.get((id(code_of(closure)), id(net))) if self.found else None
        return known if known is not None and known.repeats(penalty, net, step) else None

    def note(self, axes: Any, f: Recomputable, targets: Sequence[Target]) -> None:
        """Remember the step that made these targets, of a penalty that was found to train.

        Args:
            axes: the penalty.
            f: the loss, with the closure that returned it.
            targets: what the penalty differentiated.
        """
        if f.layers is None or f.selected or has_ranks() or not is_loss(axes, f.value, targets):
            return
        net, (target,) = f.layers.net, targets
        if axes.scope == "sample" and not (target.layers and is_proven(net)):
            return
        key = id(code_of(f.function)), id(net)
        if key in self.found and self.found[key].missed:
            return
        if len(self.found) >= MANY:
            self.found.clear()
        alive = weakref.ref(net, lambda _: self.found.pop(key, None))
        made = ExactStep.after(axes, graph_of(f.value, f.trained), target, f.layers, alive)
        if made is not None:
            self.found[key] = self.latest = made

    def as_repeated(
        self, penalty: Any, loss: Tensor, trained: Tensor | None, weight: float
    ) -> Tensor | None:
        """Return the total of the step that was noted last as a later one will compute it.

        So a run that goes on from a checkpoint, which begins with a step that repeats none, has the
        bits of the one that was never stopped.

        Args:
            penalty: the penalty.
            loss: that the closure has returned.
            trained: the mean that is trained on, if it is another one than that of the losses.
            weight: λ.

        Returns:
            The total; None where there is no such step, or it would be the same.
        """
        latest, self.latest = self.latest, None
        if latest is None or latest.missed or not (latest.made.chain or latest.made.wide):
            return None
        terms = lambda n2: formula.terms(penalty, n2, weight)  # noqa: E731
        found = latest.computed(penalty, loss, trained, terms)
        return None if found is None else found[0]

    def missed(self, closure: Any, net: Any) -> None:
        """Give up on a net whose loss was made in another way than the one before."""
        self.found[id(code_of(closure)), id(net)].missed = True


class ExactStep:
    """How an earlier step went, for steps that repeat it.

    Args:
        axes: the penalty.
        net: a reference to the module.
        made: how the graph of the loss was made.
    """

    missed = False  # whether a later loss had another graph
    hooks = 0  # how many were registered when it was last asked whether it `holds`

    def __init__(self, axes: Any, net: Callable[[], nn.Module | None], made: LossGraph) -> None:
        self.choices, self.net, self.made = Choices(axes), net, made
        xs: Any = made.xs
        self.state, self.device = made.state_of(net()), xs[0]().device.type

    @classmethod
    def after(
        cls,
        axes: Any,
        loss: Tensor,
        target: Target,
        layers: Recording | None,
        net: Callable[[], nn.Module | None],
    ) -> ExactStep | None:
        """Return how a step went; None if what the layers were given is not in the graph.

        Args:
            axes: the penalty.
            loss: with the graph of all that the closure has returned.
            target: what the penalty has differentiated.
            layers: the calls of the net's layers, if each sample has a norm.
            net: a reference to the module.
        """
        sample = axes.scope == "sample"
        made = LossGraph.after(loss, target, layers if sample else None, net() if sample else None)
        if made is None:
            return None
        if is_pure(axes):
            made.find_chain(loss)
        else:  # the first step is not computed twice, and has to have the bits of later ones
            made.wide = []
        return cls(axes, net, made)

    def repeats(self, penalty: Any, net: Any, step: int | None) -> bool:
        """Whether the penalty acts, and all that is known before the loss is as it was."""
        acts: bool = self.holds(penalty, net) and penalty.acts_at(step)
        return acts

    def holds(self, penalty: Any, net: Any) -> bool:
        """Whether all that is known before the loss is as it was."""
        if self.missed or RECORDS or TRACES or is_compiling() or not torch.is_grad_enabled():
            return False
        if self.net() is not net or self.made.state_of(net) != self.state or has_ranks():
            return False
        self.hooks = hooks_made()
        return not torch.is_autocast_enabled(self.device) and self.choices.hold(penalty)

    def has_hooks(self) -> bool:
        """Whether a loss since has registered any, maybe on a hidden value that a chain skips."""
        return self.made.chain is not None and hooks_made() > self.hooks

    def taken(
        self, penalty: Any, loss: Any, trained: Tensor | None, step: int | None
    ) -> tuple[Tensor, Tensor, Callable[[], Any]] | None:
        """Return the step, see `with_loss`; None if the loss has another graph.

        Args:
            penalty: the penalty.
            loss: that the closure has returned.
            trained: the mean that is trained on, if it is another one than that of the losses.
            step: the optimiser step; None counts the calls.
        """

        def terms(n2: Tensor) -> Terms:
            weight = penalty.counted(step)
            penalty.draws += 1  # an exact norm draws nothing
            found: Terms = penalty.observed(formula.terms(penalty, n2, weight, observe=True))
            return found

        found = None if self.has_hooks() else self.computed(penalty, loss, trained, terms)
        if found is None:
            return None
        total, mean, known = found
        return total, mean.detach(), lambda: known

    def computed(
        self,
        penalty: Any,
        loss: Any,
        trained: Tensor | None,
        terms_for: Callable[[Tensor], Terms],
        added: Callable[[Terms], Callable[[Tensor], Tensor]] = attrgetter("added_to"),
    ) -> tuple[Tensor, Tensor, Terms] | None:
        """Return the total, the mean loss and the terms; None if the loss has another graph.

        Args:
            penalty: the penalty.
            loss: a number, or losses ``[B]``.
            trained: the mean that is trained on, if it is another one than that of the losses.
            terms_for: returns the terms for n² ``[G]``.
            added: returns what makes the total from the mean loss, for the terms.
        """
        if type(loss) is not Tensor or (loss.ndim > 1 and loss.numel() != loss.shape[0]):
            return None
        if self.made.sample and not loss.ndim:
            return None
        whole = graph_of(loss, trained)
        nodes, make = graph.walked(whole)
        if make != self.made.make:
            return None
        leaves, mean = graph.leaves(whole, nodes), trained
        if mean is None:
            mean = loss.mean() if loss.ndim else loss
        if not self.made.holds(nodes, leaves):
            return None
        passed = self.made.begin(loss, mean, nodes)
        if passed is None and self.made.chain is not None:  # such as a hook on a hidden value
            return None
        if passed is None:
            long = self.by_autograd(loss, mean, nodes, leaves, terms_for, added)
            return None if long is None else (long[0], mean, long[1])
        terms = terms_for(passed.squared_norms(self.made.variables, sample=self.made.sample))

        def again() -> Tensor:
            terms_again = partial(formula.terms, penalty, weight=terms.weight)
            found = self.by_autograd(loss, mean, nodes, leaves, terms_again, added)
            assert found is not None, "it was so in an earlier step"
            return found[0]

        total = passed.total(mean, added(terms), again, leaves)
        return again() if total is None else total, mean, terms

    def by_autograd(
        self,
        loss: Tensor,
        mean: Tensor,
        nodes: list[Any],
        leaves: list[Tensor],
        terms_for: Callable[[Tensor], Terms],
        added: Callable[[Terms], Callable[[Tensor], Tensor]],
    ) -> tuple[Tensor, Terms] | None:
        """Return the same, of a graph that is differentiated twice.

        Args:
            loss: a number, or losses ``[B]``.
            mean: of the losses.
            nodes: of the graph.
            leaves: of the graph.
            terms_for: returns the terms for n² ``[G]``.
            added: returns what makes the total from the mean loss, for the terms.
        """
        calls = self.made.calls_at(nodes)
        if calls is None:
            return None
        note_joins(calls, self.made.wide)
        calls = self.made.that_pay(calls)
        n2 = self.made.squared_norms(calls, loss, mean, self.net())
        if n2 is None:
            return None
        terms = terms_for(n2)
        return with_summed_products(added(terms)(mean), calls, leaves, (mean, n2)), terms


def graph_of(loss: Tensor, trained: Tensor | None) -> Tensor:
    """Return a tensor with the graph of the losses, and of the mean that is trained on."""
    return loss if trained is None else torch.cat((loss.reshape(-1), trained.reshape(1)))


def is_pure(axes: Any) -> bool:
    """Whether the penalty is a function of the norms, without a state that they change."""
    form: Any = axes.form
    return not axes.adapts and not isinstance(getattr(form, "center", None), running_average)
