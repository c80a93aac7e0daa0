"""The shortcut of a call with a function or a module, which a penalty runs again as before."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.compat import hooks_made, nodes_made
from gpkit.autodiff.graph import Made
from gpkit.autodiff.isolation import run_plain, run_still
from gpkit.autodiff.reached import LOOK_AGAIN, OF_EVERY_MODULE, SEEN_ONCE
from gpkit.autodiff.state import restore
from gpkit.axes.at import At
from gpkit.axes.call import called
from gpkit.estimators.base import Target
from gpkit.shortcut.chains import InputChain
from gpkit.shortcut.compat import GLOBAL_HOOKS
from gpkit.shortcut.net import Choices, State, are_still, may_attend, sizes_of
from gpkit.shortcut.points import Drawing
from gpkit.shortcut.repeated import Repeated


class Run:
    """How a function was run, for runs that repeat it.

    Args:
        axes: the penalty.
        target: what it differentiated.
        made: how the graph was made.
        code: whether the function is code of the user's own, and no module.

    Attributes:
        alive: a reference that tells when the net is gone.
        forgotten: whether the function has done something new since.
    """

    alive: Any = None
    forgotten = False

    def __init__(self, axes: Any, target: Target, made: Made, *, code: bool) -> None:
        found, self.device = made.by, target.xs[0].device
        self.choices, self.known = Choices(axes), found.known
        self.family = [weakref.ref(module) for module in found.family]
        self.state = State(found.family, found.known.own)
        self.still = not code and are_still(found.family)
        self.sizes = sizes_of(found.family)
        owned = {*map(id, found.parameters())}
        self.others = [weakref.ref(p) for p in target.fingerprint.leaves if id(p) not in owned]
        self.attends = code or may_attend(found.family, target.fingerprint.kinds)

    def family_for(self, axes: Any) -> list[nn.Module] | None:
        """Return the modules of the function, if these and the penalty are as they were."""
        known = self.known
        family: list[Any] = [ref() for ref in self.family]
        if None in family or not known.facts >= SEEN_ONCE:
            return None
        if (known.runs + 1) % LOOK_AGAIN == 0 or not self.choices.hold(axes):  # a closer look
            return None
        if self.others and not all(map(is_trained, self.others)):
            return None
        return family if self.state.holds(family) else None

    def __call__(
        self, family: Sequence[nn.Module], arguments: tuple[Any, ...], seed: int
    ) -> tuple[Any, int]:
        """Run the function.

        Args:
            family: its modules.
            arguments: of `called`.
            seed: of this forward pass.

        Returns:
            What it gives, and how many nodes it has made.
        """
        known = self.known
        kept = [(family[i], {**vars(family[i])}) for i in known.own]
        try:
            before = nodes_made()
            if self.still and sizes_of(family) == self.sizes and not any(GLOBAL_HOOKS):
                y = run_still(called, arguments, known)
            else:
                y = run_plain(called, arguments, known, seed, self.device, attends=self.attends)
            return y, nodes_made() - before
        finally:
            for module, before_it in kept:
                if not are_same(vars(module), before_it):
                    own = {k: v for k, v in before_it.items() if k not in OF_EVERY_MODULE}
                    restore(module, own)

    def forget(self) -> None:
        """Forget the run before: the function does something new, and is looked at closely."""
        self.known.facts -= SEEN_ONCE
        self.forgotten = True


def is_trained(ref: weakref.ref[Tensor]) -> bool:
    """Whether a leaf of a graph is there and is trained."""
    leaf = ref()
    return leaf is not None and leaf.requires_grad


def are_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two dictionaries have the same objects in the same order."""
    return len(now) == len(before) and all(map(operator.is_, now.values(), before.values()))


class Function(Repeated):
    """How an earlier call with a function went, for calls that repeat it.

    Args:
        axes: the penalty.
        target: what it differentiated.
        made: how the graph was made.
        chain: between the output and the points, if there is one.
        code: whether it is code of the user's own, and no module.
    """

    def __init__(
        self, axes: Any, target: Target, made: Made, chain: InputChain | None, *, code: bool
    ) -> None:
        super().__init__(target.xs[0].device)
        self.run = Run(axes, target, made, code=code)
        last = target.y.grad_fn
        before = last.next_functions[0][0] if target.y.ndim == 2 and last is not None else None
        self.made = {2: (made.nodes, type(last)), 1: (made.nodes, type(before))}
        self.drawing = Drawing(self.device)
        self.chain = chain

    def output(
        self, axes: Any, f: Any, real: Tensor | None, fake: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor, InputChain | None] | None:
        """Return what the function gives at the points; None if it is unlike the call before."""
        family = self.run.family_for(axes)
        if family is None or type(axes.at).weights is not At.weights:
            return None
        points = self.drawing.points(axes.at, real, fake, seed)
        if len(points) > 1:  # from a function of the user's own
            return None
        samples: Any = fake if real is None else real
        hooks = hooks_made()
        y, nodes = self.run(family, (f, points, samples.shape[0]), seed)
        if self.is_like(y, nodes, points[0].shape[0]):
            return y, points[0], None if hooks_made() > hooks else self.chain
        self.forget()
        return None

    def forget(self) -> None:
        """Forget the call before: the function does something new, and is looked at closely."""
        self.run.forget()

    def is_like(self, y: Any, nodes: int, batch: int) -> bool:
        """Whether an output is one number a sample, made in the same way as that before."""
        if type(y) is not Tensor or (y.shape != (batch, 1) and y.shape != (batch,)):
            return False
        return (nodes, type(y.grad_fn)) == self.made[y.ndim]
