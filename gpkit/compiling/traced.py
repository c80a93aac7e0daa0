"""What is compiled: a function, with penalties that are given what is outside."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.taylor import in_graph
from gpkit.autodiff.tracing.calls import TRACES, PenaltyCall, Trace
from gpkit.autodiff.tracing.compat import graphs_allowed

COUNT = itertools.count()


class Gate:
    """Whether a function may be traced now. Once it is compiled, it is traced again if it changes.

    The calls of penalties in it are then looked at first, in an eager step.

    Attributes:
        open: whether it may.
        knocked: whether it was to be traced while it may not.
        graphs: how often it was traced.
        allowed: how many graphs torch.compile looks at without options of its own.
    """

    open = knocked = False
    graphs = 0

    def __init__(self) -> None:
        self.allowed = graphs_allowed()

    @property
    def needs_options(self) -> bool:
        """Whether a step needs the options of the compiler, which take a while to set."""
        return self.open or self.graphs >= self.allowed

    def asked(self) -> bool:
        """Whether the function may be traced, which is about to be done."""
        self.knocked = not self.open
        self.graphs += self.open
        return self.open

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *exception: object) -> None:
        self.open = False


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
        return gate.asked()

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
