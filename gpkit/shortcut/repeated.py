"""Repeated: how earlier calls of a penalty went, and the arithmetic that is left of another one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit import formula
from gpkit.autodiff.derivatives import as_rows, gradients
from gpkit.autodiff.numerics import WIDE, is_positive, note_positive, reduce_rows, root
from gpkit.axes.call import Arguments
from gpkit.axes.form import Rooted, one_sided, two_sided
from gpkit.hints import ExplainedError
from gpkit.shortcut.chains import InputChain
from gpkit.shortcut.compat import gradient
from gpkit.shortcut.earlier import Earlier


class Repeated(Earlier):
    """How earlier calls with samples went. A subclass defines `output`, and maybe `forget`.

    Args:
        device: of the samples.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.kind = device, device.type
        self.ones = torch.ones(0, device=device)
        self.form: Any = None
        self.rooted = False

    def output(
        self, axes: Any, f: Any, real: Tensor | None, fake: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor, InputChain | None] | None:
        """Return y, x, and the chain between them, if there is one, of a call like an earlier one.

        y is ``[B]`` or ``[B, 1]``, and x is ``[B, *S]``.

        Args:
            axes: the penalty.
            f: the first argument of the call.
            real: the real samples ``[B, *S]``, or None.
            fake: the fake samples ``[B, *S]``, or None.
            seed: the seed of this evaluation's random numbers.
        """
        raise NotImplementedError

    def forget(self) -> None:
        """Forget an earlier call, as this one is another."""

    def penalty(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return the penalty, by the root of n² where the form has it; see `Earlier.penalty`."""
        form = axes.form
        if form is not self.form:
            self.form, self.rooted = form, is_rooted(form)
        if not self.rooted:
            return super().penalty(axes, call)
        if not call.weight or axes.adapts or not torch.is_grad_enabled():
            return None
        g = self.gradient(axes, call)
        if g is None:
            return None
        n2 = lengths(g) if g.dtype in WIDE else squares(g, form)
        values = form.of_root(n2.sqrt() if is_positive(n2) else root(n2))
        values = values if form.scale == 1 else values * form.scale
        return formula.reduced(values, axes.reduce) * call.weight

    def squared_norms(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return n² ``[B]`` of a call that repeats an earlier one; None if it does not."""
        g = self.gradient(axes, call)
        return None if g is None else squares(g, axes.form)

    def gradient(self, axes: Any, call: Arguments) -> Tensor | None:
        """Return the gradient ``[B, *S]``, with a graph, of a call that repeats an earlier one."""
        f, args, real, fake, _, seed = call
        if args:
            if len(args) > 1 or real is not None or fake is not None:
                return None
            real, fake = args[0], None if axes.at.moves else args[0]
        if real is fake is None:
            return None
        for x in (real, fake):
            plain = x is None or (type(x) is Tensor and x.ndim and x.numel())
            if not plain or (x is not None and x.device != self.device):
                return None
        found = self.output(axes, f, real, fake, seed)
        if found is None:
            return None
        y, x, chain = found
        if not y.requires_grad or torch.is_autocast_enabled(self.kind):
            g: Tensor | None = gradients(y.sum(), (x,))[0]
        else:
            ones = self.ones
            if ones.shape != y.shape or ones.dtype != y.dtype or ones.device != y.device:
                if y.is_complex():
                    self.forget()
                    return None
                ones = self.ones = torch.ones_like(y)
            g = None if chain is None else chain.gradient(y, x, ones)
            try:  # in one operation less than the derivative of the sum
                g = gradient(y, x, ones) if g is None else g
            except RuntimeError as error:
                raise ExplainedError(error) from error
        if g is None or not g.requires_grad:
            self.forget()
            return None
        return g


def is_rooted(form: Any) -> bool:
    """Whether the values are those of the root of n², and nothing else."""
    if type(form) not in (two_sided, one_sided) or form.eps or form.norm != "l2":
        return False
    return isinstance(form.center, (int, float)) and form.center != 0


def lengths(g: Tensor) -> Tensor:
    """Return ‖g‖² ``[B]`` for each row of ``[B, *S]``."""
    return (g if g.ndim == 2 else as_rows(g, True)).square().sum(1)


def squares(g: Tensor, form: Any) -> Tensor:
    """Return n² ``[B]`` of a gradient ``[B, *S]``, in the norm of a form."""
    if form.norm == "l2" and g.dtype in WIDE:
        n2 = lengths(g)
    else:
        n2 = reduce_rows(((as_rows(g, True),),), form.norm)
    if isinstance(form, Rooted):
        note_positive(n2)
    return n2
