"""Where a graph has a chain: linear layers with elementwise functions between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gpkit.autodiff.compat import LEAF, class_of, hooks_on, packs_saved, saved
from gpkit.autodiff.numerics import WIDE
from gpkit.shortcut.chains.activations import ACTIVATIONS, Activation
from gpkit.shortcut.chains.written_out import Link

# By the class of a node: the place of its input among its operands, where the matrix is the next
# one, and the name of the input among what it has saved.
LINEAR = {"AddmmBackward0": (1, "mat1"), "MmBackward0": (0, "self")}


class Layer(NamedTuple):
    """A linear layer of a chain, and the function before it.

    Args:
        kind: the class of the layer's node.
        rows: the place of its input among the node's operands.
        name: of the input among what the node has saved.
        before: the class of the node of the function before it; None in the first layer.
        activation: that function.
        biased: whether there is a bias that needs a gradient.
    """

    kind: Any
    rows: int
    name: str
    before: Any
    activation: Activation | None
    biased: bool


class Chain:
    """A chain in a graph, to read it in other graphs that were made in the same way.

    Args:
        layers: from the last one.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    def nodes(self, last: Any) -> list[Any] | None:
        """Return all nodes from that of the last layer on; None if they are others."""
        found: list[Any] = []
        for layer in self.layers:
            if type(last) is not layer.kind:
                return None
            found.append(last)
            if layer.before is not None:
                last = last.next_functions[layer.rows][0]
                if type(last) is not layer.before:
                    return None
                found.append(last)
                last = last.next_functions[0][0]
        return found

    def links(self, nodes: Sequence[Any]) -> list[Link] | None:
        """Return the values of the layers.

        Args:
            nodes: of the chain.

        Returns:
            The values; None if they are freed or were written to, if something watches the
            gradient in one of them, or if the formulas do not suit them.
        """
        found: list[Link] = []
        try:
            for i, (_, rows, name, before, activation, biased) in enumerate(self.layers):
                node, s, numbers = nodes[2 * i], None, ()
                a, parameters = saved(node, name), parameters_of(node, rows)
                if parameters is None or biased != (parameters[1] is not None):
                    return None
                if saved(node, "alpha") not in (None, 1) or saved(node, "beta") not in (None, 1):
                    return None
                if a is None or a.dtype not in WIDE:
                    return None
                if before is not None and activation is not None:
                    behind = nodes[2 * i + 1]
                    s = saved(behind, activation.saved)
                    numbers = tuple([saved(behind, number) for number in activation.numbers])
                    if is_watched(a) or is_watched(s) or not activation.suits(*numbers):
                        return None
                found.append(Link(a, *parameters, activation, s, numbers))
        except RuntimeError:  # freed, or written to
            return None
        return found


def is_watched(x: Tensor) -> bool:
    """Whether a tensor in a graph has hooks, or keeps its gradient."""
    return bool(hooks_on(x)) or x.retains_grad


def chain_at(last: Any, end: Any, users: Counter[Any]) -> tuple[Chain, list[Any]] | None:
    """Return the chain that ends with a node, and its nodes; None if there is none.

    Args:
        last: the node.
        end: the node that the chain starts from; None is an input that needs no gradient.
        users: how many nodes use each node. What is in the chain is used there alone.
    """
    layers: list[Layer] = []
    nodes: list[Any] = []
    node = last
    while class_of(node) in LINEAR and not packs_saved(node):
        rows, name = LINEAR[class_of(node)]
        nodes.append(node)
        parameters, before = parameters_of(node, rows), node.next_functions[rows][0]
        if parameters is None or not used_alone(node, rows, users):
            return None
        biased = parameters[1] is not None
        if before is end:
            layers.append(Layer(type(node), rows, name, None, None, biased))
            return (Chain(layers), nodes) if len(layers) > 1 else None
        activation = None if before is None else ACTIVATIONS.get(class_of(before))
        if activation is None or packs_saved(before) or saved(before, activation.saved) is None:
            return None
        layers.append(Layer(type(node), rows, name, type(before), activation, biased))
        nodes.append(before)
        node = before.next_functions[0][0]
        if not users[before] == users[node] == 1:
            return None
    return None


def parameters_of(node: Any, rows: int) -> tuple[Any, Any] | None:
    """Return the weight and the bias of a layer, where the latter may be None.

    Args:
        node: of the layer.
        rows: the place of its input among its operands.

    Returns:
        The pair; None if one of them is not a leaf that is used as it is, or the weight is not
        trained: then the node has not saved the layer's input.
    """
    transpose = node.next_functions[rows + 1][0]
    if transpose is None or class_of(transpose) != "TBackward0":
        return None
    operand = node.next_functions[0][0] if rows else None
    weight: Any = getattr(transpose.next_functions[0][0], LEAF, None)
    bias: Any = getattr(operand, LEAF, None)
    if type(weight) not in PLAIN:
        return None
    plain = operand is None or (type(bias) in PLAIN and bias.shape == weight.shape[:1])
    return (weight, bias) if plain else None


PLAIN = (Tensor, nn.Parameter)


def used_alone(node: Any, rows: int, users: Counter[Any]) -> bool:
    """Whether a layer's parameters are used there alone.

    Args:
        node: of the layer.
        rows: the place of its input among its operands.
        users: how many nodes use each node.

    Returns:
        Whether it is so.
    """
    transpose = node.next_functions[rows + 1][0]
    operands = [
        transpose,
        transpose.next_functions[0][0],
        node.next_functions[0][0] if rows else None,
    ]
    return all(users[operand] == 1 for operand in operands if operand is not None)
