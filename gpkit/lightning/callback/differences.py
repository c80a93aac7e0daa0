"""Training steps by finite differences that repeat earlier ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpkit.autodiff.reached import reach
from gpkit.estimators.base import Recomputable
from gpkit.formula import Terms
from gpkit.lightning.callback.again import Again
from gpkit.lightning.callback.plan import Plan
from gpkit.lightning.watch.replay import StepCall


class Differences:
    """Steps with one penalty by finite differences of the loss in the weights.

    Args:
        name: of the penalty.
        penalty: the penalty.
        again: runs a training step again.
    """

    def __init__(self, name: str, penalty: Any, again: Again) -> None:
        self.name, self.penalty, self.again = name, penalty, again
        self.begun: Any = None

    def begin(self, step: int | None) -> Any:
        """Return what a training step starts from, if it may repeat an earlier one; else None.

        Args:
            step: the optimiser step.
        """
        net, steps = self.again.watched.net, self.penalty.shortcuts.steps
        known = steps.of(self.again, net)
        start = None if known is None else known.begin(self.penalty, self.again, net, step)
        self.begun = None if start is None else (known, start)
        return None if start is None else start.state

    def taken(self, call: StepCall, loss: Tensor) -> tuple[Tensor, dict[str, Terms | None]] | None:
        """Return the total loss and the terms of a step that was begun; None if it is another.

        Args:
            call: the training step.
            loss: that it has returned.
        """
        if self.begun is None:
            return None
        (known, start), self.begun, self.again.call = self.begun, None, call
        try:
            found = known.taken(self.penalty, self.again, start, loss)
        finally:
            self.again.call = None
        if found is None:
            self.penalty.shortcuts.steps.missed(self.again, self.again.watched.net)
            return None
        total, _, terms = found
        return total, {self.name: terms()}

    def recomputable(self, value: Any, call: StepCall) -> Recomputable:
        """Return a loss for the long way.

        Args:
            value: the loss, with a graph or a known gradient.
            call: the training step that has returned it.
        """
        self.again.call = call
        found = reach((self.again, self.again.watched.net))
        return Recomputable(value, self.again, call.start or (), reach=found)

    def note(self, given: Any, loss: Tensor) -> None:
        """Remember a step that has taken the long way.

        Args:
            given: its `recomputable`.
            loss: of the training step, with its graph.
        """
        net, steps = self.again.watched.net, self.penalty.shortcuts.steps
        steps.note(self.penalty, self.again, net, given.reach, loss)
        self.again.call = None


def alone(plan: Plan) -> str | None:
    """Return the name of a penalty that acts alone and whose steps are `Differences`; else None."""
    if len(plan.needs) != 1 or plan.two_points != tuple(plan.needs) or plan.pooled:
        return None
    ((name, own),) = plan.needs.items()
    return None if own.given or own.measures else name
