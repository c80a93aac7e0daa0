"""The loss and a penalty in the weights, from one training forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gpkit import graphs
from gpkit.calls import Computed
from gpkit.isolation import random_state
from gpkit.perturbation import known_gradient
from gpkit.targets import wide
from gpkit.variables import weights
from gpkit.window import Window

if TYPE_CHECKING:
    from gpkit.penalty import GradientPenalty


def with_loss(
    penalty: GradientPenalty, closure: Callable[[], Any], net: Any, step: int | None
) -> Tensor:
    """Return the loss and the penalty as one scalar; see `GradientPenalty.with_loss`.

    Args:
        penalty: in the weights.
        closure: gives the loss.
        net: the module, or its parameters.
        step: the optimiser step; None counts the calls.

    Returns:
        A scalar.

    Raises:
        TypeError: if the penalty is not in the weights, or the closure is no function.
    """
    if not isinstance(penalty.wrt, weights):
        raise TypeError(
            "`with_loss(closure, net)` takes a penalty in the weights; add one in the inputs to "
            "the loss: loss + penalty(f, x)"
        )
    if not callable(closure):
        raise TypeError(
            f"`with_loss(closure, net)` takes a function that gives the loss; got a "
            f"{type(closure).__name__}"
        )
    net = list(net) if isinstance(net, Iterator) else net
    if not torch.is_grad_enabled():
        return selected(penalty, closure()).mean() + penalty(closure, net, step=step)
    state = random_state(penalty.wrt.chosen(net)[0].device)
    given: Any = closure()
    y = selected(penalty, given)
    if not penalty.estimator.reuses_graph:
        y = summarised(y) if y.numel() == 1 and y.requires_grad else y
        given = Computed(y, closure, state)
    terms = penalty.act(given, net, step=step)
    return y.mean() if terms is None else terms.added_to(y.mean())


def selected(penalty: GradientPenalty, given: Any) -> Tensor:
    """Return the loss or losses, of what the closure gave."""
    y = penalty.of(given) if callable(penalty.of) else given
    if not isinstance(y, Tensor):
        raise TypeError(f"the closure gave a {type(y).__name__}, and a loss was expected")
    return y


def summarised(
    loss: Tensor,
    scale: Tensor | float | None = None,
    *,
    retain: bool = False,
    windows: Iterable[tuple[Window, Callable[[], Tensor]]] = (),
) -> Tensor:
    """Return a loss with the gradients of all its leaves, in place of its graph.

    Args:
        loss: one number, or losses whose sum is meant.
        scale: what it is multiplied by while the gradients are taken.
        retain: whether the graph behind it stays, for other uses.
        windows: they take the gradients in, each with a function that gives the loss anew.

    Returns:
        The loss.
    """
    leaves = graphs.leaves(loss)
    with torch.autocast(loss.device.type, enabled=False):
        y = loss.sum() if scale is None else loss.sum() * scale
        grads = torch.autograd.grad(y, leaves, retain_graph=retain)
    if scale is not None:
        grads = tuple(g.to(wide(g)) / scale for g in grads)
    for window, again in windows:
        window.add(again, leaves, grads)
    return known_gradient(loss, leaves, grads)
