"""The shortcut of `with_loss` by finite differences: two forward and backward passes, and a sum."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff import graph
from gpkit.autodiff.numerics import WIDE
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import CHECKPOINTS, Reach, code_of
from gpkit.axes.parameters import weights
from gpkit.estimators.finite_difference import finite_difference
from gpkit.shortcut.net import is_overridden, references
from gpkit.shortcut.step import KNOWN, Step, parts_of

MANY = 64
MISSES = 3  # steps that differ from the one before, after which a net has no shortcut


class Steps:
    """How earlier steps went, of losses with a penalty in the weights by finite differences."""

    def __init__(self) -> None:
        self.found: dict[Any, Step] = {}
        self.misses: dict[Any, int] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return Steps, ()

    def of(self, closure: Any, net: Any) -> Step | None:
        """Return how an earlier step with the same code and net went.

        Args:
            closure: returns the loss.
            net: the module, or its parameters.
        """
        return self.found.get(key_of(closure, net)) if self.found else None

    def note(self, axes: Any, closure: Any, net: Any, found: Reach, loss: Tensor) -> None:
        """Remember a step of a penalty that was found to train.

        Args:
            axes: the penalty.
            closure: that returned the loss.
            net: the module, or its parameters.
            found: what both reach.
            loss: whose gradient was taken.
        """
        key = key_of(closure, net)
        if self.misses.get(key, 0) >= MISSES or not has_shortcut(axes, net, found, loss):
            return
        refers = references((closure, net))
        if key in self.found and self.found[key].refers != refers:
            self.missed(closure, net)
        if refers is not None:
            if len(self.found) >= MANY:
                self.found.clear()
            forget = lambda _: self.found.pop(key, None)  # noqa: E731
            alive = [weakref.ref(part, forget) for part in parts_of(net)]
            self.found[key] = Step(axes, refers, alive, found, loss)

    def missed(self, closure: Any, net: Any) -> None:
        """Forget a step whose loss was made in another way than the one before."""
        key = key_of(closure, net)
        del self.found[key]
        if len(self.misses) >= MANY:
            self.misses.clear()
        self.misses[key] = self.misses.get(key, 0) + 1


def key_of(closure: Any, net: Any) -> tuple[int, ...]:
    """Return what tells a step from others: the code of the closure, and the module or tensors."""
    return id(code_of(closure)), *map(id, parts_of(net))


def has_shortcut(axes: Any, net: Any, found: Reach, loss: Tensor) -> bool:
    """Whether a step is the plain case: one loss, and the l2 norm of its gradient."""
    parts = parts_of(net)
    owned = {*map(id, found.parameters()), *map(id, parts)}
    tensors = all(isinstance(part, Tensor) for part in parts)
    return (
        (isinstance(net, nn.Module) or (tensors and bool(parts)))
        and type(axes.estimator) is finite_difference
        and not axes.estimator.check_every
        and type(axes.wrt) is weights
        and axes.wrt.match == "*"
        and axes.of in ("output", "loss")
        and (axes.order, axes.scope, axes.forward) == (1, "batch", "isolated")
        and axes.form.norm == "l2"
        and not (axes.named or axes.metric or axes.given or axes.subsample or axes.elementary)
        and loss.numel() == 1
        and loss.dtype in WIDE
        and {*map(id, graph.leaves(loss))} <= owned
        and found.known.facts >= KNOWN
        and CHECKPOINTS not in found.known.facts
        and not found.streams
        and not any(isinstance(module, torch.jit.ScriptModule) for module in found.family)
        and not has_ranks()
        and not is_overridden(axes)
    )
