"""The shortcut of a call with a function or a module, which a penalty evaluates at its points."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpkit.autodiff.compat import nodes_made
from gpkit.autodiff.graph import Made
from gpkit.autodiff.isolation import run_plain
from gpkit.autodiff.reached import LOOK_AGAIN, SEEN_ONCE, Reach
from gpkit.autodiff.state import restore
from gpkit.axes.at import At
from gpkit.axes.call import called
from gpkit.estimators.base import Target
from gpkit.shortcut.net import Choices, State, may_attend
from gpkit.shortcut.points import Drawing
from gpkit.shortcut.repeated import Repeated, samples_of


class Function(Repeated):
    """How an earlier call with a function went, for calls that repeat it.

    Args:
        axes: the penalty.
        target: what it differentiated.
        made: how the graph was made.
        code: whether it is code of the user's own, and no module.
        missed: forgets it.
    """

    alive: Any = None  # a reference that tells when the net is gone

    def __init__(
        self, axes: Any, target: Target, made: Made, missed: Callable[[], None], *, code: bool
    ) -> None:
        super().__init__()
        found = made.by
        self.missed = missed
        self.choices = Choices(axes)
        self.known = found.known
        self.family = [weakref.ref(module) for module in found.family]
        self.state = State(found.family, found.known.own)
        last = target.y.grad_fn
        before = last.next_functions[0][0] if target.y.ndim == 2 and last is not None else None
        self.made = {2: (made.nodes, type(last)), 1: (made.nodes, type(before))}
        self.attends = code or may_attend(found.family, target.fingerprint.kinds)
        self.drawing = Drawing()

    def gradient(
        self, axes: Any, f: Any, args: tuple[Any, ...], real: Any, fake: Any, seed: int
    ) -> Tensor | None:
        """Return the gradient; None if a call, or the graph it makes, is unlike the one before."""
        samples, known = samples_of(axes, args, real, fake), self.known
        family: list[Any] = [ref() for ref in self.family]
        if samples is None or None in family or not known.facts >= SEEN_ONCE:
            return None
        if (known.runs + 1) % LOOK_AGAIN == 0 or not self.choices.hold(axes):  # a closer look
            return None
        if not self.state.holds(family) or type(axes.at).weights is not At.weights:
            return None
        real, fake = samples
        x = fake if real is None else real
        kept = Reach(family, [], known).attributes if known.own else ()
        points = self.drawing.points(axes.at, real, fake, seed)
        try:
            before = nodes_made()
            arguments = f, points, x.shape[0]
            y = run_plain(called, arguments, known, seed, x.device, attends=self.attends)
            nodes = nodes_made() - before
        finally:
            for module, attributes in kept:
                restore(module, attributes)
        g = self.derived(y, points[0]) if self.is_like(y, nodes, points[0].shape[0]) else None
        if g is None:
            known.facts -= SEEN_ONCE  # it does something new
            self.missed()
        return g

    def is_like(self, y: Any, nodes: int, batch: int) -> bool:
        """Whether an output is one number a sample, made in the same way as that before."""
        if type(y) is not Tensor or (y.shape != (batch, 1) and y.shape != (batch,)):
            return False
        return (nodes, type(y.grad_fn)) == self.made[y.ndim]
