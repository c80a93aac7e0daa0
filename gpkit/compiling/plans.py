"""Plan: one graph, and what it is given at each step."""

from __future__ import annotations

import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_leaves
from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.random import seeded
from gpkit.autodiff.taylor import in_graph
from gpkit.autodiff.tracing.calls import TRACES, Drawn, PenaltyCall, Record, Trace
from gpkit.autodiff.tracing.noise import Noise
from gpkit.formula import Terms

COUNT = itertools.count()


@dataclass(eq=False)
class Plan:
    """One graph: for a set of penalties that act together.

    Args:
        calls: of the penalties.
        run: the compiled function.
        hooks: the modules that are hooked in it.
        draws: what each call that acts draws, by the shapes of the arguments.
        slower: whether the graph was measured to be slower than the eager loss.
        gate: whether it may be traced.
        places: where it was found to hold, see `place_of`.
        assumes: whether the graph takes a condition on values for granted, see `holds`.
        runs: how many steps it has run.
        missed: in how many of them something did not hold, see `holds`.
    """

    calls: list[PenaltyCall]
    run: Callable[..., Any]
    hooks: list[nn.Module]
    gate: Gate
    places: set[Any] = field(default_factory=set)
    draws: dict[Any, list[Draws]] = field(default_factory=dict)
    slower: bool = False
    assumes: bool = False
    runs: int = 0
    missed: int = 0

    def suits(self, record: Record, shapes: Any) -> bool:
        """Whether what is known of its calls is what an eager step has found."""
        pairs = list(zip(self.calls, record.calls, strict=False))
        if len(pairs) < max(len(self.calls), len(record.calls)):
            return False
        if [*map(id, self.hooks)] != [*map(id, record.hooks)]:
            return False
        return all(alike(a, b, shapes in self.draws) for a, b in pairs)


class Gate:
    """Whether a function may be traced now. Once it is compiled, it is traced again if it changes.

    The calls of penalties in it are then looked at first, in an eager step.

    Attributes:
        open: whether it may.
        knocked: whether it was to be traced while it may not.
    """

    open = knocked = False

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *exception: object) -> None:
        self.open = False


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


def order_of(penalty: Any) -> int:
    """Return the order of a penalty; 2 or more if it needs norm layers written out."""
    written_out = getattr(penalty, "elementary", False)
    return max(getattr(penalty, "order", 1), 2 if written_out else 1)


def traced(
    function: Callable[..., Any], calls: list[PenaltyCall], gate: Gate
) -> Callable[..., Any]:
    """Return what is compiled: the function, with penalties that are given what is outside.

    Norm layers are written out inside of it: a mode outside would be called for each operation that
    the graph runs. Its code has a name of its own, because torch counts graphs, and notices shapes
    that change, by the code and its name.
    """
    order = max([order_of(call.penalty) for call in calls if call.acts], default=0)

    @torch.compiler.assume_constant_result
    def may_be_traced() -> bool:
        gate.knocked = not gate.open
        return gate.open

    def loss(
        weights: Tensor, numbers: list[list[Tensor]], anchor: Tensor, args: Any, kwargs: Any
    ) -> tuple[Any, list[Any], list[Any], Tensor | None]:
        if not may_be_traced():
            raise RuntimeError("the function is not as it was when it was compiled")
        trace = Trace(calls, weights, numbers, anchor)
        TRACES.append(trace)
        try:
            with elementary() if order >= 2 else nullcontext():
                result = function(*args, **kwargs)
        finally:
            TRACES.pop()
        held = torch.stack(trace.held).all() if trace.held else None
        return result, trace.observed, trace.learned, held

    in_graph.allow()
    code = loss.__code__.replace(co_name=f"loss_{next(COUNT)}")
    return types.FunctionType(code, loss.__globals__, code.co_name, None, loss.__closure__)


def weights_of(penalties: Iterable[Any]) -> list[float]:
    """Return λ of each call of the next step, of the penalties in the order of the calls."""
    calls: Counter[int] = Counter()
    weights = []
    for penalty in penalties:
        weights.append(penalty.weight_at(penalty.step + calls[id(penalty)]))
        calls[id(penalty)] += 1
    return weights


@dataclass(frozen=True)
class Draws:
    """What a call of a penalty draws at random.

    Args:
        numbers: of its points and estimator.
        noise: of the dropout in each of its own forward passes, which start from the same seed.
        device: of these passes.
    """

    numbers: Sequence[Drawn]
    noise: Sequence[Sequence[Noise]]
    device: torch.device

    def __bool__(self) -> bool:
        return bool(self.numbers) or any(self.noise)

    def anew(self, seed: int) -> list[Tensor]:
        """Return the random numbers for a seed."""
        found: list[Tensor] = []
        if self.numbers:
            rng = torch.Generator(self.numbers[0].device).manual_seed(seed)
            found += [own.anew(rng) for own in self.numbers]
        for own in filter(None, self.noise):
            with torch.no_grad(), seeded(seed, self.device):
                found += [noise.anew(self.device) for noise in own]
        return found


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
