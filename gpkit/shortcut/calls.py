"""Shortcut: how an earlier call went, and the arithmetic of those that repeat it."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit import formula
from gpkit.autodiff.compat import nodes_made
from gpkit.autodiff.derivatives import MENDED, as_rows, gradients
from gpkit.autodiff.isolation import run_plain
from gpkit.autodiff.numerics import note_positive, reduce_rows
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import CHECKPOINTS, LOOK_AGAIN, SEEN_ONCE, Reach
from gpkit.autodiff.state import restore
from gpkit.axes.at import At
from gpkit.axes.call import called
from gpkit.axes.form import Rooted
from gpkit.axes.wrt import inputs
from gpkit.estimators.base import Target
from gpkit.estimators.exact import exact
from gpkit.formula import Terms
from gpkit.shortcut.differences import Steps
from gpkit.shortcut.net import CHOICES, needs_more, state_of

MISSES = 3  # graphs that differ from the one before, after which a net has no shortcut


class Shortcuts:
    """The shortcuts of a penalty, by net; ``steps`` are those of `with_loss`."""

    def __init__(self) -> None:
        self.found: dict[int, Shortcut] = {}
        self.misses: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self.steps = Steps()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shortcuts)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return Shortcuts, ()

    def note(self, axes: Any, f: Any, targets: Sequence[Target]) -> None:
        """Remember the call that made these targets, of a penalty that was found to train."""
        key = id(f)
        self.found.pop(key, None)
        if has_shortcut(axes, f, targets) and self.misses.get(f, 0) < MISSES:
            net = weakref.ref(f, lambda _: self.found.pop(key, None))
            self.found[key] = Shortcut(axes, targets[0], net)

    def terms(
        self,
        axes: Any,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        weight: float,
        seed: int,
    ) -> Terms | None:
        """Return the terms of a call that repeats an earlier one; None if it does not.

        Takes the arguments of `GradientPenalty.evaluate`, for a net that was noted and a call that
        is trained on.
        """
        shortcut = self.found[id(f)]
        if is_compiling() or len(args) > 1:
            return None
        if args:
            if real is not None or fake is not None:
                return None
            real, fake = args[0], None if axes.at.moves else args[0]
        for x in (real, fake):
            plain = x is None or (type(x) is Tensor and x.ndim and x.numel() and not x.is_meta)
            if not plain:
                return None
        found = None if real is fake is None else shortcut.reach(axes, f)
        if found is None:
            return None
        terms = shortcut.terms(axes, f, found, real, fake, weight, seed)
        if terms is None:  # its graph is made in another way
            del self.found[id(f)]
            self.misses[f] = self.misses.get(f, 0) + 1
        return terms


def has_shortcut(axes: Any, f: Any, targets: Sequence[Target]) -> bool:
    """Whether the formula is its plain case, for a net that leaves no trace of its own."""
    target, *others = targets
    made = target.made
    return (
        made is not None
        and isinstance(f, nn.Module)
        and type(axes.estimator) is exact
        and type(axes.wrt) is inputs
        and not (axes.wrt.batch_dim or axes.wrt.keys)
        and axes.of in ("output", "loss")
        and (axes.order, axes.scope, axes.forward) == (1, "sample", "isolated")
        and not (axes.named or axes.metric or axes.given or axes.subsample or axes.elementary)
        and not (others or target.pixels or target.mean)
        and all(x is None for x in (target.weights, target.compared, target.groups, target.series))
        and target.y.ndim == 2
        and len(target.xs) == target.y.shape[1] == 1
        and not MENDED.keys() & target.fingerprint.kinds
        and not (has_ranks() or made.by.streams or CHECKPOINTS in made.by.known.facts)
        and not any(map(needs_more, made.by.family))
    )


class Shortcut:
    """How an earlier call went, for calls that repeat it.

    Args:
        axes: the penalty.
        target: what it differentiated.
        net: a reference to the net.
    """

    def __init__(self, axes: Any, target: Target, net: weakref.ref[nn.Module]) -> None:
        assert target.made is not None
        found = target.made.by
        self.net = net
        self.choices = CHOICES(axes)
        self.known = found.known
        self.family = [weakref.ref(module) for module in found.family]
        self.state = state_of(found.family, found.known.own)
        self.made = target.made.nodes, type(target.y.grad_fn)

    def reach(self, axes: Any, f: Any) -> Reach | None:
        """Return what the net reaches, if it and the axes are as they were; else None."""
        known, family = self.known, [ref() for ref in self.family]
        if self.net() is not f or None in family or not known.facts >= SEEN_ONCE:
            return None
        if (known.runs + 1) % LOOK_AGAIN == 0 or has_ranks():  # this run is looked at closely
            return None
        if not all(map(operator.is_, CHOICES(axes), self.choices)):
            return None
        if type(axes.at).weights is not At.weights:
            return None
        modules: list[Any] = family
        return Reach(modules, [], known) if state_of(modules, known.own) == self.state else None

    def terms(
        self, axes: Any, f: Any, found: Reach, real: Any, fake: Any, weight: float, seed: int
    ) -> Terms | None:
        """Return the terms of a call; None if its graph is not made like the one before."""
        kept = found.attributes if self.known.own else ()
        x = fake if real is None else real
        device = x.device
        rng: Any = torch.Generator(device).manual_seed(seed) if axes.at.moves else None
        xs = axes.at(None if real is None else (real,), None if fake is None else (fake,), rng)
        try:
            before = nodes_made()
            y = run_plain(called, (f, xs, len(x)), found, seed, device)
            nodes = nodes_made() - before
        finally:
            for module, attributes in kept:
                restore(module, attributes)
        if type(y) is not Tensor or y.shape not in ((len(xs[0]), 1), (len(xs[0]),)):
            return None
        y = y if y.ndim == 2 else y.unsqueeze(1)
        if (nodes, type(y.grad_fn)) != self.made:
            return None
        rows = [as_rows(g, True) for g in gradients(y if y.numel() == 1 else y.sum(), xs)]
        n2 = reduce_rows((tuple(rows),), axes.form.norm)
        if isinstance(axes.form, Rooted):
            note_positive(n2)
        return formula.terms(axes, n2, weight, observe=True) if n2.requires_grad else None
