"""Earlier: what is known of earlier calls of a penalty, for calls that repeat them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.axes.call import Arguments
from gpkit.formula import Terms


class Earlier:
    """What is known of earlier calls. A subclass defines `squared_norms`."""

    def squared_norms(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return n² ``[G]`` of a call that repeats an earlier one; None if it does not.

        Args:
            axes: the penalty.
            call: its arguments.
        """
        raise NotImplementedError

    def penalty(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return the penalty of a call that repeats an earlier one; None if it does not."""
        if not call.weight or axes.adapts or not torch.is_grad_enabled():
            return None
        n2 = self.squared_norms(axes, call)
        if n2 is None:
            return None
        form = axes.form.for_call(n2)
        axes.form.observe(n2)
        return formula.reduced(form(n2), axes.reduce) * call.weight

    def terms(self, axes: Any, call: Arguments) -> Terms | None:
        """Return the terms of such a call that is trained on; None if it does not repeat one."""
        n2 = self.squared_norms(axes, call)
        return None if n2 is None else formula.terms(axes, n2, call.weight, observe=True)
