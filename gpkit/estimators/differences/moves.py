"""Weights moved temporarily."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import add_to, plus
from gpkit.autodiff.known_gradient import Number

T = TypeVar("T")


def without_casts_kept(tensors: Sequence[Tensor]) -> bool:
    """Let autocast keep no casts of weights that move.

    Without autocast nothing changes, since compiled nets are compiled anew for such a switch.

    Args:
        tensors: the weights.

    Returns:
        Whether it kept them before.
    """
    before = torch.is_autocast_cache_enabled()
    if torch.is_autocast_enabled(tensors[0].device.type):
        torch.set_autocast_cache_enabled(False)
    return before


@contextmanager
def uncached(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Run without autocast's cache: it keeps the casts of weights that have moved since."""
    before = without_casts_kept(tensors)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def perturbed(
    tensors: Sequence[Tensor], moves: Iterable[Tensor], *, swap: bool = False
) -> Iterator[None]:
    """Move leaf tensors in place, and restore their values bit for bit at the end.

    Graphs that saved the tensors stay valid: the values are restored before such a graph is used,
    so autograd's version counters need not change.

    Args:
        tensors: the tensors to move.
        moves: the tensor to add to each; without ``swap`` they may be made one by one.
        swap: exchange the memory of the tensors instead of writing to it, where no other tensor
            can share it. The moves are overwritten then.

    Yields:
        Nothing.
    """
    values = [t.data for t in tensors]  # the same memory, without version counting
    if swap and all(map(owns_memory, tensors)):
        moves = [*moves]
        add_to(moves, values)
        there, back = map(SET_DATA, tensors, moves), map(SET_DATA, tensors, values)
        try:
            deque(there, 0)
            with uncached(tensors):
                yield
        finally:
            deque(back, 0)
        return
    copies = [v.clone() for v in values]
    back = map(Tensor.copy_, values, copies)
    try:
        for value, move in zip(values, moves, strict=True):
            value.add_(move)
        with uncached(tensors):
            yield
    finally:
        deque(back, 0)


# One call in C, which a signal such as that of Ctrl-C does not break off in between: weights are
# moved by `deque(map(SET_DATA, tensors, memories), 0)`, and come back by another such call.
SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


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
            self.places, self.owns = places, all(map(owns_memory, tensors))
        return self.owns


def run_moved(
    run: Callable[[], T],
    tensors: Sequence[Tensor],
    directions: Sequence[Tensor],
    factor: Number,
    owners: Owners | None = None,
) -> T:
    """Return ``run()`` where leaf tensors are moved by ``factor · directions``, in one pass.

    The tensors exchange their memory for that of the moved ones, and get it back. Where another
    tensor may share it, they are moved in place instead, as in `perturbed`.

    Args:
        run: is called once.
        tensors: the tensors to move.
        directions: one for each of them; ``run`` may overwrite them.
        factor: a number.
        owners: remembers which weights own their memory.
    """
    if not (isinstance(factor, float) and (owners or Owners())(tensors)):
        with perturbed(tensors, (d * factor for d in directions)):  # one product at a time
            return run()
    values = [t.data for t in tensors]
    memories = plus(values, directions, alpha=factor)
    there, back = map(SET_DATA, tensors, memories), map(SET_DATA, tensors, values)
    cached = without_casts_kept(tensors)
    try:
        deque(there, 0)
        return run()
    finally:
        deque(back, 0)
        torch.set_autocast_cache_enabled(cached)


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
