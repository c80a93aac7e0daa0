"""Plan: one graph, and what it is given at each step."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.tracing.calls import TRACES, Drawn, PenaltyCall, Trace
from gpkit.formula import Terms

COUNT = itertools.count()


@dataclass(eq=False)
class Plan:
    """One graph: for a set of penalties that act together.

    Args:
        calls: of the penalties.
        run: the compiled function.
        order: the greatest order of a penalty.
        hooks: the modules that are hooked in it.
        drawn: what each call that acts draws, by the shapes of the arguments.
        slower: whether the graph was measured to be slower than the eager loss.
    """

    calls: list[PenaltyCall]
    run: Callable[..., Any]
    order: int
    hooks: list[nn.Module]
    drawn: dict[Any, list[list[Drawn]]] = field(default_factory=dict)
    slower: bool = False


def traced(function: Callable[..., Any], calls: list[PenaltyCall]) -> Callable[..., Any]:
    """Return what is compiled: the function, with penalties that are given what is outside.

    Its code has a name of its own, because torch counts graphs, and notices shapes that change, by
    the code and its name.
    """

    def loss(
        weights: Tensor, numbers: list[list[Tensor]], anchor: Tensor, args: Any, kwargs: Any
    ) -> tuple[Any, list[Any]]:
        trace = Trace(calls, weights, numbers, anchor)
        TRACES.append(trace)
        try:
            result = function(*args, **kwargs)
        finally:
            TRACES.pop()
        return result, trace.observed

    code = loss.__code__.replace(co_name=f"loss_{next(COUNT)}")
    return types.FunctionType(code, loss.__globals__, code.co_name, None, loss.__closure__)


def numbers_of(seed: int, drawn: Sequence[Drawn]) -> list[Tensor]:
    """Return the random numbers of a call."""
    if not drawn:
        return []
    rng = torch.Generator(drawn[0].device).manual_seed(seed)
    return [own.anew(rng) for own in drawn]


def terms_of(observed: tuple[Tensor, ...], weight: float) -> Terms:
    """Return the terms of a call, from what the graph returned: n², values and their reduction."""
    n2, values, reduced = observed
    return Terms(n2, values, weight, reduced)


def shapes_of(value: Any) -> Any:
    """Return the shapes of the tensors in arguments, and what tells other arguments apart."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (list, tuple)):
        return tuple(map(shapes_of, value))
    if isinstance(value, dict):
        return tuple((key, shapes_of(part)) for key, part in value.items())
    if is_dataclass(value):
        return shapes_of(vars(value))
    return None
