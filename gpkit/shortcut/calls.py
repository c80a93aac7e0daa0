"""The shortcuts of a penalty: of calls with functions and modules, and with scores."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from gpkit.autodiff.compat import is_compiled_function
from gpkit.autodiff.derivatives import MENDED
from gpkit.autodiff.graph import Made
from gpkit.autodiff.layers.norms import is_proven
from gpkit.autodiff.random import has_ranks
from gpkit.autodiff.reached import CHECKPOINTS, code_of
from gpkit.axes.wrt import inputs
from gpkit.estimators.base import Recomputable, Target
from gpkit.estimators.exact import exact
from gpkit.formula import Terms
from gpkit.shortcut.chains import InputChain
from gpkit.shortcut.closures import Closure
from gpkit.shortcut.differences import Steps
from gpkit.shortcut.earlier import Earlier
from gpkit.shortcut.exact_steps import ExactStep, ExactSteps
from gpkit.shortcut.functions import Function, Run
from gpkit.shortcut.losses import Losses, is_loss
from gpkit.shortcut.net import is_overridden, needs_more, references
from gpkit.shortcut.repeated import squares
from gpkit.shortcut.scores import Scores

MANY = 64  # functions, or closures of one function
MISSES = 3  # graphs that differ from the one before, after which a function has no shortcut


class Shortcuts:
    """The shortcuts of a penalty; ``steps`` and ``exact_steps`` are those of `with_loss`."""

    def __init__(self) -> None:
        self.found: dict[Any, Function | Closure] = {}  # by what one refers to, see `key_of`
        self.misses: dict[Any, int] = {}
        self.closures: dict[int, int] = {}
        self.chains: dict[Any, InputChain | None] = {}  # by the fingerprints of targets
        self.scores: Scores | Losses = Scores()
        self.known = False  # whether there is any
        self.steps = Steps()
        self.exact_steps = ExactSteps()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shortcuts)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as empty: the nets of a copy are other nets."""
        return Shortcuts, ()

    def of(self, f: Any) -> Earlier | None:
        """Return how earlier calls with this function, with scores or with losses went, or None."""
        if type(f) is Tensor:
            scores = self.scores if self.scores.known else None
            return None if scores is None or is_compiling() or has_ranks() else scores
        if type(f) is Recomputable:
            losses = isinstance(self.scores, Losses) and self.scores.known
            whole = f.layers is not None and f.window is None and type(f.value) is Tensor
            return self.scores if losses and whole and not (is_compiling() or has_ranks()) else None
        found = self.found.get(key_of(f)) if self.found else None
        if found is None or found.run.forgotten or is_compiling() or has_ranks():
            return None
        return found

    def squared_norms(self, axes: Any, f: Any, targets: Sequence[Target]) -> Tensor | None:
        """Return n² ``[G]`` as calls that repeat this one will compute it.

        So a run that goes on from a checkpoint has the bits of the one that was never stopped.

        Args:
            axes: the penalty.
            f: the first argument of the call.
            targets: of the call.

        Returns:
            n²; None where the estimator gives the same.
        """
        chain = self.chain_of(axes, f, targets)
        if chain is None:
            return None
        (target,) = targets
        g = chain.gradient(target.y, target.xs[0], torch.ones_like(target.y))
        return None if g is None else squares(g, axes.form)

    def chain_of(self, axes: Any, f: Any, targets: Sequence[Target]) -> InputChain | None:
        """Return the chain of a call with a function whose graph is the penalty's own, or None."""
        target, *others = targets
        if others or type(f) is Tensor or not callable(f) or target.made is None:
            return None
        if is_overridden(axes) or not is_plain(axes, target) or is_compiling() or target.made.hooks:
            return None
        if torch.is_autocast_enabled(target.y.device.type) or not is_known(f, target, target.made):
            return None
        key = target.fingerprint.key
        if key not in self.chains:
            if len(self.chains) >= MANY:
                self.chains.clear()
            self.chains[key] = InputChain.between(target.y, target.xs[0])
        return self.chains[key]

    def note(
        self, axes: Any, f: Any, args: tuple[Any, ...], targets: Sequence[Target], terms: Terms
    ) -> Terms:
        """Remember the call that made these targets, of a penalty that was found to train.

        Args:
            axes: the penalty.
            f: the first argument of the call.
            args: the other ones.
            targets: of the call.
            terms: of the call.

        Returns:
            The terms, as calls that repeat this one will compute them.
        """
        target, *others = targets
        if is_overridden(axes):
            return terms
        if not axes.wrt.batched and (type(f) is Tensor or isinstance(f, Recomputable)):
            self.note_loss(axes, f, args, targets)
        elif not axes.wrt.batched:
            closure = self.closure_of(axes, f, args, targets)
            return terms if closure is None else closure.as_repeated(axes, target, terms)
        elif not others and is_plain(axes, target):
            self.known = True
            if type(f) is Tensor:
                self.of_scores().note(axes, f, target)
            elif callable(f) and target.made is not None and is_known(f, target, target.made):
                chain, made = self.chain_of(axes, f, targets), target.made
                if not self.may_keep(f):
                    return terms
                self.keep(f, Function(axes, target, made, chain, code=is_code(f)), made)
        return terms

    def closure_of(self, axes: Any, f: Any, args: Any, targets: Sequence[Target]) -> Closure | None:
        """Remember a call with a closure, and return how it went; None if it has no shortcut."""
        net, (target, *others), made = args[0] if len(args) == 1 else None, targets, targets[0].made
        if others or made is None or not callable(f) or not isinstance(net, nn.Module):
            return None
        if axes.forward != "isolated":
            return None
        if not (is_loss(axes, made.value, targets) and is_known(f, target, made)) or has_ranks():
            return None
        if axes.scope == "sample" and not (target.layers and is_proven(net)):
            return None
        if not self.may_keep(f):
            return None
        step = ExactStep.after(axes, made.value, target, target.layers, weakref.ref(net))
        if step is None:
            return None
        self.known = True
        closure = Closure(Run(axes, target, made, code=True), step)
        self.keep(f, closure, made)
        return closure

    def of_scores(self) -> Scores:
        """Return the calls with scores."""
        if not isinstance(self.scores, Scores):
            self.scores = Scores()
        return self.scores

    def note_loss(self, axes: Any, f: Any, args: Any, targets: Sequence[Target]) -> None:
        """Remember a call with a loss."""
        layers = None
        if isinstance(f, Recomputable):
            if f.layers is None or f.selected or f.window is not None:
                return
            self.exact_steps.note(axes, f, targets)
            f, layers = f.value, targets[0].layers if axes.scope == "sample" else None
        if is_loss(axes, f, targets) and not has_ranks():
            self.known = True
            if not isinstance(self.scores, Losses):
                self.scores = Losses()
            self.scores.note(axes, f, args, targets[0], layers)

    def may_keep(self, f: Any) -> bool:
        """Whether to remember a call with a function: not if earlier ones were of no use."""
        key = key_of(f)
        before = self.found.get(key)
        if before is not None and before.run.forgotten:  # its graph was another than the one before
            self.misses[key] = self.misses.get(key, 0) + 1
            del self.found[key]
        if key is None or self.misses.get(key, 0) >= MISSES:
            return False
        if is_code(f) and key not in self.found:
            own = id(code_of(f))
            self.closures[own] = count = self.closures.get(own, 0) + 1
            if count > MANY:  # each call has another one
                return False
        return True

    def keep(self, f: Any, found: Function | Closure, made: Made) -> None:
        """Remember a call with a function or a module."""
        key = key_of(f)
        if len(self.found) >= MANY:
            self.found.clear()

        def gone(_: Any) -> None:
            self.found.pop(key, None)
            self.misses.pop(key, None)

        self.found[key] = found
        found.run.alive = weakref.ref(made.by.family[0], gone)


