"""Call: the arguments of a penalty's call, and the forward passes that the penalty runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gpkit.autodiff import activations
from gpkit.autodiff.compat import hooks_made, nodes_made
from gpkit.autodiff.graph import Made
from gpkit.autodiff.isolation import double_backward, in_graph, isolated, running
from gpkit.autodiff.random import META, RandomState, Source
from gpkit.autodiff.reached import Reach, reach, reached, require_no_script
from gpkit.autodiff.state import Start, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.axes.at import Points
from gpkit.axes.form import Form
from gpkit.axes.given.given import Given
from gpkit.axes.given.sample_weight import of_samples
from gpkit.axes.of import Of, draw_labels, named_parts, sampled_losses, scores_of
from gpkit.estimators.base import Estimator, Recomputable
from gpkit.estimators.repeats import SAME, require_same
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
    elementary: bool  # whether norm layers are in elementary operations at order 1 as well
    subsample: float | None
    evaluated_at: int  # the optimiser step


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
        given: the target, metric and weights of the call, or None.
        labels: those drawn for ``of="sampled_loss"``; None before.
        made: how the graph of the first forward pass was made; None before.
        steps: the shape of the losses of steps ``[B, *T]``, if ``of="loss"`` had such.
    """

    axes: Axes
    f: Any
    args: tuple[Any, ...]
    real: Any
    fake: Any
    rng: Source
    seed: int | RandomState | Start
    acts: bool = False
    given: Given | None = None
    labels: Tensor | None = None
    made: Made | None = None
    steps: tuple[int, ...] = ()

    @cached_property
    def reach(self) -> Reach:
        """What the function reaches."""
        known = self.f.reach if isinstance(self.f, Recomputable) else None
        return reach(self.function) if known is None else known

    @property
    def has_graph(self) -> bool:
        """Whether ``f`` is a value: a tensor, or an output that ``of`` selects a tensor from."""
        tensors = isinstance(self.f, Tensor) or isinstance(scores_of(self.f)[0], Tensor)
        return tensors or (callable(self.axes.of) and not callable(self.f))

    def run(
        self,
        xs: Points,
        device: torch.device,
        changes: Mapping[str, activations.Change] | None = None,
    ) -> tuple[Any, dict[str, Tensor]]:
        """Run a forward pass without side effects.

        Args:
            xs: the arguments of the function.
            device: the device of the forward pass.
            changes: of activations, by name.

        Returns:
            The output to differentiate, and the activations that ``of`` and ``wrt`` name.
        """
        if RECORDS:
            RECORDS[-1].ran(self.reach.family)
        if self.axes.estimator.on_jets and not TRACES:
            require_no_script(self.reach.family)
        if isinstance(self.f, Recomputable):
            with self.forward(self.f.state, device):
                return self.selected(self.f.function(*xs)), {}
        wanted = self.axes.named
        if not wanted:
            with self.forward(self.seed, device):
                if TRACES:
                    return self.selected(called(self.f, xs, self.batch)), {}
                nodes, hooks = nodes_made(), hooks_made()
                y = self.selected(called(self.f, xs, self.batch))
                nodes, hooks = nodes_made() - nodes, hooks_made() - hooks
                self.made = self.made or Made(self.reach, nodes, hooks, self.axes.order > 1, y)
                return y, {}
        net = activations.module_of(wanted[0], self.f, self.args)
        with self.forward(self.seed, device):
            with activations.captured(net, wanted, changes) as caught:
                y = called(self.f, xs, self.batch)
            if isinstance(self.axes.of, activations.Named):
                y = caught[self.axes.of.name]
            return self.selected(y), caught

    def forward(
        self, seed: int | RandomState | Start, device: torch.device
    ) -> AbstractContextManager[None]:
        """A context for a run of the function: without side effects, or as ``forward=``."""
        twice, how = not self.axes.estimator.first_order, self.axes.forward
        if TRACES and how == "training":
            return nullcontext()
        if TRACES:
            return in_graph(evaluating=how == "eval")
        order = max(self.axes.order, 2 if self.axes.elementary else 1)
        if how == "training" and isinstance(seed, int):
            seed = self.seed = start_of(self.reach, device)  # the runs at other points repeat it
            if self.acts:
                return running(double_backward(order) if twice else nullcontext())
        return isolated(self.reach, seed, device, order, twice=twice, evaluating=how == "eval")

    def is_unproven(self, *, reruns: bool = False) -> bool:
        """Whether the function is run again, and was not yet seen to repeat its value.

        Args:
            reruns: whether it is run again whatever the estimator.

        Returns:
            Whether to `prove` it.
        """
        if TRACES or (self.axes.estimator.reuses_graph and not reruns):
            return False
        return SAME not in self.reach.known.facts

    def prove(self, y: Tensor, again: Tensor) -> None:
        """Refuse a function whose second value differs, and remember one whose does not.

        Raises:
            RuntimeError: if the values differ.
        """
        require_same(y, again)
        self.reach.known.facts.add(SAME)

    @property
    def function(self) -> Any:
        """The function that is run."""
        return self.f.function if isinstance(self.f, Recomputable) else self.f

    def require_forward(self) -> None:
        """Refuse what needs a forward pass of the penalty's own where it runs none.

        Raises:
            ValueError: for ``forward=``, if ``f`` is a value.
            TypeError: for an activation, if ``f`` is a value.
        """
        of, computed = self.axes.of, isinstance(self.f, Recomputable)
        if isinstance(of, activations.Named) and self.has_graph and not computed:
            raise TypeError(
                f"`of={of!r}` is captured in a forward pass that the penalty runs itself; "
                "got a tensor, which may be any output: use penalty(net, x), or, if you have the "
                "submodule's output h with its graph, gpkit.jacobian()(h, x)"
            )
        if self.axes.forward == "isolated":
            return
        if self.has_graph or getattr(self.f, "value", None) is not None:
            raise ValueError(
                f"forward={self.axes.forward!r} is about a forward pass that the penalty runs "
                "itself; got a tensor, which was computed before: give the penalty the function, "
                "penalty(f, x) or penalty(closure, net), or leave forward= out"
            )

    @property
    def batch(self) -> int | None:
        """The number of samples given, None if there are none."""
        given = self.args[0] if self.args and self.real is None and self.fake is None else None
        for samples in (self.real, self.fake, given):
            first = samples[0] if isinstance(samples, (list, tuple)) and samples else samples
            if isinstance(first, Tensor) and first.ndim:
                return len(first)
        return None

    def selected(self, y: Any) -> Any:
        """Return the tensor to differentiate: what ``of`` selects from the output of ``f``.

        For inputs it may be a list of tensors, the scores of several critics or scales.

        Raises:
            TypeError: if it is anything else.
        """
        if callable(self.axes.of):
            y = self.axes.of(y)
        if self.axes.of == "sampled_loss" and isinstance(y, Tensor):
            if self.labels is None:  # the same at all points of an evaluation
                self.labels = draw_labels(y, self.rng)
            y = sampled_losses(y, self.labels)
        if (
            self.axes.of == "loss"
            and isinstance(y, Tensor)
            and (self.axes.wrt.batched or self.axes.scope == "sample")
        ):
            pixels = self.axes.scope == "pixel"  # then the weights are theirs
            weights = None if pixels or self.given is None else self.given.sample_weight
            y, self.steps = of_samples(y, weights)
        if self.axes.wrt.batched and isinstance(scores_of(y)[0], Tensor):
            return y
        if not isinstance(y, Tensor):
            raise TypeError(
                f"the function must return a tensor; got a {type(y).__name__}: {named_parts(y)}"
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


def called(function: Callable[..., Any], xs: Points, given: int | None) -> Any:
    """Return ``function(*xs)``.

    Args:
        function: the user's.
        xs: the points.
        given: the number of samples in the call; None if there are none.

    Raises:
        RuntimeError: if the function raised an error and its cause can be told, such as another
            dtype of the net's parameters, or labels for other points. Else the error itself.
    """
    try:
        return function(*xs)
    except Exception as error:
        hint = _hint(error, function, xs, given)
        if hint is None:
            raise
        raise RuntimeError(
            f"{hint} ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error


def _hint(error: Exception, function: Any, xs: Points, given: int | None) -> str | None:
    """Return what is wrong, if it can be told."""
    if not xs:
        loss = isinstance(error, TypeError) and isinstance(function, nn.Module)
        return (
            "the loss, or a closure that returns it, comes first: penalty(loss, net)" * loss or None
        )
    parameters = [p for module in reached(function)[0] for p in module.parameters()]
    if any(p.is_meta for p in parameters):
        return META
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    floating = [x for x in xs if x.is_floating_point()]
    words = str(error)
    if len(dtypes) == 1 and floating and ("dtype" in words or "type" in words):
        wanted = next(iter(dtypes))
        for x in floating:
            if x.dtype != wanted:
                return (
                    f"the samples have the dtype {x.dtype} and the net's parameters {wanted}: "
                    f"give the penalty x.to({wanted}), or run it under autocast"
                )
    points = len(xs[0])
    if given and points > given and points % given == 0:
        times = points // given
        return (
            f"the function failed at {points} points, {times} for each of the {given} samples: if "
            f"it holds labels or latents, let them follow, labels.repeat({times})"
        )
    return None


class Arguments(NamedTuple):
    """The arguments of a call, see `gpkit.penalty.Penalty.evaluate`."""

    f: Any
    args: tuple[Any, ...]
    real: Any
    fake: Any
    weight: float
    seed: int


def listed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return arguments that can be read twice, unlike ``net.parameters()``."""
    return tuple([list(a) if isinstance(a, Iterator) else a for a in args])
