"""Read autograd graphs: leaves, operations, and why a graph cannot be differentiated again."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gpkit.autodiff import compat
from gpkit.autodiff.reached import SEEN_ONCE, Reach
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.finding import Finding, FoundError, error
from gpkit.hints import HINTS

# Operations with a zero second derivative: if a net has no others, an order >= 2 penalty is zero.
PIECEWISE_LINEAR = (
    "Relu",
    "LeakyRelu",
    "Hardtanh",
    "Threshold",
    "PreluKernel",
    "RreluWithNoise",
    "Abs",
    "Clamp",
    "ClampMin",
    "ClampMax",
    "Softshrink",
    "Hardshrink",
    "MaxPool2DWithIndices",
    "MaxPool3DWithIndices",
    "AdaptiveMaxPool2D",
    "Max",
    "Amax",
    "Maximum",
)


class NormLayerError(FoundError):
    """A derivative through a fused norm layer is wrong; elementary operations have a right one."""


def nodes(tensor: Tensor) -> Iterator[Any]:
    """Yield each node of the graph of ``tensor`` once."""
    stack: list[Any] = [tensor.grad_fn]
    seen = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        for parent, _ in node.next_functions:
            stack.append(parent)


def leaves(tensor: Tensor, found: Iterable[Any] | None = None) -> list[Tensor]:
    """Return the leaf tensors in the graph of ``tensor``; all of them require grad.

    Args:
        tensor: the output.
        found: its nodes, if they are known.
    """
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    every = [getattr(node, compat.LEAF, None) for node in found or nodes(tensor)]
    return [leaf for leaf in every if leaf is not None]


def uses(tensor: Tensor) -> Counter[int]:
    """Return how many operations in the graph of ``tensor`` take each leaf, by the leaf's id."""
    found: Counter[int] = Counter()
    for node in nodes(tensor):
        for parent, _ in node.next_functions:
            leaf = getattr(parent, compat.LEAF, None)
            if leaf is not None:
                found[id(leaf)] += 1
    return found


def passes(y: Tensor, node: Any) -> bool:
    """Whether all paths from ``y`` to a leaf pass through a node."""
    stack: list[Any] = [y.grad_fn]
    seen = {node, None}
    while stack:
        found = stack.pop()
        if found not in seen:
            seen.add(found)
            if hasattr(found, compat.LEAF):
                return False
            stack.extend(parent for parent, _ in found.next_functions)
    return y.grad_fn is not None


def depends(y: Tensor, x: Tensor) -> bool:
    """Whether ``x`` is in the graph of ``y``."""
    if x.grad_fn is not None:
        return any(node is x.grad_fn for node in nodes(y))
    return any(leaf is x for leaf in leaves(y))


def require_within(y: Tensor, xs: tuple[Tensor, ...]) -> None:
    """Refuse a variable that was computed from the leaves of ``y`` and that ``y`` does not use.

    Such as the slice ``x[:, :1]`` of a leaf, taken after ``y`` was computed from the whole leaf: a
    slice is a new tensor. A leaf that ``y`` does not use is no mistake; its derivative is zero.

    Args:
        y: the differentiated output.
        xs: the variables.

    Raises:
        ValueError: if there is one.
    """
    for x in () if TRACES else xs:
        if x.grad_fn is None or y.grad_fn is None or depends(y, x):
            continue
        if any(depends(y, leaf) for leaf in leaves(x)):
            raise ValueError(
                f"the variable {list(x.shape)} ({x.grad_fn.name()}) was not used to compute the "
                f"output {list(y.shape)}: is it a slice or a copy made afterwards? Differentiate "
                "with respect to the whole tensor that the output was computed from, and slice the "
                "derivative; or slice first, and compute the output from the slices"
            )


def between(y: Tensor, xs: tuple[Tensor, ...]) -> list[Any]:
    """Return the nodes on the paths from ``y`` to ``xs``, which a derivative passes through."""
    users: dict[Any, list[Any]] = {}
    stack = [x.grad_fn for x in xs if x.grad_fn is not None]
    for node in nodes(y):
        leaf = getattr(node, compat.LEAF, None)
        if any(x is leaf for x in xs):
            stack.append(node)
        for parent, _ in node.next_functions:
            users.setdefault(parent, []).append(node)
    found: dict[Any, None] = {}
    while stack:
        for user in users.get(stack.pop(), []):
            if user not in found:
                found[user] = None
                stack.append(user)
    return list(found)


