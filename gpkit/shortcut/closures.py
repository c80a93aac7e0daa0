"""The shortcut of a call with a closure that returns a loss, and a module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.axes.call import Arguments
from gpkit.estimators.base import Target
from gpkit.formula import Terms
from gpkit.shortcut.earlier import Earlier
from gpkit.shortcut.exact_steps import ExactStep
from gpkit.shortcut.functions import Run


class Closure(Earlier):
    """How an earlier call with a closure went, for calls that repeat it.

    Args:
        run: how the closure was run.
        step: how a step with its loss goes.
    """

    def __init__(self, run: Run, step: ExactStep) -> None:
        self.run, self.step = run, step

    def penalty(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return the penalty of a call that repeats an earlier one; None if it does not."""
        if not call.weight or axes.adapts or not torch.is_grad_enabled():
            return None
        terms = self.terms(axes, call)
        return None if terms is None else terms.penalty

    def terms(self, axes: Any, call: Arguments) -> Terms | None:
        """Return the terms of such a call that is trained on; None if it does not repeat one."""
        f, args, real, fake, weight, seed = call
        if len(args) != 1 or real is not None or fake is not None:
            return None
        if not self.step.holds(axes, args[0]):
            return None
        family = self.run.family_for(axes)
        if family is None:
            return None
        loss, _ = self.run(family, (f, (), None), seed)
        terms = None if self.step.has_hooks() else self.of_loss(axes, loss, weight)
        if terms is None:
            self.run.forget()
        return terms

    def as_repeated(self, axes: Any, target: Target, terms: Terms) -> Terms:
        """Return the terms of the first call as later ones will compute them.

        Args:
            axes: the penalty.
            target: what it differentiated.
            terms: of the call.
        """
        made: Any = target.made
        if not (self.step.made.chain or self.step.made.wide):  # they are the same
            return terms
        return self.of_loss(axes, made.value, terms.weight, observe=False) or terms

    def of_loss(self, axes: Any, loss: Any, weight: float, *, observe: bool = True) -> Terms | None:
        """Return the terms of a loss; None if it was made in another way than that before.

        Args:
            axes: the penalty.
            loss: that the closure has returned.
            weight: the factor of the reduced value.
            observe: whether averages and the like learn from it.
        """
        terms_for = partial(formula.terms, axes, weight=weight, observe=observe)
        found = self.step.computed(axes, loss, None, terms_for, penalty_alone)
        if found is None:
            return None
        reduced, _, terms = found
        terms.reduced = reduced
        return terms


def penalty_alone(terms: Terms) -> Callable[[Tensor], Tensor]:
    """Return what makes the reduced value from the mean loss: that is not added to it."""
    return lambda _: terms.reduced
