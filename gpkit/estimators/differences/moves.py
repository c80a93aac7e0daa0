"""Weights moved temporarily."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import add_to, plus
from gpkit.autodiff.known_gradient import Number

# A way is followed by one call in C, which a signal such as that of Ctrl-C does not break off.
go: Callable[[Iterator[Any]], Any] = partial(deque, maxlen=0)
SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


def ways(
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    factor: Number,
    owners: Callable[[Sequence[Tensor]], bool] | None = None,
) -> tuple[Iterator[Any], Iterator[Any]]:
    """Return how leaf tensors are moved by ``factor · directions``, and how they come back.

    They exchange their memory for that of the moved ones, which takes one pass, and get it back.
    Where another tensor may share it, they are moved in place instead, and their values restored.

    Args:
        tensors: the tensors to move.
        directions: one for each of them.
        factor: a number.
        owners: tells whether the tensors own their memory, see `owns_memory`.

    Returns:
        What `go` follows, in a ``try`` block, and in its ``finally``.

    >>> w = torch.ones(2, requires_grad=True)
    >>> there, back = ways([w], [torch.tensor([1.0, 2.0])], 0.5)
    >>> try:
    ...     _ = go(there)
    ...     print(w.tolist())
    ... finally:
    ...     _ = go(back)
    [1.5, 2.0]
    >>> w.tolist()
    [1.0, 1.0]
    """
    values = [t.data for t in tensors]  # the same memory, without version counting
    if isinstance(factor, float) and (owners or all_own)(tensors):
        moved = plus(values, directions, alpha=factor)
        there, back = map(SET_DATA, tensors, moved), map(SET_DATA, tensors, values)
    else:
        copies = [v.clone() for v in values]
        moves = (d * factor for d in directions)  # one by one
        there, back = map(Tensor.add_, values, moves), map(Tensor.copy_, values, copies)
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return there, back
    return without_casts_kept(tensors, there, back)


def without_casts_kept(
    tensors: Sequence[Tensor], there: Iterator[Any], back: Iterator[Any]
) -> tuple[Iterator[Any], Iterator[Any]]:
    """Let autocast keep no casts of weights between a way and the way back.

    Without autocast nothing changes, since compiled nets are compiled anew for such a switch.

    Returns:
        Both ways.
    """
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return there, back
    switch, before = torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled()
    return chain(map(switch, [False]), there), chain(back, map(switch, [before]))


@contextmanager
def perturbed(
    tensors: Sequence[Tensor], moves: Sequence[Tensor], *, swap: bool = False
) -> Iterator[None]:
    """Move leaf tensors, and restore their values bit for bit at the end.

    Graphs that saved the tensors stay valid: the values are restored before such a graph is used,
    so autograd's version counters need not change.

    Args:
        tensors: the tensors to move.
        moves: the tensor to add to each.
        swap: exchange the memory of the tensors instead of writing to it, where no other tensor
            can share it. The moves are overwritten then.

    Yields:
        Nothing.
    """
    values = [t.data for t in tensors]
    if swap and all_own(tensors):
        add_to(moves, values)
        there, back = map(SET_DATA, tensors, moves), map(SET_DATA, tensors, values)
    else:
        copies = [v.clone() for v in values]
        there, back = map(Tensor.add_, values, moves), map(Tensor.copy_, values, copies)
    forth, home = without_casts_kept(tensors, there, back)
    try:
        go(forth)
        yield
    finally:
        go(home)


class Owners:
    """Tells whether weights own their memory, see `owns_memory`; it looks anew where they moved."""

    def __init__(self) -> None:
        self.places: Any = None
        self.owns = False

    def __call__(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether each tensor owns its memory."""
        pointers, sizes = [*map(Tensor.data_ptr, tensors)], [*map(Tensor.numel, tensors)]
        places = pointers, sizes, all(map(Tensor.is_contiguous, tensors))
        if places != self.places:
            self.places, self.owns = places, all_own(tensors)
        return self.owns


def all_own(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor owns its memory."""
    return all(map(owns_memory, tensors))


def owns_memory(tensor: Tensor) -> bool:
    """Whether a tensor is plain and has a whole piece of CPU memory, so that none shares it."""
    # On other devices kernels may rely on where weights lie, such as cuDNN's recurrent nets.
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.device.type != "cpu":
        return False
    memory = tensor.untyped_storage()
    whole = memory.nbytes() == tensor.numel() * tensor.itemsize
    return whole and tensor.is_contiguous() and not memory.is_shared()


def require_leaves(tensors: Sequence[Tensor]) -> None:
    """Refuse weights that are not leaves: a rerun would recompute them without the move.

    Raises:
        ValueError: if a tensor is not a leaf.
    """
    if not all(t.is_leaf for t in tensors):
        raise ValueError(
            "finite differences move the weights in place, and one of them is not a leaf tensor: "
            "give the penalty the leaf parameters"
        )