def derivative_findings(
    y: Tensor, xs: tuple[Tensor, ...], order: int
) -> Iterator[tuple[Any, Finding]]:
    """Yield the operations of which torch has no derivative of that order, or a wrong one.

    torch does not always raise an error itself: it treats a backward marked @once_differentiable
    as a constant if its arguments are constants, and its layer norm and batch norm in training
    mode have a wrong third derivative (pytorch#175754).

    Args:
        y: the differentiated output.
        xs: the variables.
        order: the number of derivatives.

    Yields:
        The node between ``xs`` and ``y``, and what is known of it.
    """
    for node in between(y, xs) if order >= 2 else ():
        name, key = node.name(), ""
        if compat.is_once_differentiable(node):
            key = "once_differentiable"
        elif compat.is_fused_attention(name):
            key = "scaled_dot_product"
        elif order >= (2 if compat.is_second_derivative(name) else 3) and (
            compat.is_layer_norm(name) or compat.uses_batch_statistics(node, name)
        ):
            key = "NativeLayerNorm"
        if key:
            yield node, error(*HINTS[key])


def require_derivatives(y: Tensor, xs: tuple[Tensor, ...], order: int) -> None:
    """Refuse a graph if torch has no derivative of that order through it, or a wrong one.

    Args:
        y: the differentiated output.
        xs: the variables.
        order: the number of derivatives.

    Raises:
        FoundError: if an operation between ``xs`` and ``y`` is known to have no correct
            derivative of that order; the message says what to do.
    """
    for node, found in derivative_findings(y, xs, order):
        kind = NormLayerError if found.code == "wrong-derivative" else FoundError
        raise kind(found, f"there is no derivative of order {order} through {node.name()}: {found}")


def has_no_curvature(y: Tensor, order: int) -> str | None:
    """Return the name of a piecewise-linear operation whose second derivative is taken, or None.

    Args:
        y: the output to differentiate; its graph may hold derivatives already.
        order: of the derivative of y.
    """
    found = list(nodes(y))
    if order == 1 and not any(node.name().count("Backward") > 1 for node in found):
        return None
    names = set(map(compat.operation_of, found))
    return next((name for name in PIECEWISE_LINEAR if name in names), None)


class Fingerprint(NamedTuple):
    """What tells the graph of one net from that of another.

    Args:
        key: the kinds of its operations, with the ids of its parameters.
        leaves: its parameters.
        kinds: the classes of its operations, such as "TanhBackward0".
    """

    key: Any
    leaves: list[Tensor]
    kinds: frozenset[str]


def fingerprint(y: Tensor, xs: tuple[Tensor, ...]) -> Fingerprint:
    """Return what tells one net from another.

    Args:
        y: the output of a net.
        xs: its inputs, which are new at every step and do not count.
    """
    kinds: set[Any] = set()
    leaves: dict[int, Tensor] = {}
    given = set(map(id, xs))
    for node in nodes(y):
        leaf = getattr(node, compat.LEAF, None)
        if leaf is None:
            kinds.add(type(node))
        elif id(leaf) not in given or not leaf.is_leaf:
            leaves[id(leaf)] = leaf
    computing = frozenset(kind for kind in kinds if kind.__name__ != "ViewBackward0")
    key = computing, frozenset(leaves)
    names = frozenset(kind.__name__ for kind in kinds)
    return Fingerprint(key, list(leaves.values()), names)


class Differentiated(Protocol):
    """An output ``y`` with its variables, and how the graph was made, if that is known."""

    y: Tensor
    xs: tuple[Tensor, ...]
    made: Made | None


def fingerprint_of(target: Differentiated) -> Fingerprint:
    """Return what tells the net of a target from another."""
    if target.made is None:
        return fingerprint(target.y, target.xs)
    return target.made.fingerprint(target.y, target.xs)


@dataclass(eq=False)
class Made:
    """How a graph was made: it tells the fingerprint without a walk, if such a graph is known.

    A function with the same modules, the same parameters, and the same of them trained, that has
    made the same number of nodes with the same last one, is taken to have made the same graph.

    Args:
        by: the function's modules.
        nodes: how many nodes it has made.
    """

    by: Reach
    nodes: int

    def fingerprint(self, y: Tensor, xs: tuple[Tensor, ...]) -> Fingerprint:
        """Return the fingerprint of the graph of ``y``."""
        known, params = self.by.known, self.by.parameters()
        trained = [p.requires_grad for p in params]
        made = (self.nodes, type(y.grad_fn), *map(id, params), *trained)
        key, refs, kinds = known.graphs.get(made, (None, (), frozenset()))
        leaves = [ref() for ref in refs]
        if key is not None and all(p is not None for p in leaves) and not self.by.looks:
            return Fingerprint(key, leaves, kinds)
        found = fingerprint(y, xs)
        if known.graphs and found.key != key:  # it does something new
            known.facts -= SEEN_ONCE
        if found.key[1].issubset(map(id, params)):
            if len(known.graphs) >= 64:  # such as sequences of many lengths
                known.graphs.clear()
            refs = [weakref.ref(leaf) for leaf in found.leaves]
            known.graphs[made] = found.key, refs, found.kinds
        return found
