"""Whether a gradient comes through a chain as its formula says: hooks on its way may change it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpkit.shortcut.chains.places import Chain

CLOSE = 1e-4  # of the largest entry


def agrees(
    y: Tensor,
    ones: Tensor,
    chain: Chain,
    nodes: Sequence[Any],
    ends: Sequence[Any],
    expected: Sequence[Tensor | None],
    start: Tensor | None = None,
) -> bool:
    """Whether autograd gives the same gradients, and each node gets what the one before gave.

    Args:
        y: the output.
        ones: in its shape.
        chain: the chain.
        nodes: of the chain, from that of the last layer.
        ends: tensors or edges; the first is the output of the chain's last layer.
        expected: the gradients there, by the formula.
        start: what comes to the last layer; None is the first gradient.

    Returns:
        Whether it is so.
    """
    came: dict[int, Any] = {}
    gave: dict[int, Any] = {}

    def before(i: int, grads: Sequence[Any]) -> None:
        came[i] = grads[0]

    def after(i: int, place: int, grads: Sequence[Any], _: Sequence[Any]) -> None:
        gave[i] = grads[place]

    handles = []
    for i, node in enumerate(nodes):
        place = 0 if i % 2 else chain.layers[i // 2].rows
        handles.append(node.register_prehook(partial(before, i)))
        handles.append(node.register_hook(partial(after, i, place)))
    try:
        found = torch.autograd.grad(y, ends, ones, retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    straight = (came.get(i + 1) is gave.get(i, came) for i in range(len(nodes) - 1))
    begins = came.get(0) is (found[0] if start is None else start)
    return begins and all(straight) and all(map(is_close, expected, found))


def is_close(mine: Tensor | None, autograds: Tensor | None) -> bool:
    """Whether two gradients are the same up to rounding."""
    if mine is None or autograds is None or mine.shape != autograds.shape:
        return False
    if autograds.numel() == 0:  # of an empty batch
        return True
    return bool((mine - autograds).abs().max() <= CLOSE * autograds.abs().max())
