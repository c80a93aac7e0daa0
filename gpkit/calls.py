"""What a penalty was called with, and a forward of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpkit import captures
from gpkit.draws import Source
from gpkit.isolation import RandomState, isolated
from gpkit.points import At, Points
from gpkit.sampled import sampled_losses

if TYPE_CHECKING:
    from gpkit.window import Window

Of = str | Callable[[Any], Tensor]


@dataclass(eq=False)
class Computed:
    """What was computed, and how it is computed anew.

    Args:
        value: what it was, a loss say, whose graph is there. None where ``at`` moves.
        function: gives it anew: at the weights as they are, or at the inputs it is called with.
        state: of the random numbers that it was computed with.
        mean: whether an input penalty's value is one number: the mean of the samples' own.
        window: the micro-batches whose gradients are averaged with this one's.
    """

    value: Any
    function: Callable[..., Any]
    state: RandomState
    mean: bool = False
    window: Window | None = None


@dataclass(eq=False)
class Call:
    """What a penalty was called with, and the axes that say how to read it.

    Args:
        f: a tensor whose graph is there, a callable to evaluate, or `Computed`, which is both.
        args: what followed it: samples, or a module or its parameters.
        real: real samples, if given by keyword.
        fake: fake samples, if given by keyword.
        of: "output", "loss", "sampled_loss", or a function of what ``f`` gives.
        at: where a callable is evaluated.
        scope: the groups, by name.
        rng: draws points.
        seed: for the random numbers of a forward.
        order: k, of the derivative.
        twice: whether a forward will be differentiated twice.
    """

    f: Any
    args: tuple[Any, ...]
    real: Any
    fake: Any
    of: Of
    at: At
    scope: str
    rng: Source
    seed: int | RandomState
    order: int = 1
    twice: bool = True

    @property
    def computed(self) -> bool:
        """Whether ``f`` is a value, not a function: a tensor, or what ``of`` takes one from."""
        return isinstance(self.f, Tensor) or (callable(self.of) and not callable(self.f))

    def run(
        self, xs: Points, device: torch.device, wrt: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what is differentiated, of a forward that leaves no trace, and activations."""
        if isinstance(self.f, Computed):
            return self.selected(self.again(self.f.function, self.f.state, xs, device)), {}
        wanted = captures.names(self.of, wrt)
        net = captures.module_of(wanted[0], self.f, self.args) if wanted else None
        with captures.captured(net, wanted) as caught:
            y = self.again(self.f, self.seed, xs, device)
        if isinstance(self.of, captures.Named):
            y = caught[self.of.name]
        return self.selected(y), caught

    def again(
        self, function: Any, seed: int | RandomState, xs: Points, device: torch.device
    ) -> Any:
        """Return what a function gives in a forward that leaves no trace."""
        with isolated(function, seed, device, self.order, twice=self.twice):
            return function(*xs)

    def selected(self, y: Any) -> Tensor:
        """Return what is differentiated, of what ``f`` gave."""
        if callable(self.of):
            y = self.of(y)
        if self.of == "sampled_loss" and isinstance(y, Tensor):
            y = sampled_losses(y, self.rng)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the function gave a {type(y).__name__}, and a tensor was expected; choose one "
                "with `of=lambda output: output[0]`"
            )
        return y
