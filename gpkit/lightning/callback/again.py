"""A training step that is run again."""

from __future__ import annotations

from typing import Any

from gpkit.lightning.callback.plan import PenalizedNet
from gpkit.lightning.watch.replay import StepCall
from gpkit.needs import Needs


class Again:
    """Runs the latest training step again, silently, and returns its loss.

    It is one object for all steps, so that a step can be told to repeat an earlier one. What it
    reaches is the module, as ``__self__``, and not the batch, which is new in each step.

    Args:
        module: the LightningModule.
        watched: the net that the penalty is about.
        needs: of the penalty.
    """

    __slots__ = ("__self__", "call", "needs", "watched")

    def __init__(self, module: Any, watched: PenalizedNet, needs: Needs) -> None:
        self.__self__ = module
        self.watched, self.needs = watched, needs
        self.call: StepCall | None = None

    def __call__(self) -> Any:
        """Run the step again."""
        assert self.call is not None
        return self.watched.rerun(self.__self__, self.call, self.needs)
