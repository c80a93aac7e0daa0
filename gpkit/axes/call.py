"""Call: the arguments of a penalty's call, and the forward passes that the penalty runs."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from gpkit.autodiff import activations
from gpkit.autodiff.isolation import double_backward, isolated
from gpkit.autodiff.random import RandomState, Source, random_state
from gpkit.axes.at import Points
from gpkit.axes.form import Form
from gpkit.axes.of import Of, sampled_losses
from gpkit.estimators.base import Estimator, Recomputable
from gpkit.estimators.window import POOLED, Window


class Axes(Protocol):
    """The axes of a `GradientPenalty` that a call is read with."""

    of: Of
    wrt: Any
    at: Any
    named: tuple[str, ...]  # the activations that ``of`` and ``wrt`` name
    scope: str
    order: int
    form: Form
    estimator: Estimator
    forward: str


@dataclass(eq=False)
class Call:
    """The arguments of a penalty's call.

    Args:
        axes: the penalty's axes.
        f: a tensor with its graph, a callable to evaluate, or a `Recomputable`, which has both.
        args: the other positional arguments: samples, or a module or its parameters.
        real: real samples, if passed by keyword.
        fake: fake samples, if passed by keyword.
        rng: the random numbers of points and estimators.
        seed: the seed of a forward pass.
        acts: whether the penalty is trained on; a look at it leaves no trace.
    """

    axes: Axes
    f: Any
    args: tuple[Any, ...]
    real: Any
    fake: Any
    rng: Source
    seed: int | RandomState
    acts: bool = False

    @property
    def has_graph(self) -> bool:
        """Whether ``f`` is a value: a tensor, or an output that ``of`` selects a tensor from."""
        return isinstance(self.f, Tensor) or (callable(self.axes.of) and not callable(self.f))

    def run(self, xs: Points, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a forward pass without side effects.

        Args:
            xs: the arguments of the function.
            device: the device of the forward pass.

        Returns:
            The output to differentiate, and the activations that ``of`` and ``wrt`` name.
        """
        if isinstance(self.f, Recomputable):
            return self.selected(self.rerun(self.f.function, self.f.state, xs, device)), {}
        wanted = self.axes.named
        if not wanted:
            return self.selected(self.rerun(self.f, self.seed, xs, device)), {}
        net = activations.module_of(wanted[0], self.f, self.args)
        with activations.captured(net, wanted) as caught:
            y = self.rerun(self.f, self.seed, xs, device)
        if isinstance(self.axes.of, activations.Named):
            y = caught[self.axes.of.name]
        return self.selected(y), caught

    def rerun(
        self, function: Any, seed: int | RandomState, xs: Points, device: torch.device
    ) -> Any:
        """Return the output of a function in a forward pass without side effects."""
        twice, how = not self.axes.estimator.first_order, self.axes.forward
        if how == "training" and isinstance(seed, int):
            seed = self.seed = random_state(device)  # the runs at other points draw the same
            if self.acts:
                with double_backward(self.axes.order) if twice else nullcontext():
                    return function(*xs)
        with isolated(
            function, seed, device, self.axes.order, twice=twice, evaluating=how == "eval"
        ):
            return function(*xs)

    def require_forward(self) -> None:
        """Refuse ``forward=`` where the penalty runs no forward pass of its own.

        Raises:
            ValueError: if ``f`` is a value.
        """
        if self.axes.forward == "isolated":
            return
        if self.has_graph or getattr(self.f, "value", None) is not None:
            raise ValueError(
                f"forward={self.axes.forward!r} is about a forward pass that the penalty runs "
                "itself; got a tensor, which was computed before: give the penalty the function, "
                "penalty(f, x) or penalty(closure, net), or leave forward= out"
            )

    def selected(self, y: Any) -> Tensor:
        """Return the tensor to differentiate: what ``of`` selects from the output of ``f``."""
        if callable(self.axes.of):
            y = self.axes.of(y)
        if self.axes.of == "sampled_loss" and isinstance(y, Tensor):
            y = sampled_losses(y, self.rng)
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the function must return a tensor; got a {type(y).__name__}: select one with "
                "`of=lambda output: output[0]`"
            )
        return y

    def window(self) -> Window | None:
        """Return the window if the scope is "accumulated" or "global", else None.

        Raises:
            ValueError: if the scope is "accumulated" and the caller passed no window, because the
                penalty does not know the micro-batches.
        """
        if self.axes.scope not in POOLED:
            return None
        if isinstance(self.f, Recomputable) and self.f.window is not None:
            return self.f.window
        if self.axes.scope == "accumulated":
            raise ValueError(
                'scope="accumulated" needs the micro-batches of an optimiser step, which '
                "only gpkit.GradientPenaltyCallback knows: use scope='batch' or 'global'"
            )
        return Window(ranks=True)
