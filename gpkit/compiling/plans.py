"""Plan: one graph, and what it is given at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_leaves
from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.tracing.calls import PenaltyCall, Record
from gpkit.autodiff.tracing.compat import hooked_by, keeping_buffers, tracing_gradients
from gpkit.autodiff.tracing.hooks import dispatch, dispatch_before
from gpkit.compiling.draws import Draws
from gpkit.compiling.traced import Gate
from gpkit.formula import Terms

NOTHING = nullcontext()


@dataclass(eq=False)
class Plan:
    """One graph: for a set of penalties that act together.

    Args:
        calls: of the penalties.
        graph: the compiled function.
        hooks: the modules that are hooked in it.
        draws: what each call that acts draws, by the shapes of the arguments.
        slower: whether the graph was measured to be slower than the eager loss.
        gate: whether it may be traced.
        chosen: whether the kernels in it were chosen when it was traced.
        places: where it was found to hold, see `place_of`.
        assumes: whether the graph takes a condition on values for granted, see `holds`.
        runs: how many steps it has run.
        missed: in how many of them something did not hold, see `holds`.
    """

    calls: list[PenaltyCall]
    graph: Callable[..., Any]
    hooks: list[nn.Module]
    gate: Gate
    chosen: bool
    places: set[Any] = field(default_factory=set)
    draws: dict[Any, list[Draws]] = field(default_factory=dict)
    slower: bool = False
    assumes: bool = False
    runs: int = 0
    missed: int = 0
    given: tuple[list[float], Tensor] | None = None  # the weights of the latest step

    def run(
        self,
        weights: Sequence[float],
        numbers: list[list[Tensor]],
        anchor: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Any], list[Any], Tensor | None]:
        """Run the graph, on kernels that have a double backward.

        Args:
            weights: of all calls.
            numbers: those of each call that acts.
            anchor: any tensor that requires grad.
            args: of the function.
            kwargs: of the function.

        Returns:
            What the function returns, what the penalties observe and learn, and whether what the
            graph takes for granted holds; None if there is no such thing.
        """
        acting = [w for w in weights if w]
        if self.given is None or self.given[0] != acting:
            self.given = acting, torch.tensor(acting, dtype=torch.float64)
        with self._around():
            found = self.graph(self.given[1], numbers, anchor, args, kwargs)
        self.assumes = found[3] is not None
        return found

    def _around(self) -> AbstractContextManager[Any]:
        """Return a context for a step; most steps need one at most."""
        needed: list[AbstractContextManager[Any]] = []
        if self.gate.needs_options:
            needed.append(tracing_gradients())
        if any(call.penalty.measures for call in self.calls):
            needed.append(keeping_buffers())
        if self.gate.open or not self.chosen:
            needed.append(double_backward(recurrent=False))
        if self.hooks:
            needed.append(hooked_by(dispatch_before, dispatch, self.hooks))
        if len(needed) < 2:
            return needed[0] if needed else NOTHING
        return all_of(needed)

    def suits(self, record: Record, shapes: Any) -> bool:
        """Whether what is known of its calls is what an eager step has found."""
        pairs = list(zip(self.calls, record.calls, strict=False))
        if len(pairs) < max(len(self.calls), len(record.calls)):
            return False
        if [*map(id, self.hooks)] != [*map(id, record.hooks)]:
            return False
        return all(alike(a, b, shapes in self.draws) for a, b in pairs)


@contextmanager
def all_of(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    """A context with several inside."""
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        yield


def alike(a: PenaltyCall, b: PenaltyCall, known: bool) -> bool:
    """Whether a graph for one call serves for the other: whatever it cannot look up is the same.

    Args:
        a: a call.
        b: another one.
        known: whether both had arguments of the same shapes, on which what was noted may depend.

    Returns:
        Whether it does.
    """
    found = []
    for call in (a, b):
        noise = [[(own.dropout, own.p) for own in run] for run in call.noise]
        modules = [(id(module), names) for module, names in call.modules]
        counts = len(call.drawn), len(call.states), len(call.learns)
        facts = [id(x) if isinstance(x, Tensor) else known and x for x in tree_leaves(call.facts)]
        found.append((id(call.penalty), call.acts, noise, modules, counts, facts))
    return found[0] == found[1]


def place_of(family: Sequence[nn.Module], arguments: Any) -> Any:
    """Return what tells apart the steps of a loss that runs several nets, or in several modes."""
    flags = [x for x in tree_leaves(arguments) if isinstance(x, (bool, str))]
    return (*map(id, family), *[module.training for module in family], *flags)


def with_place(plans: list[Plan], plan: Plan, place: Any) -> list[Plan]:
    """Return plans with one of them, or a new one, for a place; those without a place are left."""
    for other in plans:
        other.places.discard(place)
    plan.places.add(place)
    return [*(other for other in plans if other.places and other is not plan), plan]


def weights_of(penalties: Iterable[Any]) -> list[float]:
    """Return λ of each call of the next step, of the penalties in the order of the calls."""
    calls: dict[int, int] = {}
    weights = []
    for penalty in penalties:
        before = calls.get(id(penalty), 0)
        weights.append(penalty.weight_at(penalty.step + before))
        calls[id(penalty)] = before + 1
    return weights


def terms_of(observed: tuple[Tensor, ...], weight: float) -> Terms:
    """Return the terms of a call, from what the graph returned: n², values and their reduction."""
    n2, values, reduced, *weights = observed
    return Terms(n2, values, weight, reduced, (), weights[0] if weights else None)


def shapes_of(value: Any) -> Any:
    """Return the shapes and dtypes of the tensors in arguments, and where they are in them."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes_of, value))
    if isinstance(value, dict):
        return tuple((key, shapes_of(part)) for key, part in value.items())
    if is_dataclass(value):
        return shapes_of(vars(value))
    return None
