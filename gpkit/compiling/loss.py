"""CompiledLoss: a loss with penalties inside, run as one compiled graph."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.isolation import double_backward, running
from gpkit.autodiff.random import device_of, seeded
from gpkit.autodiff.reached import Reach, reach
from gpkit.autodiff.state import Start, own_state, own_streams, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES, Drawn, Record, Repeat
from gpkit.autodiff.tracing.compat import (
    hooked_by,
    keeping_buffers,
    tracing_gradients,
)
from gpkit.autodiff.tracing.hooks import dispatch
from gpkit.compiling import obstacles, parity
from gpkit.compiling.plans import Plan, numbers_of, shapes_of, terms_of, traced
from gpkit.formula import Terms

log = logging.getLogger(__name__)
CHECKED = 2  # how many shapes of the arguments are compared with the eager loss


class CompiledLoss:
    """What `compile` returns: it has the arguments of the function, and returns the same.

    Args:
        function: the loss.
        measure: whether to time both, and keep the faster.
        options: of ``torch.compile``.

    Attributes:
        obstacle: why the loss is not compiled; None if it is, or was not called yet.
        terms: of each call of a penalty in the latest step, without graphs; None for one that did
            not act.
    """

    def __init__(
        self, function: Callable[..., Any], measure: bool, options: dict[str, Any]
    ) -> None:
        self.function, self.measure, self.options = function, measure, options
        self.obstacle: str | None = None
        self.terms: list[Terms | None] = []
        self._plans: dict[tuple[bool, ...], Plan] = {}
        self._penalties: list[Any] | None = None
        self._anchor = torch.zeros((), requires_grad=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, and count a step of each penalty inside."""
        if RECORDS or TRACES:
            return self.function(*args, **kwargs)
        if self.obstacle is not None or not torch.is_grad_enabled():
            return self._recorded(args, kwargs)[0]
        if self._penalties is None:
            return self._eager(args, kwargs)
        weights = self._weights()
        plan = self._plans.get(tuple(w != 0 for w in weights))
        if plan is None:
            return self._eager(args, kwargs)
        if plan.slower:
            return self._recorded(args, kwargs)[0]
        shapes = shapes_of((args, kwargs))
        drawn = plan.drawn.get(shapes)
        if drawn is None:
            known = next(iter(plan.drawn.values()))
            if any(known) or len(plan.drawn) < CHECKED:
                return self._eager(args, kwargs)
            drawn = known  # nothing is drawn
        return self._step(plan, weights, drawn, args, kwargs)

    def _weights(self) -> list[float]:
        """Return λ of each call of the next step."""
        calls: Counter[int] = Counter()
        weights = []
        for penalty in self._penalties or ():
            weights.append(penalty.weight_at(penalty.step + calls[id(penalty)]))
            calls[id(penalty)] += 1
        return weights

    def _step(
        self,
        plan: Plan,
        weights: list[float],
        drawn: Sequence[Sequence[Drawn]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the graph, with the counters and the random numbers of the penalties outside."""
        acting = [call.penalty for call in plan.calls if call.acts]
        before = [(penalty, penalty.draws) for penalty in acting]
        numbers = [numbers_of(p.next_seed(), own) for p, own in zip(acting, drawn, strict=True)]
        try:
            result, observed = self._run(plan, weights, numbers, args, kwargs)
        except Exception as error:  # of the compiler, or of the function: then it is raised again
            for penalty, draws in reversed(before):
                penalty.draws = draws
            self._stop(obstacles.of_error(error))
            return self._recorded(args, kwargs)[0]
        found = iter(observed)
        self.terms = [
            call.penalty.act_with(lambda weight: terms_of(next(found), weight))
            for call in plan.calls
        ]
        return result

    def _run(
        self,
        plan: Plan,
        weights: Sequence[float],
        numbers: list[list[Tensor]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, list[Any]]:
        acting = torch.tensor([w for w in weights if w], dtype=torch.float64)
        kernels = double_backward(plan.order, recurrent=False)
        several = any(call.penalty.measures for call in plan.calls)
        keeping = keeping_buffers() if several else nullcontext()
        with tracing_gradients(), keeping, kernels, hooked_by(dispatch, plan.hooks):
            return plan.run(acting, numbers, self._anchor, args, kwargs)

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Record]:
        """Run the function itself, and record the penalties in it."""
        with Record() as record:
            result = self.function(*args, **kwargs)
        self.terms = [call.terms for call in record.calls]
        return result, record

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the function itself, see what the penalties do in it, and compile it."""
        found = reach(partial(self.function, *args, **kwargs) if args or kwargs else self.function)
        device = device_of(args, tuple(kwargs.values()), *found.family)
        start = start_of(found, device)
        result, record = self._recorded(args, kwargs)
        calls, total = record.calls, parity.total_of(result)
        self._penalties = [call.penalty for call in calls]
        obstacle = record.obstacle or obstacles.of_modules(found.family)
        for penalty in [call.penalty for call in calls if call.acts]:
            said = obstacles.of_penalty(penalty)
            obstacle = obstacle or (said and f"{penalty.name!r} {said}")
        if total is None:
            obstacle = obstacle or "what it returns has no graph"
        elif any(call.acts for call in calls):
            obstacle = obstacle or obstacles.of_graph(total, calls)
        if obstacle:
            self._stop(obstacle)
            return result
        again = partial(repeated, found, start, device)
        self._compile(record, result, again, args, kwargs)
        return result

    def _compile(
        self,
        record: Record,
        result: Any,
        again: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        calls = record.calls
        acting = tuple(call.acts for call in calls)
        plan = self._plans.get(acting)
        new = plan is None
        if plan is None:
            orders = [getattr(call.penalty, "order", 1) for call in calls if call.acts]
            run = torch.compile(traced(self.function, calls), fullgraph=True, **self.options)
            plan = Plan(calls, run, max(orders, default=0), record.hooks)
        shapes = shapes_of((args, kwargs))
        if new or len(plan.drawn) < CHECKED:
            weights, numbers = [c.weight for c in calls], [c.numbers for c in calls if c.acts]

            def compiled() -> Any:
                with again():
                    return self._run(plan, weights, numbers, args, kwargs)[0]

            def eager() -> Any:
                with again(), Repeat(calls):
                    return self.function(*args, **kwargs)

            expected = parity.outcome(lambda: result, None, retain=True)
            try:
                with warnings.catch_warnings(action="ignore"):  # of the compiler's own
                    first = parity.outcome(compiled, None)
            except Exception as error:  # of the compiler: the function has just run
                self._stop(obstacles.of_error(error))
                return
            log.info("gpkit.compile: %s took %.1f s to compile", self, first.seconds)
            if not self._equal(expected, first):
                return
            if self.measure and new:
                leaves = [x for x in first.grads if x is not self._anchor]
                with warnings.catch_warnings(action="ignore"):  # a hook of the net may compile anew
                    times = parity.faster(eager, compiled, leaves)
                plan.slower = times[1] > times[0]
                word = "eager, which is faster" if plan.slower else "compiled"
                ms = [1e3 * t for t in times]
                log.info(
                    "gpkit.compile: %s runs %s: %.3g ms eager, %.3g ms compiled", self, word, *ms
                )
        self._plans[acting] = plan
        plan.drawn[shapes] = [call.drawn for call in calls if call.acts]

    def _equal(self, expected: parity.Outcome, found: parity.Outcome) -> bool:
        """Whether the compiled loss gives what the eager one gave; if not, it is not used."""
        value, gradient = parity.difference(expected, found)
        if max(value, gradient) <= (allowed := parity.tolerance(expected)):
            return True
        self._stop(
            f"the compiled loss differs: its value by {value:.1e} and its gradient by "
            f"{gradient:.1e}, relative to the eager one, with {allowed:.0e} allowed"
        )
        return False

    def _stop(self, obstacle: str) -> None:
        self.obstacle, self._plans = obstacle, {}
        warnings.warn(f"gpkit.compile: {self} is not compiled: {obstacle}", stacklevel=2)

    def __str__(self) -> str:
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))

    def __repr__(self) -> str:
        return f"gpkit.compile({self.function!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the graphs; a copy compiles its own."""
        return {**self.__dict__, "_plans": {}, "_penalties": None}


@contextmanager
def repeated(found: Reach, start: Start, device: torch.device) -> Iterator[None]:
    """A context in which a function starts as before, and leaves no trace.

    Args:
        found: what it reaches.
        start: what it started from.
        device: of its random numbers.

    Yields:
        Nothing.
    """
    torchs, others = seeded(start.torch, device), own_streams(found, start)
    with running(torchs), others, own_state(found, start, meets=False):
        yield
