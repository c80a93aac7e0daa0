"""Target and Estimator: the input of an estimator, and its base class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from gpkit.autodiff.graph import Made, dtypes, fingerprint_of
from gpkit.autodiff.layers.recording import Recording
from gpkit.autodiff.numerics import per_pixel, spacing, wide
from gpkit.autodiff.random import RandomState, Source
from gpkit.autodiff.reached import Reach
from gpkit.autodiff.state import Start
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.estimators.compared import Compared
from gpkit.estimators.window import Window


class Series(Protocol):
    """What an estimator has found out where it ran the function first, see `Estimator.begun`."""

    def scaled(self, scale: Tensor | float) -> Series:
        """Return the same for scale·y."""


@dataclass(frozen=True, eq=False)
class Begun:
    """The first run of a function, by an estimator.

    Args:
        scores: the outputs to differentiate, ``[B, m]`` each; there are several for a list.
        series: what was found out together with each of them.
        at: the points where they are the function's value.
    """

    scores: list[Tensor]
    series: list[Series]
    at: tuple[Tensor, ...]


@dataclass(eq=False)
class Target:
    """An output to differentiate, with its variables.

    Args:
        y: ``[G, m]``: m outputs for each of G groups; or one number of any shape, their sum.
        xs: the variables: ``[G, *S]`` each if ``batched``, else any shapes and G = 1.
        batched: whether group g of ``y`` depends on ``x[g]`` only.
        evaluate: recomputes ``y`` with the same random numbers: at the inputs passed to it, or,
            without arguments, at the current weights. None if there is only a graph.
        pixels: whether each pixel of the ``xs`` ``[G, C, *S]`` has a norm (order 1 only).
        mean: True if only the batch mean of the loss is known: then ``y`` is B · mean, ``[1, 1]``.
        window: the micro-batches or ranks whose gradients are averaged with this one.
        scale: the factor that ``y`` was multiplied by against underflow, or None.
        share: n² ``[G]`` -> ∂P/∂n² ``[G]``, constants, where P is the reduced value of the penalty.
        times: a constant factor of the gradient of a one-number ``y``, as in ``grad_outputs``; only
            `exact` supports it. It saves a multiplication node in the graph of ``y``.
        weights: the weights of the points in the mean ``[G]``; None if all weigh the same.
        step: the optimiser step, for an estimator with a schedule.
        scores: how many targets are scores of the same points; each has a penalty of its own.
        groups: the group ``[N]`` of each row of ``xs`` ``[N, *S]``, if a group has several rows;
            only for an estimator with ``by_group``.
        steps: the shape ``[G, *T]`` of the losses of steps whose sum ``y`` is; () if it is none.
        compared: what the derivative is compared with; only for an estimator that ``compares``.
        layers: of the forward pass. Then ``y`` is ``[B, 1]`` with parameters as variables, and each
            sample has a norm; only for an estimator with ``by_layer``.
        rows: the numbers of the samples whose norms are taken, with ``layers``; None for all.
        series: what `Estimator.begun` has found out together with ``y``; None if it was not asked.
        made: how the graph of ``y`` was made, where the penalty has made it.
    """

    y: Tensor
    xs: tuple[Tensor, ...]
    batched: bool
    evaluate: Callable[..., Tensor] | None = None
    pixels: bool = False
    mean: bool = False
    window: Window | None = None
    scale: Tensor | float | None = None
    share: Callable[[Tensor], Tensor] | None = None
    times: Tensor | None = None
    layers: Recording | None = None
    compared: Compared | None = None
    rows: Tensor | None = None
    series: Series | None = None
    made: Made | None = None
    weights: Tensor | None = None
    step: int = 0
    scores: int = 1
    groups: Tensor | None = None
    steps: tuple[int, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.y.device

    fingerprint = cached_property(fingerprint_of)

    def spacing(self, *others: Tensor) -> float:
        """Return the machine epsilon of the coarsest dtype that ``y`` was computed in.

        Inside of a function that returns float32 it may be half precision, by autocast or by the
        dtype of its parameters.

        Args:
            *others: tensors whose dtypes count too.
        """
        epsilon = spacing(self.y, *others, *self.xs)
        used = () if TRACES else dtypes(self.y, self.fingerprint)
        return max([epsilon, *[torch.finfo(dtype).eps for dtype in used]])

    def scaled(self, scale: Tensor | float) -> Target:
        """Return a target for scale·y: its n² is scale² times the n² of ``y``."""
        evaluate = self.evaluate

        def scaled(*xs: Tensor) -> Tensor:
            assert evaluate is not None
            y = evaluate(*xs)
            return y.to(wide(y)) * scale

        y = self.y.to(wide(self.y)) * scale
        compared = self.compared and self.compared.scaled(scale)
        series = None if self.series is None else self.series.scaled(scale)
        changes: dict[str, Any] = {"y": y, "series": series, "scale": scale, "compared": compared}
        return replace(self, evaluate=evaluate and scaled, **changes)

    def function(self, estimator: Estimator) -> Callable[..., Tensor]:
        """Return the function of an estimator that evaluates it at other inputs.

        Raises:
            ValueError: if there is only a graph, or only the mean loss of the batch.
        """
        name = type(estimator).__name__
        if self.mean:
            raise ValueError(
                f"`estimator={name}()` needs the loss of each sample, and a training step shows "
                "their mean: give the callback losses=..., or use of='output', PenalizedModule, "
                "or estimator='exact'"
            )
        if self.evaluate is None:
            raise ValueError(
                f"`estimator={name}()` needs a callable, to evaluate it at other points; got a "
                "tensor: use penalty(f, x), or estimator='exact'"
            )
        return self.evaluate

    def split(self, rows: Iterable[tuple[Tensor, ...]]) -> Iterable[tuple[Tensor, ...]]:
        """Return the rows of a derivative, compared, with one row per norm: per group or pixel."""
        if self.compared is not None:
            rows = self.compared.rows(rows)
        if not self.pixels:
            return rows
        return (tuple(map(per_pixel, row, self.xs)) for row in rows)


class Targets(list[Target]):
    """The targets of one evaluation of a penalty, for a caller that has made their graphs."""


@dataclass(eq=False)
class Recomputable:
    """A value with its graph, and a function (with RNG state) that recomputes it.

    Args:
        value: the value with its graph, such as a loss. None where ``at`` moves the
            points, or ``forward`` asks for another forward pass.
        function: recomputes the value: at the current weights, or at the inputs passed to it.
        state: what the computation of ``value`` started from, see `start_of`.
        mean: whether the value of an input penalty is one number, the mean over the samples.
        window: the micro-batches whose gradients are averaged with this one's.
        layers: the calls of the net's layers in the forward pass of ``value``.
        selected: whether ``value`` is what ``of`` selects, and not the result of ``function``.
        reach: what the function reaches, if that is known.
        trained: the mean that is trained on, if it is another one than that of the value.
    """

    value: Any
    function: Callable[..., Any]
    state: RandomState | Start
    mean: bool = False
    window: Window | None = None
    layers: Recording | None = None
    selected: bool = False
    reach: Reach | None = None
    trained: Tensor | None = None

    @property
    def device(self) -> torch.device | None:
        """The device of the value; None without a value."""
        return getattr(self.value, "device", None)


class Estimator:
    """How n² is computed. The base class of `estimator`.

    A subclass defines one method, ``squared_norms``, and sets the flags below where they differ.
    The package ``gpkit.estimators`` has an example.

    >>> import gpkit
    >>> [gpkit.exact().reuses_graph, gpkit.finite_difference().reuses_graph]
    [True, False]
    """

    # Whether the graph of the output is enough; if not, the penalty must be given the function.
    reuses_graph = True
    # Whether it uses the output at the points, and then evaluates the function at others: a caller
    # that has that output and repeats the function's random numbers saves it a forward pass.
    continues = False
    # Whether it takes a gradient in the variables.
    differentiates = True
    # Whether it differentiates each graph once, and so needs no double backward.
    first_order = False
    # Whether it needs norm layers in elementary operations at order 1 as well.
    elementary = False
    # Whether it runs the function on Taylor series.
    on_jets = False
    # Whether it can average gradients in the weights over micro-batches before the norm.
    pools = False
    # Whether it takes the norm of A ∘ (D f - g), see `Target.compared`.
    compares = False
    # Whether it can give each pixel of an image a norm.
    by_pixel = False
    # Whether it can take one norm over several rows of the inputs.
    by_group = False
    # Whether it takes l2 norms of each sample's gradient in the weights from recorded layers.
    by_layer = False
    # Whether n of several outputs is the norm of all of them together, not the slope of one number.
    frobenius = True

    # The first run of the function, if it is not at the points themselves: then the output there
    # takes no run of its own. (function, points, order, random numbers, step, metrics) -> `Begun`.
    begun: Callable[..., Begun] | None = None

    def check(self, order: int, norm: str, batched: bool) -> None:
        """Refuse what it does not support; ``batched`` is True for inputs, False for weights."""

    def is_random(self, target: Target, order: int) -> bool:
        """Whether n² is a random estimate, which is right on average."""
        return False

    def squared_norms(self, target: Target, order: int, norm: str, rng: Source) -> Tensor:
        """Return n² ``[G]``, the squared norm of each group's derivative.

        Args:
            target: the output and the variables.
            order: k >= 1, the order of the derivative.
            norm: "l2", "l1" or "linf".
            rng: the random numbers; draw them with `gpkit.autodiff.random`.

        Returns:
            n² ``[G]``, differentiable, in float32 or better.

        Raises:
            NotImplementedError: if a subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define squared_norms")


