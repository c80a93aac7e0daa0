"""Gates: the pieces of piecewise operations (ReLU, max) in use at one point, held at another.

At a kink a gradient jumps, so a difference of two gradients over a step h gains a spike of size
1/h wherever a unit changes sides within h. Double backprop never sees it: there each unit stays
on its piece. `Gates` are read off the graph of the first point while it is differentiated, and
replace the pieces in the graph of the moved point, so that the difference is that of one piece.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import operation_of, packs_saved, saved

Given = Sequence[Tensor | None]
Hook = Callable[[Given, Given], Given]  # gradients of the inputs, of the outputs -> of the inputs
Held = Callable[[Any], Hook]  # the node at the moved point -> the hook that holds its gates there
OTHERS = (
    "the function has other piecewise operations (ReLU, max) when it runs again, so kinks add "
    "spikes of size 1/h to the gradient of a finite difference: let it run the same operations "
    "each time, or use estimator='exact' or a smooth activation"
)
CARRIER = "_KnownGradientBackward"  # the node of a loss whose gradient is known


class Gates:
    """The pieces that the operations of a graph are on, in the order of its nodes.

    Args:
        names: of the piecewise operations.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self.held: list[Held | None] = [None] * len(self.names)  # None where no gradient arrived

    def hold(self, y: Tensor) -> None:
        """Keep the backward pass of ``y``, the same function elsewhere, on these pieces.

        Args:
            y: the output at the moved point.

        Warns:
            UserWarning: if its graph has other piecewise operations; it is left as it is.
        """
        if not self.names:
            return
        found = kinks(graph.nodes(y))
        if [node.name() for node in found] != self.names:
            warnings.warn(OTHERS, stacklevel=2)
            return
        for node, held in zip(found, self.held, strict=True):
            if held is not None:
                node.register_hook(held(node))


@contextmanager
def recorded(y: Tensor, nodes: Iterable[Any] | None = None) -> Iterator[Gates]:
    """Record the gates of a graph, which is differentiated within the block.

    If the gradient of ``y`` is known already, the gates are those that it carries.

    Args:
        y: the output at the first point.
        nodes: of its graph, if they are known.

    Yields:
        The gates, complete at the end of the block.

    >>> x = torch.tensor([-1e-3, 1.0], requires_grad=True)
    >>> y = x.relu().sum()
    >>> with recorded(y) as gates:
    ...     _ = torch.autograd.grad(y, x)
    >>> moved = (x + 2e-3).relu().sum()
    >>> gates.hold(moved)
    >>> torch.autograd.grad(moved, x)[0]
    tensor([0., 1.])
    """
    found = kinks(nodes or graph.nodes(y))
    carried = [node.gates for node in found if node.name() == CARRIER]
    gates = carried[0] if carried else Gates([node.name() for node in found])
    handles = []
    for i, node in enumerate([] if carried else found):

        def record(grads: Given, i: int = i, node: Any = node) -> None:
            with torch.no_grad():
                gates.held[i] = RULES[operation_of(node)](node, grads)

        def divide(before: Given, g: Given, i: int = i, node: Any = node) -> None:
            with torch.no_grad():
                if RULES[operation_of(node)] in PER_ENTRY:
                    gates.held[i] = quotients(before, g)

        packed = packs_saved(node)
        handles.append(node.register_hook(divide) if packed else node.register_prehook(record))
    try:
        yield gates
    finally:
        for handle in handles:  # each refers to its node
            handle.remove()


def carry(y: Tensor, gates: Gates, known: Any = None, epsilon: float = 0.0) -> Tensor:
    """Return ``y``, whose gradient is known, with the gates of the graph that it stands for.

    Args:
        y: the value.
        gates: of the graph.
        known: the leaves and the gradients, for others to take without a backward pass.
        epsilon: of the casts in the graph, see `graph.spacing_of`.
    """
    node: Any = y.grad_fn
    node.gates, node.epsilon = gates, epsilon
    if known is not None:
        node.known = known
    return y


def kinks(nodes: Iterable[Any]) -> list[Any]:
    """Return the nodes with gates: piecewise operations, or a known gradient that carries them."""
    found = []
    for node in nodes:
        name = node.name()
        if name.partition("Backward")[0] in RULES or (name == CARRIER and hasattr(node, "gates")):
            found.append(node)
    return found


# Rules: (node, gradients of its outputs) -> how its gates are held, or None if it has no kink.


def passes(node: Any, grads: Given) -> Held:
    """Hold an operation that lets some entries pass and stops the others."""
    mask = slopes_of(node, grads)[0] != 0
    return lambda _: lambda before, g: tuple(_kept(b, mask, g[0]) for b in before)


def slopes(node: Any, grads: Given) -> Held:
    """Hold an operation with one slope for each entry of each input."""
    return _times(slopes_of(node, grads))


def quotients(before: Given, g: Given) -> Held:
    """Hold the same where saved values cannot be read, by the quotients of the gradients.

    A slope is taken to be zero where no gradient arrives.

    Args:
        before: the gradients of the inputs.
        g: of the outputs.

    Returns:
        How the slopes are held.
    """
    top = g[0]
    if top is None:
        return _times([None] * len(before))
    one = torch.where(top == 0, torch.ones_like(top), top)
    return _times([b / one if b is not None and b.shape == one.shape else None for b in before])


def _times(held: Given) -> Held:
    def hook(before: Given, g: Given) -> Given:
        return tuple(
            b if b is None or s is None or g[0] is None else (g[0] * s).sum_to_size(b.shape)
            for b, s in zip(before, held, strict=True)
        )

    return lambda _: hook


