"""Whether a gradient comes through a chain as its formula says, and no hook looks at it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from functools import partial
from types import CodeType
from typing import Any

from torch import Tensor

from gpkit.shortcut.chains.places import Chain
from gpkit.shortcut.compat import RUN

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

    No code of Python may run in between: a hook on a hidden value that looks at its gradient is to
    be called in each step. Of values that a graph has not saved, this is the only way to tell.

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

    own, handles = (before.__code__, after.__code__), []
    others: list[CodeType] = []

    def noting(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code not in own:
            others.append(frame.f_code)

    for i, node in enumerate(nodes):
        place = 0 if i % 2 else chain.layers[i // 2].rows
        handles.append(node.register_prehook(partial(before, i)))
        handles.append(node.register_hook(partial(after, i, place)))
    profile, collects = sys.getprofile(), gc.isenabled()
    try:
        gc.disable()  # which would run code of Python too, for what is gone
        sys.setprofile(noting)
        found = RUN((y,), (ones,), True, False, (*ends,), True, accumulate_grad=False)
    finally:
        sys.setprofile(profile)
        if collects:
            gc.enable()
        for handle in handles:
            handle.remove()
    straight = (came.get(i + 1) is gave.get(i, came) for i in range(len(nodes) - 1))
    begins = came.get(0) is (found[0] if start is None else start)
    return begins and all(straight) and not others and all(map(is_close, expected, found))


def is_close(mine: Tensor | None, autograds: Tensor | None) -> bool:
    """Whether two gradients are the same up to rounding."""
    if mine is None or autograds is None or mine.shape != autograds.shape:
        return False
    if autograds.numel() == 0:  # of an empty batch
        return True
    return bool((mine - autograds).abs().max() <= CLOSE * autograds.abs().max())
