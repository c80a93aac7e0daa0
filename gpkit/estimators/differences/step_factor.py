"""The step of finite differences: its direction, its length, and a factor at which they agree."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor

from gpkit.autodiff.numerics import Over, dual, over_all
from gpkit.estimators.compared import Compared

AGREES, WARNS = 0.02, 0.1  # relative differences between two steps
FURTHEST = 4.0**8

# Yields factors of the step, is sent the difference quotients there, returns the factor to use.
Search = Generator[float, Sequence[Tensor], float]

# The two ends of the step on each side.
SIGNS = {"forward": (0.0, 1.0), "backward": (-1.0, 0.0), "central": (-1.0, 1.0)}
FINE = 1e-10  # a machine epsilon, as of float64, at which the default step needs no check


class Known(dict[int, tuple["ref[Tensor]", int, float]]):
    """Nets by the id of a parameter: the parameter, the uses, and the factor.

    A copy knows none: it looks for itself.
    """

    def recall(self, leaf: Tensor) -> tuple[int, float]:
        """Return the uses with the net of a parameter, and its factor."""
        known, uses, factor = self.get(id(leaf), (None, 0, 1.0))
        return (uses, factor) if known is not None and known() is leaf else (0, 1.0)

    def note(self, leaf: Tensor, uses: int, factor: float) -> None:
        """Remember them."""
        self[id(leaf)] = ref(leaf), uses, factor

    def __reduce__(self) -> tuple[Any, ...]:
        return Known, ()


class Stepping(Protocol):
    """What `finite_difference` says of its step."""

    @property
    def step(self) -> float | None:
        """The length, if it is given."""

    @property
    def side(self) -> str:
        """The side of the difference."""

    @property
    def cross_kinks(self) -> bool:
        """Whether units may change pieces within the step."""

    @property
    def check_every(self) -> int:
        """How often the step is looked at."""

    @property
    def factors(self) -> Known:
        """What is known of nets."""


@dataclass(eq=False)
class look:
    """A look at the step for a net: iterate over factors, and give the difference at each.

    There are none where the net is known. Then, and at the end, ``factor`` is the one to use.

    Args:
        fd: the step.
        epsilon: the machine epsilon.
        leaves: of the net.
        over: see `search`.
    """

    fd: Stepping
    epsilon: float
    leaves: Sequence[Tensor]
    over: Over = over_all
    factor: float = 1.0
    found: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        fd, self.uses = self.fd, 0
        self.counts = self.asks = False  # whether uses are counted, and whether it yields factors
        if self.leaves and (fd.check_every or (fd.step is None and self.epsilon > FINE)):
            self.uses, self.factor = fd.factors.recall(self.leaves[0])
            self.counts = True
            self.asks = self.uses == 0 or bool(fd.check_every and self.uses % fd.check_every == 0)

    def __iter__(self) -> Iterator[float]:
        """Yield factors; set ``found`` to the difference quotient at each."""
        fd = self.fd
        if self.asks:
            looking = search(self.factor, self.over, fd.step is not None)
            try:
                asked = next(looking)
                while True:
                    yield asked
                    found, self.found = self.found, ()
                    asked = looking.send(found)
                    del found
            except StopIteration as done:
                self.factor = done.value
        if self.counts:
            fd.factors.note(self.leaves[0], self.uses + 1, self.factor)


def search(start: float, over: Over, fixed: bool) -> Search:
    """Look for the factor of the step where differences agree, and warn if they do not.

    A difference over h has an error of order h by curvature, and one of order 1/h by rounding. If
    the differences at h and h/2 agree within 2 %, h stays. Else smaller and larger steps are tried,
    and the one where neighbours agree best is taken. In a distributed run h stays, because ranks
    that decide by numbers of their own would run unequal numbers of passes.

    Args:
        start: the factor to look at first.
        over: the sum over all entries of several tensors, see `over_all`. One over several
            processes makes them decide alike.
        fixed: whether to look at this step only.

    Yields:
        A factor; send it the difference quotient at that multiple of the default step.

    Returns:
        The factor.
    """
    here = yield start
    apart = gap(here, (yield start / 2), over)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if apart > AGREES and not fixed and not (distributed and over is over_all):
        best, factor = math.inf, start
        for ratio in (0.25, 4.0):
            at, last, worse = start, here, 0
            while worse < 2 and 1 / FURTHEST < at * ratio < FURTHEST:
                at *= ratio
                there = yield at
                step = gap(last, there, over)
                if step < best:
                    best, factor, worse = step, at / ratio**0.5, 0
                else:
                    worse += 1
                last = there
        half = yield factor / 2
        found = gap((yield factor), half, over)
        if found < apart:
            start, apart = factor, found
    if apart > WARNS:
        warnings.warn(
            f"finite differences at the steps h and h/2 differ by {apart:.0%}, so the gradient of "
            "the penalty is about as far off: the net is curved within h (batch norm at the "
            "start), its numbers are coarse (bfloat16), or it has kinks that are hidden (a ReLU in "
            "a compiled net or in a custom Function): use estimator='exact', "
            "finite_difference(side='central'), or a smooth activation",
            stacklevel=2,
        )
    return start


def ascent(
    compared: Compared | None, grads: Sequence[Tensor], norm: str, over: Over = over_all
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return n = ‖A ∘ (∇f - g)‖, v with ⟨A ∘ (∇f - g), v⟩ = n, and A ∘ v: constants.

    Args:
        compared: g and A, or None.
        grads: ∇f: rows ``[G, n]``, or gradients in weights.
        norm: "l2", "l1" or "linf".
        over: as in `dual`.

    Returns:
        n in the shape that ``over`` returns; v, and A ∘ v, along which f is differentiated.
    """
    if compared is None:
        n, v = dual(grads, norm, over)
        return n, v, v
    n, v = dual(compared.detached().row(grads), norm, over)
    return n, v, compared.times(v)


def length_for(size: Any, epsilon: float, step: float | None, side: str) -> Any:
    """Return the length of the step of `finite_difference`.

    Args:
        size: the root mean square of the entries that are moved: a tensor or a float.
        epsilon: the machine epsilon.
        step: a given length, or None.
        side: of the difference.

    Returns:
        The length, a tensor in the shape of ``size`` or a float.
    """
    if step is not None:
        return torch.full_like(size, step) if isinstance(size, Tensor) else step
    step = epsilon ** (1 / 3) / 2 if side == "central" else 2 * epsilon**0.5
    return step * (size.clamp(min=1) if isinstance(size, Tensor) else max(size, 1.0))


def gap(a: Sequence[Tensor], b: Sequence[Tensor], over: Over) -> float:
    """Return ‖a - b‖ over the larger of ‖a‖ and ‖b‖; zero if both are zero, or not finite."""
    top = float(over([*a, *b], torch.abs, "max"))
    if not 0 < top < math.inf:
        return 0.0
    pairs = [*zip(a, b, strict=True)]  # divided, since squares may overflow; one by one, for memory
    parts: Any = (((x - y) / top for x, y in pairs), (x / top for x in a), (y / top for y in b))
    if over is not over_all:
        parts = [[*part] for part in parts]
    change, *sizes = (float(over(part, torch.square, "sum").sqrt()) for part in parts)
    return change / max(sizes)