def where(node: Any, grads: Given) -> Held:
    """Hold the condition of ``torch.where``, or the mask of ``masked_fill``."""
    condition = saved(node, "condition")
    mask, keeps = (saved(node, "mask"), False) if condition is None else (condition, True)
    return lambda _: (
        lambda before, g: tuple(
            _kept(b, mask, g[0], keep) for b, keep in zip(before, (keeps, not keeps), strict=False)
        )
    )


def picks(node: Any, grads: Given) -> Held | None:
    """Hold the indices of what an operation picks along one dimension, as ``max(dim)`` does."""
    index = saved(node, "indices")
    index = saved(node, "index") if index is None else index
    if index is None:
        return reduces(node, grads)
    dim = _signed(saved(node, "dim"))

    def hook(before: Given, g: Given) -> Given:
        x, top = before[0], g[0]
        if x is None or top is None:
            return before
        at, top = (
            (index, top) if index.ndim == x.ndim else (index.unsqueeze(dim), top.unsqueeze(dim))
        )
        return torch.zeros_like(x).scatter_add(dim, at, top), *before[1:]

    return lambda _: hook


def pools(node: Any, grads: Given) -> Held:
    """Hold the indices of max pooling, which count the pixels of a channel."""
    index = saved(node, "result1")
    dims = 3 if "3D" in node.name() else 2

    def hook(before: Given, g: Given) -> Given:
        x, top = before[0], g[0]
        if x is None or top is None:
            return before
        flat = torch.zeros_like(x, memory_format=torch.contiguous_format).flatten(-dims)
        flat.scatter_add_(-1, index.flatten(-dims), top.flatten(-dims))
        return flat.reshape(x.shape), *before[1:]

    return lambda _: hook


def reduces(node: Any, grads: Given) -> Held | None:
    """Hold the slopes of a reduction, such as ``amax`` or the margin loss."""
    if saved(node, "ord") not in (None, 1, math.inf) or saved(node, "p") not in (None, 1):
        return None  # a smooth norm or loss
    held = slopes_of(node, grads)[0]
    dims = saved(node, "dim")
    dims = (dims,) if isinstance(dims, int) else dims or ()

    def hook(before: Given, g: Given) -> Given:
        if before[0] is None or g[0] is None:
            return before
        top = g[0]
        if top.ndim:
            for dim in sorted(_signed(d) % held.ndim for d in dims) if top.ndim < held.ndim else ():
                top = top.unsqueeze(dim)
            top = top.reshape(*top.shape, *[1] * (held.ndim - top.ndim))
        return top * held, *before[1:]

    return lambda _: hook


def curved(node: Any, grads: Given) -> Held:
    """Hold the slope of the entries that change sides, of an operation with curved pieces."""
    held, before_move = slopes_of(node, grads)[0], _piece(node)

    def hooked(there: Any) -> Hook:
        same = _piece(there) == before_move  # not in the hook: it would refer to its own node

        def hook(before: Given, g: Given) -> Given:
            if before[0] is None or g[0] is None:
                return before
            return torch.where(same, before[0], g[0] * held), *before[1:]

        return hook

    return hooked


RULES: dict[str, Callable[[Any, Given], Held | None]] = {
    **dict.fromkeys(("Relu", "Threshold", "Hardtanh", "Hardshrink", "Softshrink"), passes),
    **dict.fromkeys(("LeakyRelu", "RreluWithNoise", "Hardsigmoid", "Abs", "Clamp"), slopes),
    **dict.fromkeys(("ClampMin", "ClampMax", "Maximum", "Minimum", "Fmax", "Fmin"), slopes),
    **dict.fromkeys(("Where", "MaskedFill"), where),
    **dict.fromkeys(("Max", "Min", "Median", "Nanmedian", "Kthvalue", "Mode"), picks),
    **dict.fromkeys(("Topk", "Sort", "Cummax", "Cummin", "Gather"), picks),
    **dict.fromkeys(("MaxPool2DWithIndices", "MaxPool3DWithIndices"), pools),
    **dict.fromkeys(("AdaptiveMaxPool2D", "AdaptiveMaxPool3D"), pools),
    **dict.fromkeys(("FractionalMaxPool2D", "FractionalMaxPool3D"), pools),
    **dict.fromkeys(("Amax", "Amin", "LinalgVectorNorm"), reduces),
    **dict.fromkeys(("MultiMarginLoss", "MultilabelMarginLoss"), reduces),
    **dict.fromkeys(("Elu", "PreluKernel", "Hardswish"), curved),
}

PER_ENTRY = (passes, slopes, where)


def slopes_of(node: Any, grads: Given) -> Sequence[Any]:
    """Return the slopes: the gradient of each input where those of the outputs are one."""
    ones = [None if g is None else torch.ones_like(g) for g in grads]
    found = node(*ones)
    return found if isinstance(found, tuple) else (found,)


def _kept(like: Tensor | None, mask: Tensor, g: Tensor | None, keep: bool = True) -> Tensor | None:
    """Return g where the mask is ``keep``, and zero elsewhere, in the shape of ``like``."""
    if like is None or g is None:
        return like
    zero = torch.zeros((), dtype=g.dtype, device=g.device)
    return torch.where(mask, *((g, zero) if keep else (zero, g))).sum_to_size(like.shape)


def _piece(node: Any) -> Tensor:
    """Return the piece that each entry is on: two for ELU and PReLU, three for hardswish."""
    x = saved(node, "self")
    x = saved(node, "result") if x is None else x
    return (x > -3).int() + (x >= 3) if operation_of(node) == "Hardswish" else x > 0


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim  # a node shows -1 without its sign
