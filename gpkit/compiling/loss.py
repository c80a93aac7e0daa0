"""CompiledLoss: a loss with penalties inside, run as one compiled graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from gpkit.autodiff.isolation import running
from gpkit.autodiff.random import device_of, has_ranks, seeded
from gpkit.autodiff.reached import Reach, reach
from gpkit.autodiff.state import Start, own_state, own_streams, put_back, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES, Record, Repeat
from gpkit.autodiff.tracing.compat import for_steps
from gpkit.compiling import obstacles, parity
from gpkit.compiling.draws import Draws, drawn_anew
from gpkit.compiling.plans import Plan, place_of, shapes_of, terms_of, weights_of, with_place
from gpkit.compiling.traced import Gate, traced
from gpkit.formula import Terms

log = logging.getLogger(__name__)
MISSES = 8  # steps with other values than a graph takes for granted, before it is given up
KNOCKS = 16  # how often a function may be traced anew because something changed
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
        self._plans: dict[tuple[bool, ...], list[Plan]] = {}  # by which penalties act
        self._knocks = 0
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
        weights = weights_of(self._penalties)
        acting = tuple(w != 0 for w in weights)
        plan = self._plan(acting, args, kwargs)
        if plan is None:
            return self._eager(args, kwargs)
        own = [call.penalty for call in plan.calls]
        if own != self._penalties:  # of the latest eager step, with other arguments
            weights = weights_of(own)
            if tuple(w != 0 for w in weights) != acting:
                return self._eager(args, kwargs)
        if plan.slower:
            return self._recorded(args, kwargs)[0]
        shapes = shapes_of((args, kwargs))
        draws = plan.draws.get(shapes)
        if draws is None:
            known = next(iter(plan.draws.values()))
            if any(known) or len(plan.draws) < CHECKED:
                return self._eager(args, kwargs)
            draws = known  # nothing is drawn
        return self._step(plan, weights, draws, args, kwargs)

    @property
    def slower(self) -> bool:
        """Whether all graphs were measured to be slower than the eager loss."""
        plans = [plan for own in self._plans.values() for plan in own]
        return bool(plans) and all(plan.slower for plan in plans)

    def _plan(self, acting: tuple[bool, ...], args: Any, kwargs: Any) -> Plan | None:
        """Return the plan for a step; None if there is none yet."""
        plans = self._plans.get(acting, [])
        if len(plans) < 2:
            return plans[0] if plans else None
        place = place_of(self._reach(args, kwargs).family, (args, kwargs))
        return next((plan for plan in reversed(plans) if place in plan.places), None)

    def _step(
        self,
        plan: Plan,
        weights: list[float],
        draws: Sequence[Draws],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the graph, with the counters and the random numbers of the penalties outside."""
        acting = [call.penalty for call in plan.calls if call.acts]
        before = [(penalty, penalty.draws) for penalty in acting]
        numbers = [drawn_anew(*pair) for pair in zip(acting, draws, strict=True)]
        states = [[read() for read in call.reads] for call in plan.calls if call.acts]
        given = [[*drew, *read] for drew, read in zip(numbers, states, strict=True)]
        start = self._start(args, kwargs) if plan.assumes else None
        try:
            result, observed, learned, held = plan.run(weights, given, self._anchor, args, kwargs)
        except BaseException as error:  # of the compiler or the function, or an interrupt
            reset(before)
            if not isinstance(error, Exception):
                raise
            if plan.gate.knocked:
                plan.gate.knocked = False
                return self._eager(args, kwargs, anew=True)
            result = self._recorded(args, kwargs)[0]  # raises what is the function's own
            self._stop(obstacles.of_error(error))
            return result
        plan.runs += 1
        if start is not None and not bool(held):
            reset(before)
            put_back(*start)
            plan.missed += 1
            if plan.missed >= MISSES and 2 * plan.missed > plan.runs:
                self._stop(obstacles.VALUES)
            return self._recorded(args, kwargs)[0]
        found = iter(observed)
        self.terms = [
            call.penalty.act_with(lambda weight: terms_of(next(found), weight))
            for call in plan.calls
        ]
        for learn, tensors in zip([f for c in plan.calls for f in c.learns], learned, strict=True):
            learn(*tensors)
        return result

    def _start(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Reach, Start, torch.device]:
        """Return what a step reaches, and what it starts from."""
        found = self._reach(args, kwargs)
        device = device_of(args, tuple(kwargs.values()), *found.family)
        return found, start_of(found, device), device

    def _reach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reach:
        return reach(partial(self.function, *args, **kwargs) if args or kwargs else self.function)

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Record]:
        """Run the function itself, and record the penalties in it."""
        with Record() as record:
            result = self.function(*args, **kwargs)
        self.terms = [call.terms for call in record.calls]
        return result, record

    def _eager(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, anew: bool = False) -> Any:
        """Run the function itself, see what the penalties do in it, and compile it.

        Args:
            args: of the function.
            kwargs: of the function.
            anew: whether it was compiled, and something is not as it was then.

        Returns:
            What the function returns.
        """
        found, start, device = self._start(args, kwargs)
        result, record = self._recorded(args, kwargs)
        calls, total = record.calls, parity.total_of(result)
        self._penalties = [call.penalty for call in calls]
        obstacle = record.obstacle or obstacles.of_modules(found.family)
        obstacle = obstacle or obstacles.of_calls(calls)
        for penalty in [call.penalty for call in calls if call.acts]:
            said = obstacles.of_penalty(penalty)
            obstacle = obstacle or (said and f"{penalty.name!r} {said}")
        if total is None:
            obstacle = obstacle or "what it returns has no graph"
        elif any(call.acts for call in calls):
            obstacle = obstacle or obstacles.of_graph(total, calls)
        self._knocks += anew
        if self._knocks > KNOCKS:
            obstacle = obstacle or obstacles.CHANGES
        if obstacle:
            self._stop(obstacle)
            return result
        again = partial(repeated, found, start, device)
        draws = [Draws(call.drawn, call.noise, device) for call in calls if call.acts]
        acting, shapes = tuple(call.acts for call in calls), shapes_of((args, kwargs))
        plans = self._plans.get(acting, [])
        plan = next((p for p in plans if p.suits(record, shapes)), None)
        plan = self._compile(plan, record, result, again, draws, args, kwargs, anew)
        if plan is not None:
            plan.draws[shapes] = draws
            self._plans[acting] = with_place(plans, plan, place_of(found.family, (args, kwargs)))
        return result

    def _compile(
        self,
        plan: Plan | None,
        record: Record,
        result: Any,
        again: Any,
        draws: list[Draws],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        anew: bool,
    ) -> Plan | None:
        """Return the plan for a step, a new one if none is given; None if it is not used."""
        calls, new = record.calls, plan is None
        if plan is None:
            options, gate = for_steps(self.options), Gate()
            graph = torch.compile(traced(self.function, calls, gate), fullgraph=True, **options)
            chosen = options.get("backend", "inductor") == "inductor"  # others may run any code
            plan = Plan(calls, graph, record.hooks, gate, chosen)
        if new or anew or len(plan.draws) < CHECKED:
            weights = [c.weight for c in calls]
            pairs = zip([c for c in calls if c.acts], draws, strict=True)
            numbers = [[*own.anew(call.seed), *call.states] for call, own in pairs]
            fits = []

            def compiled() -> Any:
                with again(), plan.gate:
                    outcome, *_, held = plan.run(weights, numbers, self._anchor, args, kwargs)
                fits.append(held is None or bool(held))
                return outcome

            def eager() -> Any:
                with again(), Repeat(calls):
                    return self.function(*args, **kwargs)

            expected = parity.outcome_of(lambda: result, None, retain=True)
            try:
                with warnings.catch_warnings(action="ignore"):  # of the compiler's own
                    first = parity.outcome_of(compiled, None)
            except Exception as error:  # of the compiler: the function has just run
                self._stop(obstacles.of_error(error))
                return None
            log.info("gpkit.compile: %s took %.1f s to compile", self, first.seconds)
            if not all(fits):  # other values in a batch of another shape
                return None
            obstacle = parity.unlike(expected, first, None if has_ranks() else eager)
            if obstacle:
                self._stop(obstacle)
                return None
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
        return plan

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


def reset(before: Sequence[tuple[Any, int]]) -> None:
    """Let penalties draw again what they drew."""
    for penalty, draws in reversed(before):
        penalty.draws = draws


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
