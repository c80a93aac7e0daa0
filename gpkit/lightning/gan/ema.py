"""The average of a net's parameters, and context managers that freeze or evaluate a net."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from gpkit.autodiff.sharding.gathering import reshard
from gpkit.autodiff.tracing.calls import TRACES


def averaged_copy(net: nn.Module) -> nn.Module:
    """Return a copy of a net without trained parameters: the initial value of its average."""
    return copy.deepcopy(net).requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, net: nn.Module, decay: float) -> None:
    """Update the exponential moving average of a net: a ← d·a + (1 − d)·θ.

    Parameters are averaged, buffers are copied. Parameters that FSDP2 has sharded are gathered one
    by one, unless the average is sharded as well.

    Args:
        average: the net with parameters a, from `averaged_copy`.
        net: the net with parameters θ.
        decay: d in [0, 1).

    >>> net = nn.Linear(1, 1, bias=False)
    >>> average = averaged_copy(net)
    >>> _, _ = nn.init.zeros_(average.weight), nn.init.ones_(net.weight)
    >>> update_average(average, net, 0.75)
    >>> average.weight.item()
    0.25
    """
    reshard(average)
    reshard(net)
    for a, theta in zip(average.parameters(), net.parameters(), strict=True):
        alike = hasattr(a, "full_tensor") or not hasattr(theta, "full_tensor")
        a.lerp_(theta if alike else theta.full_tensor(), 1 - decay)  # type: ignore[attr-defined]
    for copied, buffer in zip(average.buffers(), net.buffers(), strict=True):
        copied.copy_(buffer)


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """Freeze the parameters of a net within the block; gradients still pass through the net."""
    # A graph cannot freeze: there it is done around the compiled step.
    trained = [] if TRACES else [p for p in net.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Put a net into evaluation mode within the block, and then restore the mode of each module."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
