"""The shortcut of `with_loss` with exact norms: a look at the loss's graph, and the arithmetic."""

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
from gpkit.autodiff.layers.batch import gram_pays, norm_of, wide_calls
from gpkit.autodiff.layers.norms import sample_norms
from gpkit.autodiff.layers.places import Place, call_at, place_of
from gpkit.autodiff.layers.recording import Recording
from gpkit.autodiff.layers.rules import BATCH_NORMS
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import code_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.parameters import weights
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.exact import exact
from gpkit.shortcut.net import Choices

MANY = 64


class ExactSteps:
    """How earlier steps went, of losses with an exact penalty in the weights."""

    def __init__(self) -> None:
        self.found: dict[Any, ExactStep] = {}

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
        if f.layers is None or not has_shortcut(axes, f, targets):
            return
        net, (target,) = f.layers.net, targets
        key = id(code_of(f.function)), id(net)
        if key in self.found and self.found[key].missed:
            return
        if len(self.found) >= MANY:
            self.found.clear()
        alive = weakref.ref(net, lambda _: self.found.pop(key, None))
        made = ExactStep.after(axes, f.value, target, f.layers, alive)
        if made is not None:
            self.found[key] = made

    def missed(self, closure: Any, net: Any) -> None:
        """Give up on a net whose loss was made in another way than the one before."""
        self.found[id(code_of(closure)), id(net)].missed = True


def has_shortcut(axes: Any, f: Recomputable, targets: Sequence[Target]) -> bool:
    """Whether a step is the plain case: l2 norms of gradients in a module, one graph."""
    return (
        type(axes.estimator) is exact
        and type(axes.wrt) is weights
        and axes.of in ("output", "loss")
        and axes.order == 1
        and axes.scope in ("batch", "sample")
        and axes.form.norm == "l2"
        and not (axes.named or axes.metric or axes.given or axes.subsample or axes.elementary)
        and len(targets) == 1
        and targets[0].rows is targets[0].window is targets[0].weights is None
        and type(f.value) is Tensor
        and f.value.numel() == (len(f.value) if f.value.ndim else 1)
        and (axes.scope == "batch" or targets[0].layers is not None)
        and not (f.selected or has_ranks() or torch.is_autocast_enabled(f.value.device.type))
    )


class ExactStep:
    """How an earlier step went, for steps that repeat it.

    Args:
        axes: the penalty.
        net: a reference to the module.
        make: of the graph of the loss, see `graph.walked`.
        leaves: of that graph.
        xs: the variables.
        places: of the calls of layers whose norms need no gradient in the weights.
    """

    missed = False  # whether a later loss had another graph

    def __init__(
        self,
        axes: Any,
        net: Callable[[], nn.Module | None],
        make: list[Any],
        leaves: Sequence[Tensor],
        xs: Sequence[Tensor],
        places: Sequence[Place],
    ) -> None:
        self.choices, self.net, self.make = Choices(axes), net, make
        self.leaves, self.xs = [*map(weakref.ref, leaves)], [*map(weakref.ref, xs)]
        self.places, self.sample = places, axes.scope == "sample"
        self.with_mode = [p.layer for p in places if isinstance(p.layer(), BATCH_NORMS)]
        self.modes, self.device = self.modes_now(), xs[0].device.type

    @classmethod
    def after(
        cls,
        axes: Any,
        loss: Tensor,
        target: Target,
        layers: Recording,
        net: Callable[[], nn.Module | None],
    ) -> ExactStep | None:
        """Return how a step went; None if what the layers were given is not in the graph.

        Args:
            axes: the penalty.
            loss: that the closure has returned, with its graph.
            target: what the penalty has differentiated.
            layers: the calls of the net's layers.
            net: a reference to the module.
        """
        nodes, make = graph.walked(loss)
        leaves = graph.leaves(loss, nodes)
        if not all(isinstance(leaf, nn.Parameter) for leaf in leaves):  # inputs are new each time
            return None
        calls = [] if target.layers is None else layers.calls
        if axes.scope == "batch":
            calls = [calls[i] for i in wide_calls(loss, target.xs, layers)] if calls else []
        at = {node: i for i, node in enumerate(nodes)}
        places = [place for call in calls if (place := place_of(call, nodes, at)) is not None]
        if len(places) < len(calls):
            return None
        return cls(axes, net, make, leaves, target.xs, places)

    def modes_now(self) -> list[bool]:
        """Return whether the net, and each layer whose rule asks for it, is in training mode."""
        modules: list[Any] = [self.net(), *(ref() for ref in self.with_mode)]
        return [module is not None and module.training for module in modules]

    def repeats(self, penalty: Any, net: Any, step: int | None) -> bool:
        """Whether the penalty acts, and all that is known before the loss is as it was."""
        if (
            self.missed
            or RECORDS
            or TRACES
            or is_compiling()
            or not torch.is_grad_enabled()
            or has_ranks()
        ):
            return False
        if self.net() is not net or self.modes_now() != self.modes:
            return False
        if torch.is_autocast_enabled(self.device):
            return False
        if not self.choices.hold(penalty):
            return False
        acts: bool = penalty.acts_at(step)
        return acts

    def total(self, penalty: Any, loss: Any, step: int | None) -> Tensor | None:
        """Return the loss and the penalty as one scalar; None if the loss has another graph.

        Args:
            penalty: the penalty.
            loss: that the closure has returned.
            step: the optimiser step; None counts the calls.
        """
        if type(loss) is not Tensor or (loss.ndim > 1 and loss.numel() != loss.shape[0]):
            return None
        if self.sample and not loss.ndim:
            return None
        nodes, make = graph.walked(loss)
        if make != self.make:
            return None
        leaves, known = graph.leaves(loss, nodes), [ref() for ref in self.leaves]
        xs: list[Any] = [ref() for ref in self.xs]
        net: Any = self.net()
        if not all(map(operator.is_, leaves, known)) or any(x is None for x in xs):
            return None
        calls: list[Any] = [call_at(place, nodes) for place in self.places]
        if not all(calls):
            return None
        recording = Recording(net, calls)
        mean = loss.mean() if loss.ndim else loss
        if self.sample:
            n2 = sample_norms(loss.reshape(-1), xs, recording)
            if any(c.delta is None or c.delta.shape[0] != loss.shape[0] for c in calls):
                return None
        else:
            recording.calls = [*filter(gram_pays, calls)]
            n2 = norm_of(mean, xs, recording)
        if not n2.requires_grad:
            return None
        weight = penalty.counted(step)
        penalty.draws += 1  # an exact norm draws nothing
        terms = penalty.observed(formula.terms(penalty, n2, weight, observe=True))
        return terms.added_to(mean)
