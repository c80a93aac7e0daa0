"""Plan: one graph, and what it is given at each step."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.random import seeded
from gpkit.autodiff.taylor import in_graph
from gpkit.autodiff.tracing.calls import TRACES, Drawn, PenaltyCall, Trace
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
        assumes: whether the graph takes a condition on values for granted, see `holds`.
        runs: how many steps it has run.
        missed: in how many of them something did not hold, see `holds`.
    """

    calls: list[PenaltyCall]
    run: Callable[..., Any]
    hooks: list[nn.Module]
    draws: dict[Any, list[Draws]] = field(default_factory=dict)
    slower: bool = False
    assumes: bool = False
    runs: int = 0
    missed: int = 0


def traced(
    function: Callable[..., Any], calls: list[PenaltyCall], order: int
) -> Callable[..., Any]:
    """Return what is compiled: the function, with penalties that are given what is outside.

    Norm layers are written out inside of it: a mode outside would be called for each operation that
    the graph runs. Its code has a name of its own, because torch counts graphs, and notices shapes
    that change, by the code and its name.
    """

    def loss(
        weights: Tensor, numbers: list[list[Tensor]], anchor: Tensor, args: Any, kwargs: Any
    ) -> tuple[Any, list[Any], list[Any], Tensor | None]:
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
