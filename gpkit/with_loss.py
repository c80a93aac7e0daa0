"""The loss and weight penalties as one scalar, from one training forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from gpkit.autodiff.random import device_of
from gpkit.autodiff.reached import Reach, reach
from gpkit.autodiff.state import start_of
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.axes.parameters import layers_for
from gpkit.estimators.base import Recomputable
from gpkit.estimators.window import summarised
from gpkit.formula import Terms
from gpkit.penalty import Penalty


class Taken(NamedTuple):
    """What a step of `with_loss` gives.

    Args:
        total: the loss + Σ penalties, one number.
        loss: the loss alone, without a graph of its own.
        terms: returns the terms of the last penalty; None if it does not act.
    """

    total: Tensor
    loss: Tensor
    terms: Callable[[], Terms | None]


class Losses(NamedTuple):
    """What a closure may return: losses, and the mean that is trained on.

    It is not that of the losses where a loss weighs the classes, or ignores some targets.

    Args:
        each: ``[B]``.
        mean: one number.
    """

    each: Tensor
    mean: Tensor


def with_loss(
    penalties: Sequence[Penalty], closure: Callable[[], Any], net: Any, step: int | None = None
) -> Taken:
    """Return the loss and weight penalties as one scalar, from one training forward pass.

    Args:
        penalties: weight penalties.
        closure: returns the loss.
        net: the module, or its parameters.
        step: the optimiser step; None counts the calls.

    Returns:
        The scalar loss + Σ penalties, with its parts.

    Raises:
        TypeError: if a penalty is not a weight penalty, or the closure is not callable.
        ValueError: if a penalty is not of the loss, or the closure returns outputs.
    """
    if not isinstance(net, Module) and isinstance(net, Iterator):  # net.parameters()
        net = list(net)
    first: Any = penalties[0] if len(penalties) == 1 else None
    shortcuts = getattr(first, "shortcuts", None)
    if shortcuts is None:
        return _with_loss(penalties, closure, net, step)
    begun: Any = None
    exact = shortcuts.exact_steps.of(first, closure, net, step)
    known = shortcuts.steps.of(closure, net) if exact is None else None
    start = None if known is None else known.begin(first, closure, net, step)
    if exact is not None:
        given = closure()
        taken = exact.taken(first, *parts_of(given), step)
        if taken is not None:
            return Taken(*taken)
        shortcuts.exact_steps.missed(closure, net)
        begun = None, (), given
    elif known is not None and start is not None:
        given = closure()
        taken = known.taken(first, closure, start, given)
        if taken is not None:
            return Taken(*taken)
        shortcuts.steps.missed(closure, net)
        begun = start.found, start.state, given
    return _with_loss(penalties, closure, net, step, begun)


def _with_loss(
    penalties: Sequence[Penalty],
    closure: Callable[[], Any],
    net: Any,
    step: int | None,
    begun: tuple[Reach | None, Any, Any] | None = None,
) -> Taken:
    """Do the same, for a step that does not repeat an earlier one.

    Args:
        penalties: weight penalties.
        closure: returns the loss.
        net: the module, or its parameters.
        step: the optimiser step.
        begun: what the closure reaches, what it started from, and what it has returned.

    Returns:
        The scalar, with its parts.
    """
    in_weights: list[Any] = _in_weights(penalties, closure)
    first = in_weights[0]
    if not torch.is_grad_enabled():
        given, trained = parts_of(closure())
        total = mean = _loss(first, given).mean() if trained is None else trained
        for penalty in in_weights:
            total = total + penalty(closure, net, step=step)
        return Taken(total, mean, lambda: None)
    layers, given = None, None
    if begun is None:
        reruns = not (TRACES or all(p.estimator.reuses_graph for p in in_weights))
        found = reach((closure, net)) if reruns else None
        state: Any = () if found is None else start_of(found, device_of(net))
        with layers_for(in_weights, net) as layers:
            given = closure()
    else:
        found, state, given = begun
    given, trained = parts_of(given)
    y, selected = _loss(first, given), False
    loss = y
    if len(in_weights) == 1 and not first.estimator.reuses_graph:
        given = y = summarised(y) if y.numel() == 1 and y.requires_grad else y
        selected = True
    total = y.reshape(()) if y.numel() == 1 else y.mean()
    total = total if trained is None else trained
    mean, terms = total.detach(), None
    for penalty in in_weights:
        plain = penalty.estimator.reuses_graph and layers is None
        again = partial(Recomputable, function=closure, state=state, layers=layers, reach=found)
        f = given if plain else again(given, selected=selected, trained=trained)
        terms = penalty.act(f, net, step=step)
        total = total if terms is None else terms.added_to(total, overwrite=True)
    if selected and found and terms is not None and first.shortcuts is not None:
        first.shortcuts.steps.note(first, closure, net, found, loss)
    if len(in_weights) == 1 and terms is not None and first.shortcuts is not None:
        again = first.shortcuts.exact_steps.as_repeated(first, loss, trained, terms.weight)
        total = total if again is None else again
    return Taken(total, mean, lambda: terms)


def parts_of(given: Any) -> tuple[Any, Tensor | None]:
    """Return what a closure has returned, and the mean that is trained on if that is another."""
    return given if isinstance(given, Losses) else (given, None)


def _in_weights(penalties: Sequence[Penalty], closure: Any) -> list[Any]:
    """Return the penalties, if they and the closure are such as `with_loss` takes."""
    in_weights: list[Any] = [p for p in penalties if not _in_inputs(p)]
    if len(in_weights) < len(penalties):
        raise TypeError(
            "`with_loss(closure, net)` is for weight penalties; add an input penalty to the loss: "
            "loss + penalty(f, x)"
        )
    if not callable(closure):
        raise TypeError(
            f"`with_loss(closure, net)` takes a function that returns the loss; got a "
            f"{type(closure).__name__}"
        )
    for penalty in in_weights:
        if penalty.of == "sampled_loss" or penalty.named:
            raise ValueError(
                "`with_loss(closure, net)` is for a penalty of the loss that the closure returns; "
                f"got of={penalty.of!r}: add the penalty to the loss, loss + penalty(closure, net)"
            )
    return in_weights


def _in_inputs(penalty: Any) -> bool:
    """Whether a penalty is not in the weights."""
    return bool(getattr(getattr(penalty, "wrt", None), "batched", True))


def _loss(penalty: Any, given: Any) -> Tensor:
    """Return the loss or losses, selected from the closure's result by ``of``."""
    y = penalty.of(given) if callable(penalty.of) else given
    if not isinstance(y, Tensor):
        raise TypeError(f"the closure must return a loss; got a {type(y).__name__}")
    if y.numel() != (len(y) if y.ndim else 1) and penalty.of != "loss":
        raise ValueError(
            f"the closure must return a loss, or losses [B], whose mean is trained on; got "
            f"{list(y.shape)}: for a penalty of outputs use loss + penalty(closure, net)"
        )
    return y
