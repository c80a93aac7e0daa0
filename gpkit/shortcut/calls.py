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
from gpkit.autodiff.numerics import WIDE, note_positive, reduce_rows
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import CHECKPOINTS, LOOK_AGAIN, SEEN_ONCE, Reach
from gpkit.autodiff.state import restore
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.at import At
from gpkit.axes.call import called
from gpkit.axes.form import Rooted
from gpkit.axes.wrt import inputs
from gpkit.estimators.base import Target
from gpkit.estimators.exact import exact
from gpkit.formula import Terms
from gpkit.hints import ExplainedError
from gpkit.shortcut.differences import Steps
from gpkit.shortcut.net import CHOICES, may_attend, needs_more, state_of

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

    def penalty(
        self,
        axes: Any,
        f: Any,
        args: tuple[Any, ...],
        real: Any,
        fake: Any,
        weight: float,
        seed: int,
    ) -> Tensor | None:
        """Return the penalty of a call that repeats an earlier one; None if it does not.

        Takes the arguments of `GradientPenalty.evaluate`, for a net that was noted.
        """
        if not weight or not torch.is_grad_enabled() or RECORDS or TRACES:
            return None
        n2 = self.squared_norms(axes, f, args, real, fake, seed)
        if n2 is None:
            return None
        form = axes.form.for_call(n2)
        axes.form.observe(n2)
        return formula.reduced(form(n2), axes.reduce) * weight

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
        n2 = self.squared_norms(axes, f, args, real, fake, seed)
        return None if n2 is None else formula.terms(axes, n2, weight, observe=True)

    def squared_norms(
        self, axes: Any, f: Any, args: tuple[Any, ...], real: Any, fake: Any, seed: int
    ) -> Tensor | None:
        """Return n² ``[B]`` of a call that repeats an earlier one; None if it does not."""
        shortcut = self.found[id(f)]
        samples = shortcut.samples(axes, f, args, real, fake)
        if samples is None:
            return None
        n2 = shortcut.squared_norms(axes, f, *samples, seed)
        if n2 is None:
            self.missed(f)
        return n2

    def missed(self, f: nn.Module) -> None:
        """Forget a call whose graph was made in another way than the one before."""
        del self.found[id(f)]
        self.misses[f] = self.misses.get(f, 0) + 1


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
        self.attends = may_attend(found.family, target.fingerprint.kinds)
        self.generator: torch.Generator | None = None

    def samples(
        self, axes: Any, f: Any, args: tuple[Any, ...], real: Any, fake: Any
    ) -> tuple[Any, Any] | None:
        """Return the real and fake samples of a call that may repeat the one before, else None."""
        if args:
            if len(args) > 1 or real is not None or fake is not None:
                return None
            real, fake = args[0], None if axes.at.moves else args[0]
        if real is fake is None:
            return None
        for x in (real, fake):
            plain = x is None or (type(x) is Tensor and x.ndim and x.numel() and not x.is_meta)
            if not plain:
                return None
        known = self.known
        family: list[Any] = [ref() for ref in self.family]
        if self.net() is not f or None in family or not known.facts >= SEEN_ONCE:
            return None
        if (known.runs + 1) % LOOK_AGAIN == 0 or is_compiling() or has_ranks():  # a closer look
            return None
        if not all(map(operator.is_, CHOICES(axes), self.choices)):
            return None
        if type(axes.at).weights is not At.weights or state_of(family, known.own) != self.state:
            return None
        return real, fake

    def squared_norms(self, axes: Any, f: Any, real: Any, fake: Any, seed: int) -> Tensor | None:
        """Return n² ``[B]`` of a call; None if its graph is not made like the one before."""
        known, x = self.known, fake if real is None else real
        device = x.device
        kept: Any = ()
        if known.own:
            family: list[Any] = [ref() for ref in self.family]
            kept = Reach(family, [], known).attributes
        rng: Any = self.source(device).manual_seed(seed) if axes.at.moves else None
        xs = axes.at(None if real is None else (real,), None if fake is None else (fake,), rng)
        try:
            before = nodes_made()
            y = run_plain(called, (f, xs, x.shape[0]), known, seed, device, attends=self.attends)
            nodes = nodes_made() - before
        finally:
            for module, attributes in kept:
                restore(module, attributes)
        batch = xs[0].shape[0]
        if type(y) is not Tensor or y.shape not in ((batch, 1), (batch,)):
            return None
        y = y if y.ndim == 2 else y.unsqueeze(1)
        if (nodes, type(y.grad_fn)) != self.made:
            return None
        total = y if batch == 1 else y.sum()
        if not y.requires_grad or torch.is_autocast_enabled(device.type):
            (g,) = gradients(total, xs)
        else:
            try:
                (g,) = torch.autograd.grad(total, xs, create_graph=True, allow_unused=True)
            except RuntimeError as error:
                raise ExplainedError(error) from error
            if g is None:
                return None
        if axes.form.norm == "l2" and g.dtype in WIDE:
            n2 = (g if g.ndim == 2 else as_rows(g, True)).square().sum(1)
        else:
            n2 = reduce_rows(((as_rows(g, True),),), axes.form.norm)
        if isinstance(axes.form, Rooted):
            note_positive(n2)
        return n2 if n2.requires_grad else None

    def source(self, device: torch.device) -> torch.Generator:
        """Return a generator for the points, which is seeded before each use."""
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device)
        return self.generator
