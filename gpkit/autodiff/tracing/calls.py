"""The calls of penalties in a loss: recorded in an eager step, and repeated in a compiled one.

A graph holds no counters, no seeds and no schedules. They stay outside: a compiled step is given
the weight and the random numbers of each call, and returns what the penalty observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import buffers_of


@dataclass(frozen=True)
class Drawn:
    """Random numbers that a penalty has drawn.

    Args:
        draw: `torch.randn` or `torch.rand`.
        shape: of the numbers.
        device: of the numbers.
        dtype: of the numbers.
    """

    draw: Callable[..., Tensor]
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def anew(self, rng: torch.Generator) -> Tensor:
        """Draw as many numbers again."""
        return self.draw(self.shape, generator=rng, device=self.device, dtype=self.dtype)


@dataclass(eq=False)
class PenaltyCall:
    """One call of a penalty.

    Args:
        penalty: that is called.
        weight: λ at this step; zero if the penalty does not act.
        seed: of its random numbers.
        drawn: how it drew random numbers, with the device of the generator.
        noise: of the dropout in each of its own forward passes.
        modules: those that its own forward pass reaches, with the names of their buffers.
        facts: what it found out, and a graph cannot, see `noted`.
        reads: return the states that it reads, see `outside`.
        states: what they returned.
        learns: what it does with tensors of a step, see `afterwards`.
        terms: of the call, without graphs; None if the penalty does not act.
    """

    penalty: Any
    weight: float
    seed: int = 0
    drawn: list[Drawn] = field(default_factory=list)
    noise: list[list[Any]] = field(default_factory=list)
    modules: list[tuple[nn.Module, tuple[str, ...]]] = field(default_factory=list)
    facts: list[Any] = field(default_factory=list)
    reads: list[Callable[[], Tensor]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    learns: list[Callable[..., None]] = field(default_factory=list)
    terms: Any = None

    @property
    def acts(self) -> bool:
        """Whether the penalty acts."""
        return self.weight != 0


class Record:
    """The calls of penalties in one eager step.

    Attributes:
        observes: whether averages and the like learn from the step.
        calls: of the penalties.
        hooks: the modules that were hooked.
        obstacle: why the step cannot be compiled; None if nothing is known.
    """

    observes = True

    def __init__(self) -> None:
        self.calls: list[PenaltyCall] = []
        self.hooks: list[nn.Module] = []
        self.obstacle: str | None = None

    def __enter__(self) -> Record:
        RECORDS.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        RECORDS.pop()

    def act(self, penalty: Any, evaluate: Callable[..., Any], step: int | None) -> Any:
        """Return the terms of a call, and record it."""
        weight = penalty.weight_at(penalty.step if step is None else step)
        call = PenaltyCall(penalty, weight)
        self.calls.append(call)
        if step is not None:
            self.stops(f"{penalty.name!r} is called with step=: leave it out, it counts its calls")

        def run(weight: float) -> Any:
            call.seed = penalty.next_seed()
            return evaluate(weight, call.seed)

        terms = penalty.act_with(run, step)
        call.terms = terms and terms.detached()
        return terms

    def drew(self, draw: Callable[..., Tensor], numbers: Tensor) -> None:
        """Record random numbers."""
        if self.calls:
            drawn = Drawn(draw, tuple(numbers.shape), numbers.device, numbers.dtype)
            self.calls[-1].drawn.append(drawn)

    def ran(self, family: Iterable[nn.Module]) -> None:
        """Record the modules that a penalty's own forward pass reaches."""
        if self.calls:
            known = self.calls[-1].modules
            new = [m for m in family if not any(m is k for k, _ in known)]
            known += [(m, tuple(buffers_of(m))) for m in new]

    def hooked(self, module: nn.Module) -> None:
        """Record a module that a penalty hooks, or what runs the forward pass for it."""
        if not any(module is known for known in self.hooks):
            self.hooks.append(module)

    def stops(self, obstacle: str) -> None:
        """Record why the step cannot be compiled; the first reason counts."""
        self.obstacle = self.obstacle or obstacle


class Repeat(Record):
    """The calls of an eager step once more, without counting a step or observing anything.

    Args:
        known: the calls.
    """

    observes = False

    def __init__(self, known: Sequence[PenaltyCall]) -> None:
        super().__init__()
        self.known = known

    def act(self, penalty: Any, evaluate: Callable[..., Any], step: int | None) -> Any:
        """Return the terms of a call as it was; None if it did not act."""
        known = self.known[len(self.calls)]
        self.calls.append(PenaltyCall(penalty, known.weight))
        return evaluate(known.weight, known.seed) if known.acts else None