def is_code(f: Any) -> bool:
    """Whether a function is code of the user's own, and no module."""
    return not isinstance(f, nn.Module)


def key_of(f: Any) -> Any:
    """Return what tells a function from others; None if there is too much to read."""
    if isinstance(f, nn.Module):
        return id(f)
    refers = references(f)
    return refers and tuple(refers)


def is_plain(axes: Any, target: Target) -> bool:
    """Whether the formula is its plain case: norms of one number per sample in one input."""
    return (
        type(axes.estimator) is exact
        and type(axes.wrt) is inputs
        and not (axes.wrt.batch_dim or axes.wrt.keys)
        and axes.of in ("output", "loss")
        and (axes.order, axes.scope, axes.forward) == (1, "sample", "isolated")
        and not (axes.named or axes.metric or axes.given or axes.elementary)
        and not (target.pixels or target.mean)
        and all(x is None for x in (target.weights, target.compared, target.groups, target.series))
        and target.y.ndim == 2
        and len(target.xs) == target.y.shape[1] == 1
        and not MENDED.keys() & target.fingerprint.kinds
        and not has_ranks()
    )


def is_known(f: Any, target: Target, made: Made) -> bool:
    """Whether a function leaves no trace of its own, and trains what is seen to change."""
    found = made.by
    if found.streams or CHECKPOINTS in found.known.facts or any(map(needs_more, found.family)):
        return False
    if isinstance(f, nn.Module):
        return True
    owned = {*map(id, found.parameters())}
    own = bool(owned) and all(id(leaf) in owned for leaf in target.fingerprint.leaves)
    return own and not is_compiled_function(f)
