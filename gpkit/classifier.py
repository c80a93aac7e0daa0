"""The classifier of a net: its last linear layer, and what that is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def classifier_inputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the last linear layer of a net is given, at every forward.

    Args:
        net: a module; its last ``nn.Linear`` is taken to be the classifier.

    Yields:
        The list that grows: ``[B, d]`` for each forward.

    Raises:
        ValueError: if the net has no linear layer.
    """
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(
            "the classifier is the net's last nn.Linear; it has none: give the penalty "
            "(logits, features) yourself"
        )
    found: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()


def features(net: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Return what a net gives, and what its last linear layer was given to give it.

    Args:
        net: a module whose output is that of its last ``nn.Linear``.
        x: its input.

    Returns:
        Logits ``[B, C]`` and features ``[B, d]``.

    Raises:
        ValueError: if the net has no linear layer, or it did not run exactly once.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> [tuple(t.shape) for t in features(net, torch.ones(5, 3))]
    [(5, 2), (5, 4)]
    """
    with classifier_inputs(net) as found:
        logits = net(x)
    if len(found) != 1:
        raise ValueError(f"the net's last nn.Linear must run once in a forward; ran {len(found)}")
    return logits, found[0]