class Given:
    """Random numbers that were drawn before: in a graph the source of a penalty's numbers.

    Args:
        numbers: in the order in which they are drawn.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self.numbers = numbers
        self.count = 0

    def next(self, shape: Sequence[int]) -> Tensor:
        """Return the next numbers.

        Raises:
            RuntimeError: if they have another shape.
        """
        found = self.numbers[self.count]
        self.count += 1
        if tuple(found.shape) != tuple(shape):
            raise RuntimeError("a penalty draws other random numbers than in the eager step")
        return found


class Trace:
    """The calls of penalties in a step that is being compiled.

    Args:
        calls: those of the eager step, in their order.
        weights: λ of each call that acts, in float64 on the CPU.
        numbers: the random numbers of each call that acts, the noise of its dropout, and the states
            that it reads.
        anchor: any tensor that requires grad, see `gpkit.autodiff.tracing.points.variable`.
    """

    def __init__(
        self,
        calls: Sequence[PenaltyCall],
        weights: Tensor,
        numbers: Sequence[Sequence[Tensor]],
        anchor: Tensor,
    ) -> None:
        self.calls, self.weights, self.numbers, self.anchor = calls, weights, numbers, anchor
        self.count = self.acted = 0
        self.rng = self.noise = Given(())
        self.states: list[Tensor] = []
        self.call, self.facts = calls[0] if calls else PenaltyCall(None, 0.0), 0
        self.observed: list[tuple[Tensor, ...]] = []
        self.learned: list[tuple[Tensor, ...]] = []
        self.held: list[Tensor] = []
        self.hooks: list[Any] = []

    def act(self, penalty: Any, evaluate: Callable[[float, int], Any], step: int | None) -> Any:
        """Return the terms of a call, with λ as a tensor; None if the penalty does not act.

        Raises:
            RuntimeError: if it is not the call of the eager step.
        """
        if self.count >= len(self.calls) or self.calls[self.count].penalty is not penalty:
            raise RuntimeError("other penalties are called than in the eager step")
        self.call = call = self.calls[self.count]
        self.count += 1
        self.facts = 0
        if not call.acts:
            return None
        weight, given = self.weights[self.acted], list(self.numbers[self.acted])
        drawn = len(call.drawn)
        noise = drawn + sum(map(len, call.noise))
        self.rng, self.noise, self.states = (
            Given(given[:drawn]),
            Given(given[drawn:noise]),
            given[noise:],
        )
        self.acted += 1
        terms = evaluate(1.0, 0)
        terms.weight = weight.to(terms.reduced.dtype)
        parts = [terms.squared_norms, terms.values, terms.reduced]
        parts += [] if terms.sample_weight is None else [terms.sample_weight]
        self.observed.append(apart(parts))
        return terms


RECORDS: list[Record] = []  # of the eager step that runs now
TRACES: list[Trace] = []  # of the step that is compiled now


def noted(find: Callable[[], Any]) -> Any:
    """Return what a function finds out, or in a graph what it found out in the eager step.

    Args:
        find: cannot be traced, and finds the same at every step.
    """
    if TRACES:
        trace = TRACES[-1]
        trace.facts += 1
        return trace.call.facts[trace.facts - 1]
    found = find()
    if RECORDS and RECORDS[-1].calls:
        RECORDS[-1].calls[-1].facts.append(found)
    return found


def apart(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Return what a graph returns beside its result, without graphs.

    Cloned: a graph returns the base of a view as well, as if it were differentiated.
    """
    return tuple([t.detach().clone() for t in tensors])


def outside(read: Callable[[], Tensor]) -> Tensor:
    """Return a state that penalties update; in a graph it is an input, read before each step.

    Args:
        read: returns the state, always of the same shape.
    """
    if TRACES:
        return TRACES[-1].states.pop(0)
    state = read()
    if RECORDS and RECORDS[-1].calls:
        RECORDS[-1].calls[-1].reads.append(read)
        RECORDS[-1].calls[-1].states.append(state)
    return state


def afterwards(learn: Callable[..., None], *tensors: Tensor) -> None:
    """Update a state by tensors of a step; of a compiled one after its graph has run.

    Args:
        learn: updates the state.
        *tensors: its arguments.
    """
    if TRACES:
        TRACES[-1].learned.append(apart(tensors))
        return
    if RECORDS and RECORDS[-1].calls:
        RECORDS[-1].calls[-1].learns.append(learn)
    if not RECORDS or RECORDS[-1].observes:
        learn(*[t.detach() for t in tensors])


def holds(condition: Callable[[], Tensor]) -> bool:
    """Whether a graph takes a condition on values for granted; else the caller looks at them.

    A compiled step on which it does not hold is run again as it is.

    Args:
        condition: returns whether it holds, one number.

    Returns:
        True in a graph.
    """
    if TRACES:
        TRACES[-1].held.append(condition())
    return bool(TRACES)
