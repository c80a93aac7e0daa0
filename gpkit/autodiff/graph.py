"""Read autograd graphs: their leaves, their operations, and what tells one from another."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gpkit.autodiff import compat
from gpkit.autodiff.reached import SEEN_ONCE, Reach
from gpkit.autodiff.tracing.calls import TRACES


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


def walked(tensor: Tensor) -> tuple[list[Any], list[Any]]:
    """Return the nodes of the graph of ``tensor``, and what two graphs of one make have in common.

    The second is a list with the class of each node where it is met first, and its place among the
    nodes where it is met again, so two graphs with equal lists have the same operations and edges.
    """
    stack: list[Any] = [tensor.grad_fn]
    places: dict[Any, Any] = {None: None}
    make: list[Any] = []
    while stack:
        node = stack.pop()
        if node in places:
            make.append(places[node])
            continue
        places[node] = len(places)
        make.append(type(node))
        for parent, _ in node.next_functions:
            stack.append(parent)
    return [*places][1:], make


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


def leaves_outside(tensor: Tensor, ends: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaf tensors in the graph of ``tensor`` that are not behind some other tensors."""
    seen = {None, *(end.grad_fn for end in ends)}
    stack, found = [tensor.grad_fn], []
    while stack:
        node: Any = stack.pop()
        if node not in seen:
            seen.add(node)
            leaf = getattr(node, compat.LEAF, None)
            if leaf is not None:
                found.append(leaf)
            stack += [parent for parent, _ in node.next_functions]
    return found


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


def require_new(y: Tensor, xs: tuple[Tensor, ...], since: int) -> None:
    """Refuse an output that uses what was computed from variables before it was computed.

    Args:
        y: the output of a function that runs again at other values of the variables.
        xs: the variables.
        since: the number of nodes that were made before the function ran.

    Raises:
        RuntimeError: if there is such a part, which would stay as it is.
    """
    old = [node for node in between(y, xs) if compat.made_at(node) < since]
    if torch.is_autocast_enabled(y.device.type):  # it keeps casts of weights
        old = [node for node in old if compat.class_of(node) != compat.CASTS]
    if old:
        raise RuntimeError(
            "the closure must compute the loss from the weights; it uses what was computed from "
            f"them before ({old[-1].name()}), which stays as it is at other weights: compute that "
            "inside the closure"
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


def dtypes(y: Tensor, found: Fingerprint) -> set[torch.dtype]:
    """Return the dtypes that an output was computed in: those of its parameters, and of casts.

    Args:
        y: the output of a net.
        found: of its graph.
    """
    every = {leaf.dtype for leaf in found.leaves}
    if compat.CASTS in found.kinds:
        every.update(*map(compat.dtypes_of, nodes(y)))
    return {dtype for dtype in every if dtype.is_floating_point}


def spacing_of(found: Iterable[Any]) -> float:
    """Return the machine epsilon of the coarsest dtype that casts in a graph have; 0 without any.

    Args:
        found: the nodes of the graph.
    """
    casts = [compat.dtypes_of(node) for node in found if compat.class_of(node) == compat.CASTS]
    every = set().union(*casts)
    return max((torch.finfo(d).eps for d in every if d.is_floating_point), default=0.0)


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


def fingerprint(
    y: Tensor, xs: tuple[Tensor, ...], *, parameters_alone: bool = False
) -> Fingerprint:
    """Return what tells one net from another.

    Args:
        y: the output of a net.
        xs: its inputs, which are new at every step and do not count; or its weights.
        parameters_alone: whether no leaf counts that is not an ``nn.Parameter``. Where xs are
            weights, such a leaf is an input that needs a gradient for something else.
    """
    kinds: set[Any] = set()
    leaves: dict[int, Tensor] = {}
    given = set(map(id, xs))
    for node in nodes(y):
        leaf = getattr(node, compat.LEAF, None)
        if leaf is None:
            kinds.add(type(node))
        elif parameters_alone and not isinstance(leaf, nn.Parameter):
            continue
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
    batched: bool
    made: Made | None


def fingerprint_of(target: Differentiated) -> Fingerprint:
    """Return what tells the net of a target from another."""
    if target.made is None:
        return fingerprint(target.y, target.xs, parameters_alone=not target.batched)
    return target.made.fingerprint(target.y, target.xs)


@dataclass(eq=False)
class Made:
    """How a graph was made: it tells the fingerprint without a walk, if such a graph is known.

    A function with the same modules, the same parameters, and the same of them trained, that has
    made the same number of nodes with the same last one, is taken to have made the same graph. For
    a derivative of a higher order, which may then vanish, such as that of a ReLU, it is walked.

    Args:
        by: the function's modules.
        nodes: how many nodes it has made.
        hooks: how many hooks it has registered, maybe on hidden values.
        walked: whether the graph is walked all the same.
        value: what the function has returned.
    """

    by: Reach
    nodes: int
    hooks: int = 0
    walked: bool = False
    value: Any = None

    def fingerprint(self, y: Tensor, xs: tuple[Tensor, ...]) -> Fingerprint:
        """Return the fingerprint of the graph of ``y``."""
        known, params = self.by.known, self.by.parameters()
        trained = [p.requires_grad for p in params]
        made = (self.nodes, type(y.grad_fn), known.parts, *map(id, params), *trained)
        key, refs, kinds = known.graphs.get(made, (None, (), frozenset()))
        leaves = [ref() for ref in refs]
        walks = self.walked or self.by.looks or any(p is None for p in leaves)
        if key is not None and not walks:
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
