"""Where the graph of a loss has the calls of layers, to read afterwards what hooks would record."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import GradientEdge

from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF, class_of, packs_saved, saved, write_count
from gpkit.autodiff.layers.gram import may_pay
from gpkit.autodiff.layers.recording import LayerCall, Recording
from gpkit.autodiff.layers.rules import INSTANCE_NORMS


class Place(NamedTuple):
    """Where the graph of a loss has a call of a layer.

    Args:
        layer: returns the module, alive as long as its weight, or a `Matrix`.
        z: the place of the node of its output among the nodes.
        output: which of the node's outputs it is.
        a: the place of the node that has saved its input.
        name: of what that node has saved.
        joins: whether a gradient at its output is known to be what comes to it, so that calls may
            join their products.
    """

    layer: Callable[[], Any]
    z: int
    output: int
    a: int
    name: str
    joins: bool = False


SAVED = ("mat1", "self", "input", "indices")  # the names of inputs in torch's derivatives.yaml


def place_of(call: LayerCall, nodes: Sequence[Any], at: dict[Any, int]) -> Place | None:
    """Return where a graph has a call; None if no node of it has saved the input of the layer.

    Args:
        call: of a layer.
        nodes: of the graph.
        at: their places.
    """
    if not isinstance(call.z, GradientEdge) or call.z.node not in at:
        return None
    if isinstance(call.layer, INSTANCE_NORMS):  # their node has saved samples as channels
        return None
    node, output = call.z.node, call.z.output_nr
    behind = [node, *(parent for parent, _ in node.next_functions[:1] if parent in at)]
    for maker in behind:
        for name in () if packs_saved(maker) else SAVED:
            a = saved(maker, name)
            if a is not None and same(a, call.a):
                ref = weakref.ref(call.layer)
                return Place(ref, at[node], output, at[maker], name, is_straight(call))
    return None


def is_straight(call: LayerCall) -> bool:
    """Whether a gradient at the output of a call is what comes to it, in any backward pass."""
    if call.straight is None and isinstance(call.z, GradientEdge):  # no gradient came through
        return sum(parent is not None for parent, _ in call.z.node.next_functions) == 1
    return bool(call.straight)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, up to the shape of leading dimensions."""
    if a is b:
        return True
    return (
        a.data_ptr() == b.data_ptr()
        and a.dtype == b.dtype
        and a.numel() == b.numel()
        and a.shape[-1:] == b.shape[-1:]
        and a.is_contiguous()
        and b.is_contiguous()
        and a.requires_grad == b.requires_grad
    )


def call_at(place: Place, nodes: Sequence[Any]) -> Any:
    """Return the call of a layer in a graph.

    Args:
        place: in a graph of this make.
        nodes: of the graph.

    Returns:
        The call; None if its input was written to since, or a factor scales its product.
    """
    node = nodes[place.a]
    try:
        a = saved(node, place.name)
    except RuntimeError:
        return None
    if a is None or saved(node, "alpha") not in (None, 1):
        return None
    z = GradientEdge(nodes[place.z], place.output)
    return LayerCall(place.layer(), a, z, write_count(a), a.dtype)


class Matrix(NamedTuple):
    """A weight ``[p, q]``, in the place of the layer that owns it."""

    weight: Tensor


def matrix(weight: weakref.ref[Tensor]) -> Matrix:
    """Return the weight that is referred to."""
    found: Any = weight()
    return Matrix(found)


# By the class of a node: the name of the rows that it has saved, and the place of the matrix.
PRODUCTS = {"AddmmBackward0": ("mat1", 2), "MmBackward0": ("self", 1)}


def products(nodes: Sequence[Any], parameters: Sequence[Tensor]) -> list[Place]:
    """Return the places of products with the transpose of weights that Gram matrices may pay for.

    Args:
        nodes: of the graph of a loss.
        parameters: of which the weights are.

    Returns:
        The places, in the order of the nodes. A weight that the graph uses twice is left out, and
        one that autocast or a checkpoint comes between.
    """
    wide = {id(p) for p in parameters if p.ndim == 2 and may_pay(*p.shape) and not p.is_complex()}
    if not wide:
        return []
    users = Counter(parent for node in nodes for parent, _ in node.next_functions)
    found = []
    for i, node in enumerate(nodes):
        rows, operand = PRODUCTS.get(class_of(node), ("", 0))
        transpose = node.next_functions[operand][0] if rows else None
        if transpose is None or class_of(transpose) != "TBackward0" or users[transpose] > 1:
            continue
        leaf = transpose.next_functions[0][0]
        weight: Any = getattr(leaf, LEAF, None)
        alone = id(weight) in wide and users[leaf] == 1 and saved(node, "alpha") in (None, 1)
        if alone and not packs_saved(node):
            found.append(Place(partial(matrix, weakref.ref(weight)), i, 0, i, rows))
    return found


def read(loss: Tensor, parameters: Sequence[Tensor]) -> Recording | None:
    """Return the same as a recording; None if there are none."""
    if not any(p.ndim == 2 and may_pay(*p.shape) for p in parameters):
        return None
    nodes = [*graph.nodes(loss)]
    calls = [call_at(place, nodes) for place in products(nodes, parameters)]
    calls = [call for call in calls if call is not None]
    return Recording(None, calls) if calls else None