def require_gradient(estimator: Estimator, order: int) -> None:
    """Refuse orders above one.

    Raises:
        ValueError: if ``order`` > 1.
    """
    if order > 1:
        raise ValueError(
            f"`estimator={type(estimator).__name__}()` takes order=1; got order={order}: use "
            "estimator='projection' or 'exact'"
        )


def require_inputs(estimator: Estimator, norm: str, batched: bool) -> None:
    """Refuse weights, and norms other than l2.

    Raises:
        ValueError: if it is for weights, or the norm is another.
    """
    name = type(estimator).__name__
    if not batched:
        raise ValueError(
            f"`estimator={name}()` needs wrt='input'; got weights: use "
            "estimator='finite_difference'"
        )
    if norm != "l2":
        raise ValueError(
            f"`estimator={name}()` estimates the l2 norm; got norm={norm!r}: use estimator='exact'"
        )


def require_function(estimator: Estimator, target: Target) -> Callable[..., Tensor]:
    """Return the function to evaluate.

    Raises:
        ValueError: if the target has only a graph, or has several outputs.
    """
    name = type(estimator).__name__
    if target.evaluate is None:
        call = "penalty(f, x)" if target.batched else "penalty(closure, net)"
        raise ValueError(
            f"`estimator={name}()` needs a callable, to evaluate it at other points; got a tensor: "
            f"use {call}, or estimator='exact'"
        )
    if target.y.shape[1] > 1:
        raise ValueError(
            f"`estimator={name}()` takes one output per group; got {target.y.shape[1]}: use "
            "estimator='projection' or 'exact'"
        )
    return target.evaluate
