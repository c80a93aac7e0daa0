"""A loss as penalties need it: its mean, and its value for each sample."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.compat import tree_leaves

LossFunction = Callable[[Any, Any], Tensor]


def per_sample(loss: LossFunction) -> LossFunction:
    """Return a function that gives the loss of each sample, ``[B]``.

    A loss with a ``reduction`` (an ``nn`` module, a function of ``torch.nn.functional``, a partial
    of one) is asked for "none", and what is left beside the batch is averaged. Any other is asked
    for what it gives: ``[B]`` are the losses of the samples. One number L is taken to be their mean
    and comes back as L for every sample: the *sum*, B·L, and so each sample's input gradient, is
    then right, though the single values are not.

    Args:
        loss: ``(output, target) -> loss``.

    Returns:
        ``(output, target) -> [B]``.
    """
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"  # type: ignore[assignment]
        loss = unreduced
    elif "reduction" in _parameters(loss):
        loss = functools.partial(loss, reduction="none")  # type: ignore[call-arg]

    return functools.partial(_losses, loss)  # no closure: a module goes to other processes


def _losses(loss: LossFunction, output: Any, target: Any) -> Tensor:
    value = loss(output, target)
    if value.ndim == 0:
        return value.expand(_batch_size(output, target))
    return value if value.ndim == 1 else value.flatten(1).mean(1)


def _batch_size(*values: Any) -> int:
    """Return the length of the first tensor in ``values``, which may be nested."""
    found = (v for v in tree_leaves(values) if isinstance(v, Tensor) and v.ndim)
    return len(next(found))


def _parameters(function: LossFunction) -> list[str]:
    """Return the names of a function's parameters; none if it does not show them."""
    try:
        return list(inspect.signature(function).parameters)
    except ValueError:
        return []
